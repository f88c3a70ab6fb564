"""Trees on disk: an exact round trip, whatever a task holds and however the last write ended."""

from __future__ import annotations

import json
import math
from dataclasses import asdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from appo.errors import DataError
from appo.observability.codec import decode, encode
from appo.observability.trees import stored_text
from appo.rollout.store import (
    append_trees,
    cut_after,
    read_step,
    read_trees,
    tree_from_json,
    tree_to_json,
)
from appo.types import Finish, Leaf, Node, RolloutTree, Task, ToolCall


def make_tree(step: int = 1, **task) -> RolloutTree:
    """A root with a tool call and one branch off its first turn."""
    fields = {
        "messages": [{"role": "user", "content": "2+3?"}],
        "answer": "5",
        "tools": ("python",),
    }
    call = ToolCall("python", "2+3", "5\n", True, 0.0123, None, 2)
    failed = ToolCall("python", "x", "", False, 1.5, "timeout", 1)
    return RolloutTree(
        Task("t-1", **(fields | task)),
        [
            Node(None, "prompt", 0, [1, 2, 3]),
            Node(0, "model", 3, [4, 5, 6], [-0.1, -1 / 3, -2.5e-17], [0.3, 1.9, 0.0], 4, (0,)),
            Node(1, "tool", 3, [7, 8]),
            Node(2, "model", 2, [9], [-0.7], [0.2], 4, (0,)),
            Node(1, "model", 1, [10, 11], [-1.1, -0.2], [1.0, 0.5], 5, (0, 0)),
        ],
        [
            Leaf(3, 0, finish=Finish.ANSWER, tool_calls=[call], reward=1.0,
                 reward_parts={"correct": 1.0}),
            Leaf(4, 0, branch=0, parent_leaf=0, split=1, branch_score=0.1 + 0.2, branch_rule="strict",
                 branch_z=(1.25, -0.5), finish=Finish.LENGTH, tool_calls=[failed],
                 grade_error="timeout: 5 s"),
        ],
        step=step,
        stats={"over_budget_calls": 1},
    )  # fmt: skip


def through_file(tree: RolloutTree) -> RolloutTree:
    return tree_from_json(json.loads(json.dumps(tree_to_json(tree), allow_nan=False)))


def test_round_trip_is_exact_in_values_and_types():
    tree = make_tree()
    back = through_file(tree)
    assert back == tree
    assert isinstance(back.leaves[0].finish, Finish)
    assert isinstance(back.nodes[1].path, tuple)
    assert isinstance(back.leaves[1].branch_z, tuple)
    assert back.unique_tokens() == tree.unique_tokens()
    np.testing.assert_array_equal(back.trajectory(1).logprobs, tree.trajectory(1).logprobs)


def test_numpy_numbers_become_python_numbers_of_the_same_value():
    tree = make_tree()
    tree.nodes[1].token_ids = [np.int64(4), np.int32(5), np.uint8(6)]  # type: ignore[list-item]
    tree.nodes[1].logprobs = [np.float32(-0.1), np.float64(-1 / 3), np.float16(0.5)]
    tree.leaves[0].reward = np.float32(0.7)
    tree.leaves[1].split = np.int64(1)
    back = through_file(tree)
    assert back.nodes[1].logprobs == [float(np.float32(-0.1)), -1 / 3, 0.5]
    assert back.leaves[0].reward == float(np.float32(0.7))
    assert all(type(i) is int for i in back.nodes[1].token_ids)
    assert type(back.leaves[1].split) is int


def test_what_json_cannot_say_comes_back_too():
    tree = make_tree(
        answer=(1, ("a", None)),
        meta={
            "by_id": {1: "x", (2, 3): [4.5]},
            "$tuple": "a key of the user",
            "odd": "\ud800\u2028\x00",
        },
    )
    tree.nodes[1].logprobs = [float("nan"), float("-inf"), -0.0]
    back = through_file(tree)
    assert back.task == tree.task
    assert back.task.meta == tree.task.meta
    lp = back.nodes[1].logprobs
    assert lp is not None
    assert math.isnan(lp[0])
    assert lp[1] == -math.inf
    assert math.copysign(1, lp[2]) == -1


def test_arrays_keep_dtype_and_shape_and_unknown_objects_are_marked():
    a = np.array([[1.5, np.nan]], np.float32)
    back = decode(json.loads(json.dumps(encode({"a": a}), allow_nan=False)))["a"]
    assert back.dtype == a.dtype
    np.testing.assert_array_equal(back, a)
    assert encode(3 + 4j) == {"$repr": "(3+4j)", "type": "complex"}


JSONISH = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda x: st.lists(x) | st.tuples(x, x) | st.dictionaries(st.text() | st.integers(), x),
    max_leaves=12,
)


