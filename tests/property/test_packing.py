"""Packing against brute force: what every edge sees must be exactly its own trajectory, for any tree."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from appo.packing.forest import Forest, cut
from appo.packing.pack import PackedBatch, interval_mask, pack, trains
from appo.packing.sharing import sharing_counts
from appo.types import Credit, Leaf, Node, RolloutTree, Task

torch.set_num_threads(1)


@st.composite
def trees(draw: st.DrawFn) -> RolloutTree:
    """Roots, forks in the middle of nodes, forks of forks, tool nodes, empty nodes, forks at 0."""
    ids = st.integers(0, 50)
    nodes = [Node(None, "prompt", 0, draw(st.lists(ids, min_size=1, max_size=4)))]
    root_of = {0: -1}
    roots = 0
    for _ in range(draw(st.integers(1, 9))):
        parent = draw(st.integers(0, len(nodes) - 1))
        size = len(nodes[parent].token_ids)
        fork_at = size if parent == 0 else draw(st.integers(0, size))
        tokens = draw(st.lists(ids, min_size=0, max_size=4))
        tokens += [
            (7 * len(nodes) + i) % 51 for i in range(draw(st.sampled_from([0, 0, 6, 36, 56])))
        ]
        role = draw(st.sampled_from(["model", "model", "tool"]))
        logp = [-0.5 - i for i in range(len(tokens))] if role == "model" else None
        old_logp = logp and draw(st.sampled_from([None, [x - 9 for x in logp]]))
        version = draw(st.integers(0, 3))
        nodes.append(Node(parent, role, fork_at, tokens, logp, logp, version, old_logp=old_logp))
        root_of[len(nodes) - 1] = roots if parent == 0 else root_of[parent]
        roots += parent == 0
    ends = draw(st.sets(st.integers(1, len(nodes) - 1), min_size=1))
    leaves = [Leaf(node=n, root=root_of[n]) for n in sorted(ends)]
    return RolloutTree(Task("t", [], None), nodes, leaves)


@st.composite
def batches(draw: st.DrawFn) -> tuple[list[RolloutTree], list[list[Credit]], int]:
    forest = draw(st.lists(trees(), min_size=1, max_size=3))
    credits = []
    for tree in forest:
        rows = []
        for leaf in range(len(tree.leaves)):
            view = tree.trajectory(leaf)
            rng = np.random.default_rng(draw(st.integers(0, 99)))
            advantage = rng.normal(size=len(view)) * draw(st.sampled_from([0.0, 1.0, 1.0]))
            mask = view.mask & (rng.random(len(view)) < 0.8)
            rows.append(Credit(leaf, advantage, mask, weight=float(leaf + 1)))
        credits.append(draw(st.permutations(rows)))
    return forest, credits, draw(st.integers(1, 130))


def check_rows(batch: PackedBatch, forest: list[RolloutTree], credit_of: dict) -> None:
    sees = interval_mask(batch.subtree_end)
    for r, (i, leaf) in enumerate(batch.rows):
        tree, credit = forest[i], credit_of[i, leaf]
        path = tree.path_ids(tree.leaves[leaf].node)
        view = tree.trajectory(leaf)
        a, b = int(batch.offsets[r]), int(batch.offsets[r + 1])
        assert b - a == len(view)
        assert batch.target[a:b].tolist() == view.response_ids.tolist()
        assert batch.mask[a:b].tolist() == list(credit.loss_mask)
        assert torch.equal(batch.behavior_logp[a:b], torch.from_numpy(view.logprobs))
        assert torch.equal(batch.old_logp[a:b], torch.from_numpy(view.old_logp))
        assert batch.version[a:b].tolist() == view.version.tolist()
        assert np.allclose(batch.advantage[a:b], credit.advantage, rtol=1e-6)
        assert float(batch.weight[r]) == credit.weight
        for t, source in enumerate(batch.source[a:b].tolist()):
            keys = sees[source].nonzero().squeeze(1)
            assert batch.token_ids[keys].tolist() == path[: view.prompt_len + t]
            assert batch.position_ids[keys].tolist() == list(range(view.prompt_len + t))


@settings(max_examples=300, deadline=None)
@given(batches())
def test_every_edge_sees_exactly_its_own_trajectory(case: tuple) -> None:
    forest, credits, budget = case
    packed = pack(forest, credits, token_budget=budget)
    credit_of = {(i, c.leaf): c for i, rows in enumerate(credits) for c in rows}
    for batch in packed:
        check_rows(batch, forest, credit_of)
    expected = sorted(k for k, c in credit_of.items() if trains(c))
    assert sorted(row for batch in packed for row in batch.rows) == expected


@settings(max_examples=300, deadline=None)
@given(batches())
def test_budget_is_kept_and_nothing_is_stored_twice(case: tuple) -> None:
    forest, credits, budget = case
    packed = pack(forest, credits, token_budget=budget)
    for batch in packed:
        assert batch.unique_tokens <= budget or len(batch.rows) == 1
        needed: dict[int, dict[int, int]] = {}
        for i, leaf in batch.rows:
            node, take = forest[i].leaves[leaf].node, None
            while node is not None:
                n = forest[i].nodes[node]
                take = len(n.token_ids) if take is None else take
                have = needed.setdefault(i, {})
                have[node] = max(have.get(node, 0), take)
                node, take = n.parent, n.fork_at
        assert batch.unique_tokens == sum(sum(x.values()) for x in needed.values())
        assert batch.total_tokens == sum(
            len(forest[i].path_ids(forest[i].leaves[leaf].node)) for i, leaf in batch.rows
        )
    tables = Forest(forest)
    for i, rows in enumerate(credits):
        subtrees = cut(tables, i, {r: tables.leaf(i, c.leaf) for r, c in enumerate(rows)}, budget)
        assert sorted(r for p in subtrees for r in p.rows) == list(range(len(rows)))
        for p in subtrees:  # an overestimate would cost streams and break no budget
            assert p.size == sum(p.take.values())
    whole = pack(forest, credits, token_budget=10**6)
    assert len(whole) <= 1
    report = sharing_counts(forest, whole, 10**6)
    assert report["pack/tokens_all"] >= report["pack/tokens_rows"] >= report["pack/tokens_unique"]
