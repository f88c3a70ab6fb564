"""Even work for all ranks: streams move from where their prompts were drawn to where there is room.

A rank's streams are as long as its prompts' answers happen to be, and the slowest rank sets the time of a step. The
gradient is a sum over streams, so that it does not matter who computes which part.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from appo.dist.ranks import Ranks
from appo.packing.pack import PackedBatch


@dataclass(frozen=True)
class Costs:
    """What a stream costs: token · its tokens + pair · its (query, key) pairs of attention, in any one unit.

    The default ratio is that of a model of a few hundred million to a few billion parameters; see `of_model`.
    """

    token: float = 1.0
    pair: float = 1e-4

    @classmethod
    def of_model(cls, config: Any, parameters: int) -> Costs:
        """In FLOP, from a Hugging Face config.

        Forward and backward take 6 per parameter and token. Attention takes 4 per pair, layer and
        channel forward, and 2.5 times that backward, where scores are computed again.
        """
        heads = config.num_attention_heads
        width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
        return cls(token=6.0 * parameters, pair=14.0 * config.num_hidden_layers * width)

    def of(self, batch: PackedBatch) -> float:
        """Cost of one stream. O(T): token k is seen by the queries k … subtree_end[k] - 1."""
        at = torch.arange(batch.subtree_end.numel(), device=batch.subtree_end.device)
        pairs = int((batch.subtree_end - at).sum())
        return self.token * batch.subtree_end.numel() + self.pair * pairs


def balance(
    batches: Sequence[PackedBatch], ranks: Ranks, costs: Costs
) -> tuple[list[PackedBatch], dict[str, float]]:
    """This rank's share of the streams of all ranks, dearest first, and {"pack/imbalance": max / mean cost}.

    Collective; alone it returns what it was given. Whole streams move, `PackedBatch.rank` says from where. No rank
    gets more streams than a rank must have at least, so that none waits in micro-batches that others do not have.
    """
    if ranks.world == 1:
        return list(batches), {"pack/imbalance": 1.0}
    all_costs = ranks.all_gather([costs.of(b) for b in batches], "costs of streams")
    owners = assign_owners(all_costs)
    share: list[Any] = []
    out: list[list[Any]] = [[] for _ in range(ranks.world)]
    for i, (batch, to) in enumerate(zip(batches, owners[ranks.rank], strict=True)):
        item = (-all_costs[ranks.rank][i], ranks.rank, i, replace(batch, rank=ranks.rank))
        (share if to == ranks.rank else out[to]).append(item)
    if any(to != rank for rank, row in enumerate(owners) for to in row):  # the same on all ranks
        share += ranks.all_to_all(out, "streams")
    share.sort(key=lambda item: item[:3])
    return [batch for *_, batch in share], {"pack/imbalance": _imbalance(all_costs, owners)}


def assign_owners(costs: Sequence[Sequence[float]]) -> list[list[int]]:
    """Who computes what: `costs[r][i]` of stream i of rank r → the rank that gets it, in the same shape.

    Dearest first to the rank with the least so far (at equal loads it stays where it is), at most
    ceil(streams / ranks) each. Deterministic.
    """
    world = len(costs)
    streams = sorted((-c, i, r) for r, row in enumerate(costs) for i, c in enumerate(row))
    most = -(-len(streams) // world)
    load, count = [0.0] * world, [0] * world
    owners = [[0] * len(row) for row in costs]
    for cost, i, r in streams:
        open_ranks = (to for to in range(world) if count[to] < most)
        to = min(open_ranks, key=lambda to: (load[to], to != r, to))
        owners[r][i] = to
        load[to] -= cost
        count[to] += 1
    return owners


def _imbalance(costs: Sequence[Sequence[float]], owners: Sequence[Sequence[int]]) -> float:
    """Largest cost of a rank over the mean; 1 when there is nothing to do."""
    load = [0.0] * len(costs)
    for row, to_ranks in zip(costs, owners, strict=True):
        for cost, to in zip(row, to_ranks, strict=True):
            load[to] += cost
    return max(load) * len(load) / sum(load) if any(load) else 1.0
