"""Statistics of given tokens under the current weights, one prefix-shared pass over a set of paths.

Every node's stored positions are run once, in chunks that may hold many nodes at a time; the KV
they write stays, so that a fork after a weight change costs one token. The row of position i
predicts token i + 1.

Nodes are run depth first, of the children of a node the one that forks last first. So what is still
to be read always lies on one path, the current one: a pool that holds the longest sequence can
score any number of them, as what lies off that path may be dropped. (It is fresh all the same, and
is prefilled again when a fork needs it.)
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from appo.errors import EngineError
from appo.kernels import linear_logprob_entropy
from appo.rollout.engine import Scored
from appo.rollout.native.runner import Runner
from appo.rollout.native.scheduler import Scheduler
from appo.rollout.native.tree.layout import Layout
from appo.rollout.native.tree.native_tree import Tree

NodeRows = tuple[int, int, int]  # node, first own position, count
Reads = tuple[tuple[int, int], ...]  # (node, how many of its own positions), root first


@dataclass
class Span:
    """What is run of a node.

    Own positions 0 … count - 1, each predicting the target at the same place.
    """

    targets: list[int]  # tokens that follow: of own positions 1 … count
    logprobs: np.ndarray  # float32 [count]
    entropy: np.ndarray

    @property
    def count(self) -> int:
        """Own positions that are run."""
        return len(self.targets)


class TreeScore:
    """One pass over the paths of `seqs`.

    `run` computes, `of(seq, version)` reads the result for one sequence.
    """

    def __init__(
        self,
        tree: Tree,
        scheduler: Scheduler,
        runner: Runner,
        seqs: Sequence[int],
        temperature: float,
    ):
        self.tree, self.scheduler, self.runner = tree, scheduler, runner
        self.seqs, self.inv_temp = list(dict.fromkeys(seqs)), 1.0 / temperature
        self.spans: dict[int, Span] = {}
        self._above: dict[int, Reads] = {}  # node → what its rows read of its ancestors
        self._below: dict[int, dict[int, int]] = {}  # node → children and how much they read of it
        for seq in self.seqs:
            self._add(seq)

    def _add(self, seq: int) -> None:
        """The longest use of a node decides how much of it is run.

        What follows it is read off that path.
        """
        ids, first = self.tree.tokens(seq), 0
        above: Reads = ()
        for node, count in self._pieces(seq):
            self._above[node], self._below[node] = above, self._below.get(node, {})
            if above:
                parent, at = above[-1]
                self._below[parent][node] = at
            above = *above, (node, count)
            if node not in self.spans or self.spans[node].count < count:
                zeros = np.zeros(count, np.float32)
                self.spans[node] = Span(ids[first + 1 : first + 1 + count], zeros, zeros.copy())
            first += count

    def _pieces(self, seq: int) -> list[tuple[int, int]]:
        """(node, own positions to run), root first.

        The last token of a sequence predicts nothing.
        """
        *path, (leaf, own) = self.tree.path(seq)
        return [*path, (leaf, own - 1)]

    def run(self) -> int:
        """Run everything in chunks; returns the number of rows.

        A chunk that fails leaves those before it committed.
        """
        rest = self._ranges()
        while rest:
            try:
                layout, rest = self._plan(rest)
                self.runner.pool.ensure(self.tree.span)
                self._forward(layout)
                self.tree.commit(layout)
            except BaseException:
                if self.tree.open is not None:  # neither before a plan nor after commit
                    self.tree.abort(self.tree.open)
                raise
        return sum(span.count for span in self.spans.values())

    def _ranges(self) -> list[NodeRows]:
        """All there is to run, in depth-first order; see the module's text."""
        order, stack = [], [node for node, above in self._above.items() if not above][::-1]
        while stack:
            node = stack.pop()
            order.append((node, 0, self.spans[node].count))
            stack += sorted(self._below[node], key=self._below[node].__getitem__)
        return [row_range for row_range in order if row_range[2]]

    def _plan(self, ranges: list[NodeRows]) -> tuple[Layout, list[NodeRows]]:
        """The layout of the next chunk, and what comes after it.

        Chunks are smaller where the pool has little room.
        """
        rows = self.scheduler.prefill_chunk
        while True:
            chunk, rest = _cut(ranges, rows)
            layout = self.tree.layout(chunk)
            if isinstance(layout, Layout):
                return layout, rest
            if self.scheduler.make_room(layout, self.seqs, self._reads(ranges)):
                continue
            rows = sum(count for _, _, count in chunk) // 2
            if not rows:
                limit = self.tree.capacity
                raise EngineError(
                    f"score: {layout} blocks of KV are lacking and nothing can give way: the pool has {limit}, which does "
                    "not hold the longest sequence; raise kv_tokens"
                )

    def _reads(self, ranges: list[NodeRows]) -> dict[int, int]:
        """Node → own positions, run by now, that these ranges read."""
        reads: dict[int, int] = {}
        for node, start, _ in ranges:
            for id, count in (*self._above[node], (node, start)):
                reads[id] = max(reads.get(id, 0), count)
        return reads

    def _forward(self, layout: Layout) -> None:
        hidden = self.runner.forward(layout, None)
        rows = len(layout.ids)
        y = torch.zeros(rows, dtype=torch.int64)
        for node, (row, start, count) in layout.rows_of.items():
            y[row : row + count] = torch.tensor(self.spans[node].targets[start : start + count])
        logp, entropy = self._statistics(hidden[:rows], y)
        for node, (row, start, count) in layout.rows_of.items():
            span = self.spans[node]
            span.logprobs[start : start + count] = logp[row : row + count]
            span.entropy[start : start + count] = entropy[row : row + count]

    def _statistics(self, hidden: Tensor, y: Tensor) -> tuple[np.ndarray, np.ndarray]:
        head = self.runner.model.head.weight
        logp, entropy, _ = linear_logprob_entropy(
            hidden, head, y.to(hidden.device), inv_temp=self.inv_temp
        )
        return logp.cpu().numpy(), entropy.cpu().numpy()

    def of(self, seq: int, version: int) -> Scored:
        """Statistics of tokens 1 … len-1 of a sequence."""
        parts = [(self.spans[node], count) for node, count in self._pieces(seq)]
        logprobs = np.concatenate([span.logprobs[:count] for span, count in parts])
        entropy = np.concatenate([span.entropy[:count] for span, count in parts])
        return Scored(logprobs, entropy, version)


def _cut(ranges: Iterable[NodeRows], rows: int) -> tuple[list[NodeRows], list[NodeRows]]:
    """The first so many rows, and the others."""
    first: list[NodeRows] = []
    rest: list[NodeRows] = []
    for node, start, count in ranges:
        take = min(count, rows)
        rows -= take
        if take:
            first.append((node, start, take))
        if take < count:
            rest.append((node, start + take, count - take))
    return first, rest
