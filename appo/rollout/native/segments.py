"""Attention over lists of KV segments in native code: each shared segment is read once for all rows below it.

A `Plan` says which rows read how much of which segments; `attend_segments` runs it for one layer. The definition is
attention.py (`attend` per segment, then `merge`); here the statistics of the softmax are carried from segment to
segment instead, so there is nothing to merge.

The bits of a row depend on its query and on its own list of (segment, count) alone: not on the rows beside it, on how
they are grouped, or on the number of threads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from appo.kernels import native

if TYPE_CHECKING:
    from appo.rollout.native.batch import Unit
    from appo.rollout.native.kv import KVStore
    from appo.rollout.native.tree import Node

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def available(dtype: torch.dtype, head_dim: int, device: torch.device) -> bool:
    """Whether the native code is there and takes this cache."""
    isa = native.function("linear_isa")
    return (
        isa is not None
        and bool(isa())
        and device.type == "cpu"
        and dtype in _DTYPES
        and head_dim <= 256
    )


@dataclass
class Plan:
    """Reads and writes of one batch. Add everything, then `freeze`; `advance` moves a decode step on by one token.

    Tables as the native code takes them, int64, strides in elements:
    segments  address of K at layer 0, head 0, position 0 · layer stride · from K to V · head stride · token stride ·
              positions
    reads     segment · first row · last row + 1 · where their limits start; a row's reads in the order of its path
    limits    how many positions a row reads (0: none)
    writes    row of k and v · segment · position
    """

    segments: list[tuple[int, ...]] = field(default_factory=list)
    reads: list[tuple[int, ...]] = field(default_factory=list)
    limits: list[int] = field(default_factory=list)
    writes: list[tuple[int, ...]] = field(default_factory=list)
    kept: list[Tensor] = field(default_factory=list)  # what the addresses point into

    def segment(self, kv: Tensor) -> int:
        """Register kv[L, 2, Hkv, positions, D] (a view with neighbouring D); → its number."""
        if kv.dim() != 5 or kv.shape[1] != 2 or kv.stride(4) != 1:
            raise ValueError(
                f"a segment has shape {tuple(kv.shape)} and strides {kv.stride()}; "
                "expected [L, 2, Hkv, positions, D] with D contiguous"
            )
        if self.kept and _like(kv) != _like(self.kept[0]):
            raise ValueError(
                f"a segment has (layers, heads, head dimension, dtype) {_like(kv)}, "
                f"those before it have {_like(self.kept[0])}"
            )
        self.kept.append(kv)
        self.segments.append((kv.data_ptr(), *kv.stride()[:4], kv.shape[3]))
        return len(self.segments) - 1

    def read(self, segment: int, first_row: int, limits: Sequence[int]) -> int:
        """Rows first_row, … read the first limits[i] positions; → where their limits start."""
        start = len(self.limits)
        self.limits += limits
        self.reads.append((segment, first_row, first_row + len(limits), start))
        return start

    def write(self, row: int, segment: int, position: int) -> None:
        """k and v of `row` become `position` of the segment, before anything is read."""
        self.writes.append((row, segment, position))

    def freeze(self, growing: Sequence[int] = ()) -> Frozen:
        """The tables as tensors. `growing`: the limits that grow by one with every `advance`, as positions do."""
        if not self.kept:
            raise ValueError("a plan needs at least one segment")
        return Frozen(
            torch.tensor(self.segments, dtype=torch.int64).view(-1, 6),
            torch.tensor(self.reads, dtype=torch.int64).view(-1, 4),
            torch.tensor(self.limits, dtype=torch.int64),
            torch.tensor(self.writes, dtype=torch.int64).view(-1, 3),
            torch.tensor(growing, dtype=torch.int64),
            self.kept,
        )


def _like(kv: Tensor) -> tuple[int, int, int, torch.dtype]:
    return kv.shape[0], kv.shape[2], kv.shape[4], kv.dtype


@dataclass
class Frozen:
    """A plan that can be run."""

    segments: Tensor
    reads: Tensor
    limits: Tensor
    writes: Tensor
    growing: Tensor
    kept: list[Tensor]

    def __post_init__(self) -> None:
        self.layers, *self.like = _like(self.kept[0])
        self._one = torch.ones(len(self.growing), dtype=torch.int64)

    def advance(self) -> None:
        """Every row writes one position further and reads one more of its own segment."""
        self.limits.index_add_(0, self.growing, self._one)
        self.writes[:, 2] += 1


def attend_segments(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: Frozen,
    layer: int,
    out: Tensor,
    *,
    tile_rows: int = 0,
    isa: str = "",
    threads: int | None = None,
) -> None:
    """Write k, v[M,Hkv,D] into place, then out[M,Hq,D] = attention of q[M,Hq,D] over each row's segments.

    q, k, v    any stride between rows; float32, bfloat16 or float16 (multiplied as float32), as the segments are
    out        contiguous; zeros for a row that reads nothing
    tile_rows  query rows (rows x query heads per key head) that share a pass over a segment; 0: the default
    isa        "" picks the best; "avx512_bf16" | "avx512" | "avx2" insists
    threads    upper bound (default torch's); neither it nor tile_rows changes a bit
    Scores are scaled by 1/sqrt(D). Statistics and sums are float32; with bfloat16 the weights are rounded to it, and sum
    to 1 as rounded. NaN or infinite keys and values reach the rows that read them, no others.
    Raises ValueError for shapes and plans that do not fit, TypeError for dtypes.
    """
    if [*k.shape[1:], k.dtype] != plan.like or not 0 <= layer < plan.layers:
        raise ValueError(
            f"layer {layer} and k of shape {tuple(k.shape)}, {k.dtype}; the segments have {plan.layers} layers and "
            f"(heads, head dimension, dtype) {tuple(plan.like)}"
        )
    most = torch.get_num_threads() if threads is None else threads
    native.function("attend_segments", "cpu")(
        q, k, v, plan.segments, plan.reads, plan.limits, plan.writes, layer, out, tile_rows, isa, most
    )  # fmt: skip


def lay_out(units: Sequence[Unit], first_row: dict[int, int], store: KVStore) -> Frozen:
    """The plan of a batch: every row reads the segments on its path, root first, and its own up to itself.

    A segment is one read, from its first reader to its last, however many rows inherit how much of it. What a node in
    the slab holds as a copy of an ancestor is a segment of its own with the ancestor's bounds, so a copy leaves the
    cuts, hence the bits, as they were.
    """
    plan = Plan()
    readers: dict[int, list[tuple[int, Sequence[int]]]] = {}  # node → (first row, limits)
    nodes: dict[int, tuple[int, Node]] = {}  # node → (depth, node)
    reads: list[tuple[int, int, int, list[int]]] = []  # depth, segment, first row, limits
    for u in units:
        row, node = first_row[u.node.id], u.node
        chain = list(node.chain())[::-1]
        for depth, (ancestor, count) in enumerate(chain):
            if u.single and ancestor.base >= node.local:
                copy = store.slab[:, :, node.slot, :, node.off + ancestor.base - node.base :]
                reads.append((depth, plan.segment(copy), row, [count]))
            else:
                readers.setdefault(ancestor.id, []).append((row, [count] * u.count))
                nodes[ancestor.id] = depth, ancestor
        own = range(u.start + 1, u.start + u.count + 1)
        readers.setdefault(node.id, []).append((row, own))
        nodes[node.id] = len(chain), node

    number = {}
    for i, (depth, node) in nodes.items():
        number[i] = plan.segment(store.whole(node))
        first = min(row for row, _ in readers[i])
        limits = [0] * (max(row + len(some) for row, some in readers[i]) - first)
        for row, some in readers[i]:
            limits[row - first : row - first + len(some)] = some
        reads.append((depth, number[i], first, limits))
    starts = {}
    for _, segment, first, limits in sorted(reads, key=lambda r: r[0]):
        starts[segment] = plan.read(segment, first, limits) - first

    growing = []
    for u in units:
        row, segment = first_row[u.node.id], number[u.node.id]
        for i in range(0 if u.single else max(u.node.kv - u.start, 0), u.count):
            plan.write(row + i, segment, u.start + i)
        if u.single:
            growing.append(starts[segment] + row)
    return plan.freeze(growing)
