"""One forward pass laid out: which rows, where their KV goes, which blocks they read.

No tensors of the model here.

Rows stand in depth-first order of the tree (an ancestor's rows before its descendants', siblings by
where they leave their parent, then by age), so the readers of any segment are neighbours and it is
read once for all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from appo.rollout.native.tree.block_list import blocks_for
from appo.rollout.native.tree.node import SegmentNode


@dataclass(eq=False)
class Layout:
    """All tables are int64 on the CPU; M rows, S segments.

    A layout is open until it is committed or aborted.

    ids, positions   [M] token and absolute position of each row
    slots            [M] block * 16 + offset where the row's KV goes; -1: it is there already,
                     nothing is written
    segments         [S, 2] first index into `blocks`, positions that may be read
    blocks           block ids, segment after segment, 16 positions each
    reads            [R, 4] segment, first row, last row + 1, start in `limits`; a row's reads in
                     path order, root first
    limits           how many positions of the segment each of these rows reads
    out_rows, seqs   [n] rows whose next token is to be sampled, ascending, and the sequences they
                     belong to
    rows_of          node → (first row, first own position, count)
    decode_rows      rows of sequences that lacked just one; prefill_rows: all others
    """

    ids: Tensor
    positions: Tensor
    slots: Tensor
    segments: Tensor
    blocks: Tensor
    reads: Tensor
    limits: Tensor
    out_rows: Tensor
    seqs: list[int]
    rows_of: dict[int, tuple[int, int, int]]
    decode_rows: int
    prefill_rows: int


@dataclass
class RowRange:
    """Run own positions start … start + count - 1 of a node."""

    node: SegmentNode
    start: int
    count: int
    sampled: int | None = None  # the sequence that gets a token from the last row


def lay_out(ranges: Sequence[RowRange], decode_rows: int) -> Layout:
    """The tables of a set of ranges, at most one per node.

    Blocks for what they write have been taken.
    """
    ranges = sorted(ranges, key=lambda u: _order(u.node))
    ids: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    rows_of: dict[int, tuple[int, int, int]] = {}
    sampled: list[tuple[int, int]] = []
    readers: dict[int, tuple[SegmentNode, int, list[int]]] = {}  # node → itself, first row, limits
    for u in ranges:
        node, row, own = u.node, len(ids), range(u.start, u.start + u.count)
        for ancestor, count in [*node.chain()][::-1]:
            readers.setdefault(ancestor.id, (ancestor, row, []))[2].extend([count] * u.count)
        readers.setdefault(node.id, (node, row, []))[2].extend(i + 1 for i in own)
        rows_of[node.id] = row, u.start, u.count
        ids += node.tokens[u.start : u.start + u.count]
        positions += [node.base + i for i in own]
        slots += [-1 if i < node.kv else node.slot(i) for i in own]
        if u.sampled is not None:
            sampled.append((len(ids) - 1, u.sampled))

    segments: list[tuple[int, int]] = []
    reads: list[tuple[int, int, int, int]] = []
    blocks: list[int] = []
    limits: list[int] = []
    for node, first, counts in readers.values():
        longest = max(counts)
        reads.append((len(segments), first, first + len(counts), len(limits)))
        segments.append((len(blocks), longest))
        blocks += node.blocks[: blocks_for(longest)]
        limits += counts
    return Layout(
        ids=_table(ids),
        positions=_table(positions),
        slots=_table(slots),
        segments=_table(segments).view(-1, 2),
        blocks=_table(blocks),
        reads=_table(reads).view(-1, 4),
        limits=_table(limits),
        out_rows=_table([row for row, _ in sampled]),
        seqs=[seq for _, seq in sampled],
        rows_of=rows_of,
        decode_rows=decode_rows,
        prefill_rows=len(ids) - decode_rows,
    )


def _table(values: Sequence[int] | Sequence[tuple[int, ...]]) -> Tensor:
    return torch.tensor(values, dtype=torch.int64)


def _order(node: SegmentNode) -> list[tuple[int, int]]:
    path = [(node.base, node.id)] + [(a.base, a.id) for a, _ in node.chain()]
    return path[::-1]
