"""The segment tree in C++ (csrc/kv_tree/).

The interface, answers and messages of `SegmentTree`, its definition.

Handles, tokens and positions are whole numbers, as there; what is none is a TypeError here,
whatever it is there. An operation is done or not done, also when memory is short or Ctrl-C comes.
"""

from __future__ import annotations

import functools
from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import SimpleNamespace

import torch

from appo._kernels.common import native
from appo.errors import EngineError, StaleWeightsError
from appo.rollout.native.tree.block_list import BLOCK
from appo.rollout.native.tree.layout import Layout
from appo.rollout.native.tree.segment_tree import SegmentTree

_FUNCTIONS = (
    "new", "add", "fork", "extend", "truncate", "release", "evict", "evict_path", "new_version", "length", "base", "kv",
    "stale", "tokens", "path", "blocks_of", "free_blocks", "counts", "plan", "layout", "tables", "commit", "abort",
    "need", "check",
)  # fmt: skip


def make_tree(max_blocks: int | None = None) -> Tree:
    """A tree of at most so many blocks of 16 positions (None: no limit).

    In C++ where the native library is there.
    """
    return SegmentTree(max_blocks) if native.load()[0] is None else NativeTree(max_blocks)


@functools.cache
def _library() -> SimpleNamespace:
    """The functions tree_* of the native library, which raise EngineError and StaleWeightsError."""
    functions = {name: native.require(f"kv_tree_{name}") for name in _FUNCTIONS}
    from tvm_ffi import register_error

    register_error("EngineError", EngineError)
    register_error("StaleWeightsError", StaleWeightsError)
    for function in functions.values():
        # One at a time, like the definition: C++ has no lock of its own.
        function.release_gil = False
    return SimpleNamespace(**functions)


def _packed(numbers: Iterable[int]) -> bytes:
    return array("q", numbers).tobytes()


def _numbers(packed: bytes) -> list[int]:
    return memoryview(packed).cast("q").tolist()


