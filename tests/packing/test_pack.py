"""Packing on trees small enough to check by eye, and what it refuses."""

from __future__ import annotations

import pickle
import threading
import warnings

import numpy as np
import pytest
import torch
from support import tiny_models

from appo.errors import DataError
from appo.learner.policy import Policy, load_model
from appo.packing import pack as packing
from appo.packing.pack import interval_mask, pack, pack_sequences, trains
from appo.packing.sharing import sharing_counts
from appo.types import Credit, Leaf, Node, RolloutTree, Task

torch.set_num_threads(1)


def model(parent: int, fork_at: int, ids: list[int]) -> Node:
    return Node(parent, "model", fork_at, ids, [-float(i) for i in ids], [1.0] * len(ids), 0)


def tree_of(nodes: list[Node], ends: list[tuple[int, int]]) -> RolloutTree:
    return RolloutTree(Task("q", [], None), nodes, [Leaf(n, root) for n, root in ends])


def credit(tree: RolloutTree, leaf: int, advantage: float = 1.0) -> Credit:
    view = tree.trajectory(leaf)
    return Credit(leaf, np.full(len(view), advantage), view.mask.copy())


def forked() -> RolloutTree:
    """Prompt 5 6, root 7 8, branch that redraws the 8 as 9."""
    return tree_of(
        [Node(None, "prompt", 0, [5, 6]), model(0, 2, [7, 8]), model(1, 1, [9])], [(1, 0), (2, 0)]
    )


def test_the_docstring_example() -> None:
    tree = forked()
    (b,) = pack([tree], [[credit(tree, 0), credit(tree, 1)]], token_budget=100)
    assert b.token_ids.tolist() == [5, 6, 7, 8, 9]
    assert b.position_ids.tolist() == [0, 1, 2, 3, 3]
    assert b.subtree_end.tolist() == [5, 5, 5, 4, 5]
    assert b.source.tolist() == [1, 2, 1, 2]
    assert b.target.tolist() == [7, 8, 7, 9]
    assert b.offsets.tolist() == [0, 2, 4]
    assert b.behavior_logp.tolist() == [-7.0, -8.0, -7.0, -9.0]
    assert (b.unique_tokens, b.total_tokens) == (5, 8)
    assert b.token_ids.dtype == b.position_ids.dtype == b.source.dtype == torch.int64
    assert b.subtree_end.dtype == torch.int32
    assert b.mask.dtype == torch.bool


@pytest.mark.parametrize("forks", [[(10, 10), (12, 80), (5, 10)], [(20, 0), (10, 80), (5, 10)]])
def test_rows_of_a_root_over_the_budget_keep_their_own_tokens(forks: list[tuple[int, int]]) -> None:
    """Small rows around a long one: no stream may hold two subtrees of the tree, where one would hide the other's tokens."""
    nodes = [Node(None, "prompt", 0, [5, 6, 7, 8]), model(0, 4, list(range(10, 30)))]
    nodes += [model(1, at, list(range(30, 30 + size))) for at, size in forks]
    tree = tree_of(nodes, [(2 + i, 0) for i in range(len(forks))])
    packed = pack([tree], [[credit(tree, leaf) for leaf in range(3)]], token_budget=100)
    assert len(packed) == 2 and all(b.unique_tokens <= 100 for b in packed)
    for b in packed:
        for r, (_, leaf) in enumerate(b.rows):
            row = b.target[b.offsets[r] : b.offsets[r + 1]].tolist()
            assert row == tree.trajectory(leaf).response_ids.tolist()


def test_interval_mask_hides_siblings() -> None:
    sees = interval_mask(torch.tensor([5, 5, 5, 4, 5], dtype=torch.int32))
    assert sees.int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 1, 1, 1, 0],
        [1, 1, 1, 0, 1],
    ]


def test_tokens_that_no_trained_row_needs_are_left_out() -> None:
    tree = forked()
    (b,) = pack([tree], [[credit(tree, 1)]], token_budget=100)
    assert b.token_ids.tolist() == [5, 6, 7, 9]
    assert b.rows == [(0, 1)]


def test_tool_tokens_are_edges_without_loss() -> None:
    nodes = [
        Node(None, "prompt", 0, [5]),
        model(0, 1, [7]),
        Node(1, "tool", 1, [1, 2]),
        model(2, 2, [8]),
    ]
    tree = tree_of(nodes, [(3, 0)])
    (b,) = pack([tree], [[credit(tree, 0)]], token_budget=100)
    assert b.target.tolist() == [7, 1, 2, 8]
    assert b.mask.tolist() == [True, False, False, True]
    assert b.behavior_logp.tolist() == [-7.0, 0.0, 0.0, -8.0]


