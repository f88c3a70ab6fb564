"""What the tests of the segment tree share.

Both implementations run side by side, and an independent shadow.

The shadow knows neither nodes nor blocks. Every position of every sequence has an *origin*: a
number made when the token was put there. A fork shares its parent's origins before at - 1 and gets
a new one for its first row, so KV may be shared exactly where origins are equal, and everything
else follows by counting in sets.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch

from appo._kernels.common import native
from appo.errors import EngineError
from appo.rollout.native.tree.block_list import BLOCK
from appo.rollout.native.tree.integrity import check_tree
from appo.rollout.native.tree.layout import Layout
from appo.rollout.native.tree.native_tree import NativeTree
from appo.rollout.native.tree.segment_tree import SegmentTree

TREES = [SegmentTree] if native.load()[0] is None else [SegmentTree, NativeTree]
COUNTS = (
    "version", "capacity", "used", "free", "peak", "span", "tokens_held", "live_sequences", "live_nodes",
)  # fmt: skip


class Both:
    """All implementations there are.

    Each call must give the same answer, or the same error, everywhere.
    """

    def __init__(self, max_blocks: int | None = None):
        self.trees = [tree(max_blocks) for tree in TREES]
        self.layouts: list[Any] = []  # of the last plan or layout, one per implementation

    def __getattr__(self, name: str) -> Any:
        if name in COUNTS:
            return self._same([getattr(tree, name) for tree in self.trees], name)

        def call(*args: Any) -> Any:
            return self._same([_outcome(getattr(t, name), args) for t in self.trees], (name, args))

        return call

    def plan(self, seqs: Sequence[int], budget: int) -> Layout | int:
        return self._open([_outcome(tree.plan, (seqs, budget)) for tree in self.trees])

    def layout(self, ranges: Sequence[tuple[int, int, int]]) -> Layout | int:
        return self._open([_outcome(tree.layout, (ranges,)) for tree in self.trees])

    def check(self) -> None:
        self._same([_outcome(check_tree, (tree,)) for tree in self.trees], "check_tree")

    def close(self, how: str) -> None:
        """ "commit" or "abort" what is open."""
        layouts, self.layouts = self.layouts, []
        for tree, layout in zip(self.trees, layouts):
            getattr(tree, how)(layout)

    def facts(self, seqs: Sequence[int]) -> list[Any]:
        """Everything there is to ask."""
        each = [
            (
                s,
                self.length(s),
                self.base(s),
                self.kv(s),
                self.stale(s),
                self.tokens(s),
                self.path(s),
            )
            for s in seqs
        ]
        nodes = {node for s in seqs for node, _ in self.path(s)}
        blocks = {node: self.blocks_of(node) for node in nodes}
        return [*each, blocks, self.free_blocks(), *(getattr(self, name) for name in COUNTS)]

    def _open(self, outcomes: list[Any]) -> Layout | int:
        if isinstance(outcomes[0], Layout):
            for other in outcomes[1:]:
                assert_same_layout(outcomes[0], other)
            self.layouts = outcomes
            return outcomes[0]
        return self._same(outcomes, "plan")

    @staticmethod
    def _same(outcomes: list[Any], call: Any) -> Any:
        first = outcomes[0]
        for other in outcomes[1:]:
            assert _plain(first) == _plain(other), (call, outcomes)
        if isinstance(first, Exception):
            raise first
        return first


def _outcome(function: Any, args: tuple) -> Any:
    try:
        return function(*args)
    except EngineError as error:
        return error


def _plain(outcome: Any) -> Any:
    return (type(outcome), str(outcome)) if isinstance(outcome, Exception) else outcome


def assert_same_layout(a: Layout, b: Layout) -> None:
    for one in fields(Layout):
        x, y = getattr(a, one.name), getattr(b, one.name)
        if isinstance(x, torch.Tensor):
            assert x.dtype == y.dtype == torch.int64 and x.shape == y.shape, one.name
            assert torch.equal(x, y), (one.name, x, y)
        else:
            assert x == y, (one.name, x, y)


def rows_read(layout: Layout) -> list[list[int]]:
    """Per row the slots it reads, in the order of its path."""
    blocks, reads = layout.blocks.tolist(), layout.reads.tolist()
    segments, limits = layout.segments.tolist(), layout.limits.tolist()
    rows: list[list[int]] = [[] for _ in layout.ids]
    for segment, first, last, start in reads:
        begin, longest = segments[segment]
        for row in range(first, last):
            limit = limits[start + row - first]
            assert 0 < limit <= longest
            rows[row] += [blocks[begin + i // BLOCK] * BLOCK + i % BLOCK for i in range(limit)]
    return rows


@dataclass
class Shadow:
    """Sequences as lists of origins, and which origins have KV."""

    token: list[int] = field(default_factory=list)  # of each origin
    made_for: list[int] = field(
        default_factory=list
    )  # the first origin of its segment, of each origin
    seqs: dict[int, list[int]] = field(default_factory=dict)
    base: dict[int, int] = field(default_factory=dict)
    covered: set[int] = field(default_factory=set)
    planned: set[int] = field(default_factory=set)
    fresh: set[int] = field(default_factory=set)  # had KV under these weights at some time
    lost: set[int] = field(default_factory=set)  # had KV under older weights
    memory: dict[int, tuple[int, int]] = field(default_factory=dict)  # slot → origin, version

    def new(self, tokens: Sequence[int], after: int | None = None) -> list[int]:
        """Origins of a new segment, or of the one that `after` is in."""
        first = len(self.token)
        self.token += tokens
        self.made_for += [first if after is None else self.made_for[after]] * len(tokens)
        return list(range(first, first + len(tokens)))

    def tokens(self, seq: int) -> list[int]:
        return [self.token[o] for o in self.seqs[seq]]

    def add(self, seq: int, tokens: Sequence[int]) -> None:
        self.seqs[seq], self.base[seq] = self.new(tokens), 0

    def fork(self, child: int, seq: int, at: int) -> None:
        token = self.token[self.seqs[seq][at - 1]]
        self.seqs[child] = self.seqs[seq][: at - 1] + self.new([token])
        self.base[child] = at - 1

    def extend(self, seq: int, tokens: Sequence[int]) -> None:
        self.seqs[seq] += self.new(tokens, self.seqs[seq][-1])

    def truncate(self, seq: int, length: int) -> None:
        mine = self.seqs[seq]
        if length == len(mine):
            return
        segment: int | None = mine[length - 1]
        if length <= self.base[seq] or mine[length - 1] in self.others(seq):
            self.base[seq], segment = length - 1, None
        self.seqs[seq] = mine[: length - 1] + self.new([self.token[mine[length - 1]]], segment)
        self.forget_dead()

    def release(self, seq: int) -> None:
        del self.seqs[seq], self.base[seq]
        self.forget_dead()

    def evict(self, seq: int) -> None:
        self._uncover(set(self.seqs[seq][self.base[seq] :]) - self.others(seq))

    def evict_path(self, seq: int, going_on: Sequence[int]) -> None:
        segments = {self.made_for[o] for o in self.seqs[seq]}
        mine = {o for o in self.covered | self.planned if self.made_for[o] in segments}
        stay = {o for other in going_on for o in self.seqs[other]}
        for origins in self.seqs.values():
            off = [i for i, o in enumerate(origins) if o not in mine and self.has(o)]
            stay |= set(origins[: max(off, default=0)])
        self._uncover(mine - stay)

    def has(self, origin: int) -> bool:
        return origin in self.covered or origin in self.planned

    def kv(self, seq: int) -> int:
        return next(
            (i for i, o in enumerate(self.seqs[seq]) if o not in self.covered), len(self.seqs[seq])
        )

    def plan(self, seqs: Sequence[int], budget: int) -> tuple[list[int], list[int]]:
        """(origins to run, sequences that are sampled)."""
        run: list[int] = []
        sampled = []
        for seq in seqs:
            origins, base = self.seqs[seq], self.base[seq]
            known = self.covered | set(run)
            above = [o for o in origins[:base] if o not in known]
            own = [o for o in origins[base:] if o not in known] or origins[-1:]
            run += above[:budget]
            if len(above) > budget:
                budget = 0
                continue
            budget -= len(above)
            if len(own) == 1:
                run += own
            else:
                run += own[:budget]
                if len(own) > budget:
                    budget = 0
                    continue
                budget -= len(own)
            sampled.append(seq)
        return run, sampled

    def commit(self) -> None:
        self.covered |= self.planned
        self.fresh |= self.covered
        self.planned = set()

    def new_version(self) -> None:
        """The last token of a sequence is run again anyway."""
        self.lost |= self.fresh - {origins[-1] for origins in self.seqs.values()}
        self.covered, self.planned, self.fresh = set(), set(), set()

    def stale(self, origins: Sequence[int]) -> bool:
        return any(o in self.lost and o not in self.fresh for o in origins)

    def forget_dead(self) -> None:
        live = {o for origins in self.seqs.values() for o in origins}
        self.fresh &= live
        self.lost &= live
        self.covered &= live
        self.planned &= live

    def others(self, seq: int) -> set[int]:
        return {o for other, origins in self.seqs.items() if other != seq for o in origins}

    def _uncover(self, origins: set[int]) -> None:
        self.covered -= origins
        self.planned -= origins