class NativeTree:
    """See SegmentTree for the contract of each method."""

    BLOCK = BLOCK

    def __init__(self, max_blocks: int | None = None):
        if max_blocks is not None and max_blocks < 1:
            raise EngineError(f"max_blocks={max_blocks}: must be at least 1")
        self._call = _library()
        self._tree = self._call.new(-1 if max_blocks is None else max_blocks)
        # Number and tables of the layout opened last. Whether it is still open only C++ knows: so
        # it cannot be mistaken.
        self._last: tuple[int, Layout | None] = (0, None)

    # -- facts -------------------------------------------------------------------------------------

    @property
    def version(self) -> int:
        """Weights version that new KV is tagged with."""
        return self._counts()[0]

    @property
    def tokens_held(self) -> int:
        """Positions with KV, each counted once."""
        return self._counts()[1]

    @property
    def capacity(self) -> int:
        """Blocks there may be; without a limit, as many as were in use at once."""
        return self._counts()[2]

    @property
    def used(self) -> int:
        """Blocks that cannot be taken: owned, or given back while a layout is open."""
        return self._counts()[3]

    @property
    def free(self) -> int:
        """Blocks that may still be taken."""
        counts = self._counts()
        return counts[2] - counts[3]

    @property
    def peak(self) -> int:
        """The most blocks that were in use at once."""
        return self._counts()[4]

    @property
    def span(self) -> int:
        """1 + the highest block in use: the pool needs room for so many."""
        return self._counts()[5]

    @property
    def live_sequences(self) -> int:
        """Handles that were given out and not released."""
        return self._counts()[6]

    @property
    def live_nodes(self) -> int:
        """Nodes that a live handle stands on, ancestors included."""
        return self._counts()[7]

    @property
    def open(self) -> Layout | None:
        """The layout that waits for commit or abort."""
        number, layout = self._last
        return layout if number == self._counts()[8] else None

    def length(self, seq: int) -> int:
        """Tokens of the sequence, inherited ones included."""
        return self._call.length(self._tree, seq)

    def base(self, seq: int) -> int:
        """Absolute position of the first token that the sequence's node owns."""
        return self._call.base(self._tree, seq)

    def tokens(self, seq: int) -> list[int]:
        """All tokens of the sequence, from the root on."""
        return _numbers(self._call.tokens(self._tree, seq))

    def kv(self, seq: int) -> int:
        """Positions of the path, from the root on, that have KV."""
        return self._call.kv(self._tree, seq)

    def stale(self, seq: int) -> bool:
        """Whether the path holds a position that new weights voided and nobody has run since."""
        return self._call.stale(self._tree, seq)

    def path(self, seq: int) -> list[tuple[int, int]]:
        """(node id, how many of its own positions are on the path), root first."""
        flat = _numbers(self._call.path(self._tree, seq))
        return list(zip(flat[::2], flat[1::2]))

    def blocks_of(self, node_id: int) -> list[int]:
        """Blocks that a node owns, in the order of its positions."""
        return _numbers(self._call.blocks_of(self._tree, node_id))

    def free_blocks(self) -> list[int]:
        """Numbers of the blocks that wait to be taken again."""
        return _numbers(self._call.free_blocks(self._tree))

    # -- sequences ---------------------------------------------------------------------------------

    def add(self, ids: Sequence[int]) -> int:
        """A new root with these tokens; → its handle. EngineError when there are none."""
        return self._call.add(self._tree, _packed(ids))

    def fork(self, seq: int, at: int) -> int:
        """A child that inherits tokens < at; → its handle. See `SegmentTree.fork`."""
        return self._call.fork(self._tree, seq, at)

    def extend(self, seq: int, ids: Sequence[int]) -> None:
        """Append tokens; they are run when the sequence is planned."""
        self._call.extend(self._tree, seq, _packed(ids))

    def truncate(self, seq: int, length: int) -> None:
        """Drop tokens from absolute position `length` on; see `SegmentTree.truncate`."""
        self._call.truncate(self._tree, seq, length)

    def release(self, seq: int) -> None:
        """Give the handle back. What no descendant inherits goes, and its blocks with it."""
        self._call.release(self._tree, seq)

    def evict(self, seq: int, keep: Mapping[int, int] | None = None) -> int:
        """Free KV and keep the tokens; → blocks given back. `keep` as in `SegmentTree.evict`."""
        if keep is None:
            return self._call.evict(self._tree, seq)
        pairs = (number for pair in keep.items() for number in pair)
        return self._call.evict_path(self._tree, seq, _packed(pairs))

    def new_version(self, version: int) -> None:
        """New weights: all KV is void. Sequences that had some are stale until scored."""
        self._call.new_version(self._tree, version)

    # -- planning ----------------------------------------------------------------------------------

    def plan(self, seqs: Sequence[int], budget: int) -> Layout | int:
        """The open layout of what each path lacks, or how many blocks there are too few."""
        return self._opened(self._call.plan, _packed(seqs), budget)

    def layout(self, ranges: Sequence[tuple[int, int, int]]) -> Layout | int:
        """The open layout of (node id, first own position, count), or blocks too few."""
        flat = _packed(number for row_range in ranges for number in row_range)
        return self._opened(self._call.layout, flat)

    def commit(self, layout: Layout) -> None:
        """The rows of the layout have been run: their KV counts from now on."""
        self._call.commit(self._tree, self._number(layout))

    def abort(self, layout: Layout) -> None:
        """The rows of the layout have not been run: the blocks taken for them are free."""
        self._call.abort(self._tree, self._number(layout))

    def need(self, seqs: Sequence[int], ends: Sequence[int]) -> int:
        """Blocks still to be taken if every sequence grew to its end, shared ones once."""
        if len(seqs) != len(ends):
            raise EngineError(
                f"need: {len(seqs)} sequences and {len(ends)} ends; give one for each"
            )
        return self._call.need(self._tree, _packed(seqs), _packed(ends))

    def check(self) -> None:
        """Recompute every invariant: see `integrity.check_tree`."""
        slots = b"" if self.open is None else _packed(self.open.slots.tolist())
        self._call.check(self._tree, slots)

    # -- inside ------------------------------------------------------------------------------------

    def _counts(self) -> list[int]:
        return _numbers(self._call.counts(self._tree))

    def _opened(self, call: Callable[..., bytes], *args: object) -> Layout | int:
        """What `plan` or `layout` answers.

        If its tables do not get here (no memory, Ctrl-C) it is not open either.
        """
        before = self._last[0]
        try:
            lacking, *rest = _numbers(call(self._tree, *args))
            if lacking:
                return lacking
            number, decode_rows, *sizes = rest
            layout = self._tables(decode_rows, sizes)
            self._last = number, layout
        except BaseException:
            number = self._counts()[8]
            if number not in (0, before):
                self._call.abort(self._tree, number)
            raise
        return layout

    def _tables(self, decode_rows: int, sizes: list[int]) -> Layout:
        flat = torch.empty(sum(sizes), dtype=torch.int64)
        self._call.tables(self._tree, flat)
        ids, positions, slots, segments, blocks, reads, limits, out_rows, seqs, rows = flat.split(
            sizes
        )
        numbers = rows.tolist()
        return Layout(
            ids=ids,
            positions=positions,
            slots=slots,
            segments=segments.view(-1, 2),
            blocks=blocks,
            reads=reads.view(-1, 4),
            limits=limits,
            out_rows=out_rows,
            seqs=seqs.tolist(),
            rows_of=dict(zip(numbers[::4], zip(numbers[1::4], numbers[2::4], numbers[3::4]))),
            decode_rows=decode_rows,
            prefill_rows=len(ids) - decode_rows,
        )

    def _number(self, layout: Layout | None) -> int:
        """The number of a layout that may be open; 0, which none has, of any other."""
        number, last = self._last
        return number if layout is last else 0


Tree = SegmentTree | NativeTree  # the same contract