def test_trees_share_a_stream_and_do_not_see_each_other() -> None:
    tree = forked()
    rows = [credit(tree, 0), credit(tree, 1)]
    (b,) = pack([tree, tree], [rows, rows], token_budget=10)
    assert b.subtree_end.tolist() == [5, 5, 5, 4, 5, 10, 10, 10, 9, 10]
    assert b.position_ids.tolist() == [0, 1, 2, 3, 3] * 2
    assert len(pack([tree, tree], [rows, rows], token_budget=9)) == 2


def test_a_tree_over_the_budget_is_cut_between_roots_and_repeats_its_prompt() -> None:
    nodes = [
        Node(None, "prompt", 0, [5, 6]),
        *(model(0, 2, [10 + r, 20 + r, 30 + r]) for r in range(3)),
    ]
    tree = tree_of(nodes, [(1, 0), (2, 1), (3, 2)])
    rows = [credit(tree, leaf) for leaf in range(3)]
    packed = pack([tree], [rows], token_budget=8)
    assert [b.token_ids.tolist() for b in packed] == [
        [5, 6, 10, 20, 30, 11, 21, 31],
        [5, 6, 12, 22, 32],
    ]


def test_a_row_over_the_budget_is_trained_alone_and_named_once(monkeypatch) -> None:
    monkeypatch.setattr(packing, "_over_budget_told", threading.Event())
    nodes = [Node(None, "prompt", 0, [5, 6]), *(model(0, 2, [10 + r, 20, 30]) for r in range(3))]
    tree = tree_of(nodes, [(1, 0), (2, 1), (3, 2)])
    rows = [credit(tree, leaf) for leaf in range(3)]
    with pytest.warns(UserWarning, match=r"leaf 0: 5 tokens, more than learner.token_budget \(4\)"):
        alone = pack([tree], [rows], token_budget=4)
    assert [b.rows for b in alone] == [[(0, 0)], [(0, 1)], [(0, 2)]]
    assert sharing_counts([tree], alone, 4)["pack/over_budget"] == 3
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pack([tree], [rows], token_budget=4)


def test_a_root_over_the_budget_is_cut_where_its_rows_no_longer_fit() -> None:
    tree = forked()
    tree.nodes.append(model(1, 1, [10]))
    tree.leaves.append(Leaf(3, 0))
    rows = [credit(tree, leaf) for leaf in range(3)]
    packed = pack([tree], [rows], token_budget=5)  # the first two share three of their tokens
    assert [b.rows for b in packed] == [[(0, 0), (0, 1)], [(0, 2)]]


def test_trees_are_binned_into_few_streams_in_their_own_order() -> None:
    """6 + 4, 6 + 4, 5 of ten tokens each; taking them as they come would need four streams."""
    sizes = [6, 5, 6, 4, 4]
    trees = [
        tree_of([Node(None, "prompt", 0, [5]), model(0, 1, list(range(n - 1)))], [(1, 0)])
        for n in sizes
    ]
    packed = pack(trees, [[credit(t, 0)] for t in trees], token_budget=10)
    assert [[i for i, _ in b.rows] for b in packed] == [[0, 3], [1], [2, 4]]


def test_padding_sees_only_itself() -> None:
    tree = forked()
    (b,) = pack([tree], [[credit(tree, 0), credit(tree, 1)]], token_budget=100)
    assert b.padded(5) is b
    wide = b.padded(4)
    assert wide.subtree_end.tolist() == [5, 5, 5, 4, 5, 6, 7, 8]
    assert interval_mask(wide.subtree_end)[5:].int().tolist() == torch.eye(8).int()[5:].tolist()
    assert (wide.unique_tokens, wide.padding, len(wide.token_ids)) == (5, 3, 8)
    assert (wide.source.equal(b.source), wide.subtree_end.dtype) == (True, torch.int32)


def test_padding_changes_no_gradient(tmp_path) -> None:
    tiny_models.build("qwen3", tmp_path, seed=0)
    tree = forked()
    (b,) = pack([tree], [[credit(tree, 0), credit(tree, 1, advantage=-2.0)]], token_budget=100)
    found = []
    for batch in (b, b.padded(64)):
        lm = load_model(tmp_path, torch.float32)
        (Policy(lm)(batch).logp * batch.advantage).sum().backward()
        found.append({n: p.grad for n, p in lm.named_parameters() if p.grad is not None})
    plain, wide = found
    assert plain.keys() == wide.keys()
    for name, gradient in plain.items():
        assert torch.allclose(gradient, wide[name], rtol=1e-4, atol=1e-6), name