@settings(max_examples=200, deadline=None)
@given(JSONISH)
def test_any_value_of_a_task_survives(value):
    back = decode(json.loads(json.dumps(encode(value), allow_nan=False)))
    assert back == value
    assert repr(back) == repr(value)  # tuples stay tuples, 1.0 stays a float


def test_file_keeps_order_and_text_is_for_people_only(tmp_path):
    path = tmp_path / "deep" / "trees.jsonl"
    trees = [make_tree(1), make_tree(2, meta={"s": "\ud800"})]
    append_trees(path, trees[:1], text=lambda ids: "+".join(map(str, ids)))
    append_trees(path, trees[1:])
    assert list(read_trees(path)) == trees
    first = json.loads(path.read_bytes().splitlines()[0])
    assert first["nodes"][1]["text"] == "4+5+6"
    assert first["leaves"][1]["token"] == "5"  # what the root had where the branch left it
    text = stored_text(first)
    assert (text([7, 8]), text([5]), text([99, 98])) == ("7+8", "5", "(2 tokens)")


@pytest.mark.parametrize("keep", [1, 20, -1])
def test_torn_last_line_is_left_out_then_replaced(tmp_path, keep):
    path = tmp_path / "trees.jsonl"
    append_trees(path, [make_tree(1), make_tree(2)])
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + lines[1][:keep].rstrip(b"\n"))
    whole = keep == -1  # only the newline is missing: then nothing is lost
    assert [t.step for t in read_trees(path)] == ([1, 2] if whole else [1])
    append_trees(path, [make_tree(3)])
    assert [t.step for t in read_trees(path)] == ([1, 2, 3] if whole else [1, 3])


def test_cut_after_drops_later_steps(tmp_path):
    path = tmp_path / "trees.jsonl"
    append_trees(path, [make_tree(s) for s in (1, 1, 2, 3)])
    cut_after(path, 2)
    assert [t.step for t in read_trees(path)] == [1, 1, 2]
    assert [p.name for p in tmp_path.iterdir()] == ["trees.jsonl"]


def test_damage_is_an_error_with_its_place(tmp_path):
    path = tmp_path / "trees.jsonl"
    with pytest.raises(DataError, match="no such file"):
        list(read_trees(path))
    append_trees(path, [make_tree(1), make_tree(2)])
    path.write_bytes(b'{"step": \n' + path.read_bytes())
    with pytest.raises(DataError, match="line 1"):
        list(read_trees(path))
    data = tree_to_json(make_tree())
    with pytest.raises(DataError, match="format 2"):
        tree_from_json(data | {"format": 2})
    del data["nodes"][1]["role"]
    with pytest.raises(DataError, match="role"):
        tree_from_json(data)


def test_unknown_keys_are_ignored():
    data = tree_to_json(make_tree()) | {"later": 1}
    data["leaves"][0]["later"] = 2
    assert asdict(tree_from_json(data)) == asdict(make_tree())


def test_float32_statistics_of_an_engine_come_back_to_the_last_bit():
    """What a replay rests on: engines hand out float32, JSON holds the decimals of the float64 of
    the same value.
    """
    bits = np.random.default_rng(0).integers(0, 2**32, 5000, dtype=np.uint32)
    drawn = bits.view(np.float32)
    drawn = drawn[np.isfinite(drawn)]  # every exponent, subnormal numbers too
    for values in ([float(x) for x in drawn], list(drawn), drawn.tolist()):
        tree = make_tree()
        tree.nodes[1] = Node(
            0, "model", 3, [7] * len(drawn), values, values, 4, (0,), old_logp=values
        )
        back = through_file(tree).nodes[1]
        for column in (back.logprobs, back.entropy, back.old_logp):
            np.testing.assert_array_equal(
                np.asarray(column, np.float32).view(np.uint32), drawn.view(np.uint32)
            )


def test_a_step_is_read_back_by_mini_batch(tmp_path):
    path = tmp_path / "trees.jsonl"
    trees = [make_tree(1), make_tree(2), make_tree(2, answer="6"), make_tree(2, answer="7")]
    append_trees(path, trees[:1], minibatch=[0])
    append_trees(path, trees[1:], minibatch=[1, 0, 1])
    assert read_step(path, 2) == {0: [trees[2]], 1: [trees[1], trees[3]]}
    assert list(read_step(path, 2)) == [0, 1]
    assert read_step(path, 3) == {}
    assert list(read_trees(path)) == trees
    append_trees(path, [make_tree(3)])
    with pytest.raises(DataError, match="tree of step 3 does not say which mini-batch"):
        read_step(path, 3)
    with pytest.raises(ValueError, match="shorter"):
        append_trees(path, trees, minibatch=[0])
    with pytest.raises(DataError, match="no such file"):
        read_step(tmp_path / "none.jsonl", 1)
