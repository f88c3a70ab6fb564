"""Packing on trees small enough to check by eye, and what it refuses."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from appo.data.packing import interval_mask, pack, pack_sequences, sharing_report, trains
from appo.errors import DataError
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
    assert b.tout.tolist() == [5, 5, 5, 4, 5]
    assert b.source.tolist() == [1, 2, 1, 2]
    assert b.target.tolist() == [7, 8, 7, 9]
    assert b.offsets.tolist() == [0, 2, 4]
    assert b.behaviour.tolist() == [-7.0, -8.0, -7.0, -9.0]
    assert (b.unique_tokens, b.total_tokens) == (5, 8)
    assert b.token_ids.dtype == b.position_ids.dtype == b.source.dtype == torch.int64
    assert b.tout.dtype == torch.int32
    assert b.mask.dtype == torch.bool


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
    assert b.behaviour.tolist() == [-7.0, 0.0, 0.0, -8.0]


def test_trees_share_a_stream_and_do_not_see_each_other() -> None:
    tree = forked()
    rows = [credit(tree, 0), credit(tree, 1)]
    (b,) = pack([tree, tree], [rows, rows], token_budget=10)
    assert b.tout.tolist() == [5, 5, 5, 4, 5, 10, 10, 10, 9, 10]
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
    alone = pack([tree], [rows], token_budget=3)  # no row fits: one stream each, never dropped
    assert [b.rows for b in alone] == [[(0, 0)], [(0, 1)], [(0, 2)]]


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
    report = sharing_report([tree], packed)
    assert report["pack/skip_factor"] == 2.0
    assert report["pack/sharing_factor"] == 1.0


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
    assert b.tout.tolist() == [3, 3, 3, 5, 5]
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
        assert b.tout.tolist() == [4, 4, 4, 4]


def test_a_deep_chain_needs_no_recursion() -> None:
    nodes = [Node(None, "prompt", 0, [1])]
    for i in range(5000):
        nodes.append(model(i, 1, [i % 7]))
    tree = tree_of(nodes, [(5000, 0)])
    (b,) = pack([tree], [[credit(tree, 0)]], token_budget=10**6)
    assert b.position_ids.tolist() == list(range(5001))
    assert set(b.tout.tolist()) == {5001}