def test_a_stream_survives_the_way_to_another_rank() -> None:
    tree = forked()
    tree.nodes[1].old_logp = [-1.0, -2.0]
    (b,) = pack([tree], [[credit(tree, 0), credit(tree, 1)]], token_budget=100)
    assert b.old_logp.tolist() == [-1.0, -2.0, -1.0, -9.0]  # the branch's own token has none
    back = pickle.loads(pickle.dumps(b))
    for name, value in vars(b).items():
        other = getattr(back, name)
        assert torch.equal(value, other) if isinstance(value, torch.Tensor) else value == other


@pytest.mark.parametrize(
    ("node", "parent", "fork_at"),
    [(1, 2, 0), (1, None, 0), (2, 1, 3), (2, 1, -1), (1, 0, 1), (0, 1, 0), (2, -1, 0), (1, 7, 0)],
)
def test_a_malformed_tree_is_refused(node: int, parent: int | None, fork_at: int) -> None:
    sound, tree = forked(), forked()
    tree.nodes[node].parent, tree.nodes[node].fork_at = parent, fork_at
    rows = [credit(sound, 0), credit(sound, 1)]
    with pytest.raises(DataError, match=rf"task 'q', node {node}: parent {parent}, fork_at"):
        pack([sound, tree], [rows, rows], token_budget=100)


def test_rows_without_effect_are_left_out_and_reported() -> None:
    tree = forked()
    idle, dead = credit(tree, 0, advantage=0.0), credit(tree, 1)
    dead.loss_mask[:] = False
    assert not trains(idle)
    assert not trains(dead)
    assert trains(
        credit(tree, 0, advantage=float("nan"))
    )  # must reach the finite check, not vanish
    assert pack([tree], [[idle, dead]], token_budget=100) == []
    assert pack([tree], [[]], token_budget=100) == []
    packed = pack([tree], [[idle, credit(tree, 1)]], token_budget=100)
    report = sharing_counts([tree], packed, 100)
    assert report["pack/tokens_all"] == 2 * report["pack/tokens_rows"]
    assert report["pack/tokens_rows"] == report["pack/tokens_unique"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: Credit(c.leaf, c.advantage[:-1], c.loss_mask), "1 advantages"),
        (lambda c: Credit(c.leaf, c.advantage, np.ones(4, bool)), "4 loss-mask entries"),
    ],
)
def test_a_credit_of_the_wrong_length_is_refused(change, message: str) -> None:
    tree = forked()
    with pytest.raises(DataError, match=message):
        pack([tree], [[change(credit(tree, 0))]], token_budget=100)


def test_loss_on_a_tool_token_is_refused() -> None:
    tree = tree_of([Node(None, "prompt", 0, [5]), Node(0, "tool", 1, [1])], [(1, 0)])
    with pytest.raises(DataError, match="position 0, which the policy did not sample"):
        pack([tree], [[Credit(0, np.ones(1), np.ones(1, bool))]], token_budget=100)


def test_sequences_side_by_side() -> None:
    b = pack_sequences([[1, 2, 3], [4, 5]])
    assert b.subtree_end.tolist() == [3, 3, 3, 5, 5]
    assert b.source.tolist() == [0, 1, 3]
    assert b.target.tolist() == [2, 3, 5]
    assert b.offsets.tolist() == [0, 2, 3]
    with pytest.raises(DataError, match=r"lengths \[1\]"):
        pack_sequences([[7]])


def test_an_empty_node_does_not_cut_its_sibling_off() -> None:
    """Found by hypothesis: two forks begin at the same stream index when one of them adds nothing."""
    nodes = [Node(None, "prompt", 0, [5]), model(0, 1, [7]), model(1, 1, []), model(1, 1, [8, 9])]
    tree = tree_of(nodes, [(2, 0), (3, 0)])
    for order in ([0, 1], [1, 0]):
        (b,) = pack([tree], [[credit(tree, i) for i in order]], token_budget=100)
        assert b.token_ids.tolist() == [5, 7, 8, 9]
        assert b.subtree_end.tolist() == [4, 4, 4, 4]


def test_a_deep_chain_needs_no_recursion() -> None:
    nodes = [Node(None, "prompt", 0, [1])]
    for i in range(5000):
        nodes.append(model(i, 1, [i % 7]))
    tree = tree_of(nodes, [(5000, 0)])
    (b,) = pack([tree], [[credit(tree, 0)]], token_budget=10**6)
    assert b.position_ids.tolist() == list(range(5001))
    assert set(b.subtree_end.tolist()) == {5001}
