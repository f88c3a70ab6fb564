"""Streams dealt over ranks: the same streams, evenly, the same on every run."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from appo.dist.ranks import Ranks
from appo.packing.pack import PackedBatch, interval_mask, pack, pack_sequences
from appo.trainer.balance import Costs, assign_owners, balance
from appo.types import Credit, Leaf, Node, RolloutTree, Task

torch.set_num_threads(1)


class Threads:
    """Ranks of one process, a thread each; objects are handed over without a copy."""

    def __init__(self, world: int):
        self.box = [None] * world
        self.meet = threading.Barrier(world, timeout=20)

    def rank(self, rank: int) -> SimpleNamespace:
        world = len(self.box)

        def all_gather(obj, what=""):
            self.box[rank] = obj
            self.meet.wait()
            found = list(self.box)
            self.meet.wait()
            return found

        def all_to_all(out, what=""):
            return [item for theirs in all_gather(out) for item in theirs[rank]]

        return SimpleNamespace(rank=rank, world=world, all_gather=all_gather, all_to_all=all_to_all)


def over_ranks(parts: list[list[PackedBatch]], costs: Costs) -> list[tuple]:
    group = Threads(len(parts))
    with ThreadPoolExecutor(len(parts)) as pool:
        jobs = [pool.submit(balance, part, group.rank(r), costs) for r, part in enumerate(parts)]
        return [job.result(timeout=30) for job in jobs]


def streams(lengths: list[int]) -> list[PackedBatch]:
    """One row each; the first token says which stream it is."""
    out = []
    for length in lengths:
        nodes = [
            Node(None, "prompt", 0, [length]),
            Node(0, "model", 1, [7] * length, [-1.0] * length, [1.0] * length, 0),
        ]
        credit = Credit(0, np.ones(length), np.ones(length, bool))
        out += pack(
            [RolloutTree(Task("t", [], None), nodes, [Leaf(1, 0)])], [[credit]], token_budget=1
        )
    return out


@pytest.mark.filterwarnings("ignore:task 't'")
def test_streams_move_to_where_there_is_room_and_know_where_they_come_from() -> None:
    parts = [streams([50, 40, 30, 20]), [], streams([10])]
    done = over_ranks(parts, Costs(token=1.0, pair=0.0))
    shares = [[(b.rank, int(b.token_ids[0])) for b in share] for share, _ in done]
    assert shares == [[(0, 50)], [(0, 40), (2, 10)], [(0, 30), (0, 20)]]
    largest, mean = 52, (51 + 41 + 31 + 21 + 11) / 3  # a prompt token each
    assert [m for _, m in done] == [{"pack/imbalance": pytest.approx(largest / mean)}] * 3
    again = over_ranks(parts, Costs(token=1.0, pair=0.0))
    assert shares == [[(b.rank, int(b.token_ids[0])) for b in share] for share, _ in again]
    for share, _ in done:
        for b in share:  # rows, old log-probs and all travel with the stream
            assert b.rows == [(0, 0)]
            assert torch.equal(b.old_logp, b.behavior_logp)


def test_one_rank_keeps_what_it_has_and_none_has_nothing() -> None:
    batches = [pack_sequences([[1, 2]]), pack_sequences([[1, 2, 3]])]
    mine, metrics = balance(batches, Ranks(), Costs())
    assert [a is b for a, b in zip(mine, batches, strict=True)] == [True, True]
    assert metrics == {"pack/imbalance": 1.0}
    assert over_ranks([[], []], Costs()) == [([], {"pack/imbalance": 1.0})] * 2


def test_equal_streams_stay_where_they_are() -> None:
    assert assign_owners([[5.0] * 3, [5.0] * 3]) == [[0] * 3, [1] * 3]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.lists(st.integers(1, 1000), max_size=12), min_size=1, max_size=8))
def test_deal_is_even_and_never_adds_a_micro_batch(costs: list[list[int]]) -> None:
    owners = assign_owners([[float(c) for c in row] for row in costs])
    assert [len(row) for row in owners] == [len(row) for row in costs]
    world, total = len(costs), sum(map(len, costs))
    dealt = [x for mine, row in zip(owners, costs) for x in zip(mine, row, strict=True)]
    count = [sum(to == r for to, _ in dealt) for r in range(world)]
    assert max(count) == -(-total // world)
    load = [sum(c for to, c in dealt if to == r) for r in range(world)]
    largest = max((c for row in costs for c in row), default=0)
    assert max(load) - min(load) <= 2 * largest  # the price of whole streams and equal numbers


def test_cost_counts_the_pairs_that_attention_computes() -> None:
    nodes = [Node(None, "prompt", 0, [5, 6])]
    for root in range(3):
        nodes.append(Node(0, "model", 2, [7 + root] * 4, [-1.0] * 4, [1.0] * 4, 0))
    tree = RolloutTree(Task("t", [], None), nodes, [Leaf(1 + r, r) for r in range(3)])
    credits = [Credit(r, np.ones(4), np.ones(4, bool)) for r in range(3)]
    (batch,) = pack([tree], [credits], token_budget=100)
    pairs = int(interval_mask(batch.subtree_end).sum())
    assert Costs(token=3.0, pair=0.5).of(batch) == 3.0 * 14 + 0.5 * pairs
    config = SimpleNamespace(num_attention_heads=4, hidden_size=32, num_hidden_layers=2)
    assert Costs.of_model(config, 1000) == Costs(6000.0, 14.0 * 2 * 32)
