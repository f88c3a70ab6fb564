"""Statistics of given tokens under the current weights, one prefix-shared pass over a set of paths.

Every node's stored positions are run once, parents first, in chunks that may hold many nodes at a time; the KV they
write stays, so that a fork after a weight change costs one token. The row of position i predicts token i + 1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from appo.kernels import linear_logprob_entropy
from appo.rollout.engine import Scored
from appo.rollout.native.batch import Batch, Unit
from appo.rollout.native.kv import KVStore
from appo.rollout.native.model import Model
from appo.rollout.native.tree import Node


def _pieces(leaf: Node) -> list[tuple[Node, int]]:
    """(node, own positions to run) from the root to `leaf`; the last token of the leaf predicts nothing."""
    return [(leaf, len(leaf.tokens) - 1), *leaf.chain()][::-1]


def positions_needed(leaves: Sequence[Node]) -> list[tuple[Node, int]]:
    """The union of the leaves' paths: (node, own positions to run), parents before children."""
    nodes: dict[int, Node] = {}
    need: dict[int, int] = {}
    for leaf in leaves:
        for node, count in _pieces(leaf):
            nodes[node.id] = node
            need[node.id] = max(need.get(node.id, 0), count)
    return [(nodes[i], need[i]) for i in sorted(nodes)]  # a child's id is larger than its parent's


class TreeScore:
    """One pass. `run` computes, `of(leaf)` reads the result for one sequence."""

    def __init__(self, model: Model, store: KVStore, version: int, temperature: float):
        self.model, self.store = model, store
        self.version, self.temperature = version, temperature
        self._parts: dict[int, list[tuple[Tensor, Tensor]]] = {}

    def run(self, needs: list[tuple[Node, int]], chunk: int, padded: Callable[[int], int]) -> int:
        """Run `needs` in chunks of at most `chunk` tokens; returns the number of tokens run."""
        for node, count in needs:
            self.store.room(node, count)
            node.stale = node.stale and count == 0
        units: list[Unit] = []
        budget = chunk
        for node, count in needs:
            start = 0
            while start < count:
                take = min(budget, count - start)
                units.append(Unit(node, start, take))
                start, budget = start + take, budget - take
                if not budget:
                    self._forward(units, padded(chunk))
                    units, budget = [], chunk
        if units:
            self._forward(units, padded(chunk - budget))
        return sum(count for _, count in needs)

    def _forward(self, units: list[Unit], rows: int) -> None:
        batch = Batch(units, self.store, self.model.config.heads, rows)
        hidden = self.model.forward(batch.ids, batch.positions, batch.attention, None)
        targets: list[int] = []
        for u in batch.units:
            targets += u.node.tokens[u.start + 1 : u.start + u.count + 1]
        y = torch.tensor(targets, device=self.store.device)
        logp, entropy, _ = linear_logprob_entropy(
            hidden[: batch.rows], self.model.head.weight, y, inv_temp=1.0 / self.temperature
        )
        for u in batch.units:
            rows_of = slice(batch.first_row[u.node.id], batch.first_row[u.node.id] + u.count)
            self._parts.setdefault(u.node.id, []).append((logp[rows_of], entropy[rows_of]))
            self.store.written(u.node, u.start + u.count, self.version)

    def of(self, leaf: Node) -> Scored:
        """Statistics of tokens 1 … len-1 of `leaf`."""
        logp, entropy = [np.zeros(0, np.float32)], [np.zeros(0, np.float32)]
        for node, count in _pieces(leaf):
            if count:
                columns = [torch.cat(c)[:count].cpu().numpy() for c in zip(*self._parts[node.id])]
                logp.append(columns[0])
                entropy.append(columns[1])
        return Scored(np.concatenate(logp), np.concatenate(entropy), self.version)
