"""The work list of segment attention: which program streams which keys for which rows.

Plain integers, no GPU needed.

A read (rows a … b-1 of a segment) is cut into tiles of rows and into splits of its keys. Each
(tile, split) is an item: one program per key head streams the keys of the split once for all rows
of the tile and leaves a partial result for each of them; the partials of a row are then merged in
the order of its path. A prefix that many rows share is hence read once per tile of rows, not once
per row. Splits start at multiples of their length, counted from the segment's own start.

Two heights of tile: a read with more (row, head) pairs than a low tile holds takes tall ones.
`deterministic` takes one height and one length of split for all, so a row's bits depend on its
query and its own (segment, count) list alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# What an item is, in this order; an item with 0 rows does nothing.
COLUMNS = (
    "first",  # index into the block table of the segment's first block
    # keys: every row that counts reads start … full-1, none reads end or further
    "start", "full", "end",
    "row", "rows",  # query rows
    "limits",  # index of the first row's limit
    "partial",  # number of the first row's partial result
)  # fmt: skip
SPLITS = (
    2048,
    1024,
    512,
    256,
)  # keys per split, longest first: fewest partials that still fill the device
FIXED_SPLIT = 512
_END = torch.iinfo(torch.int64).max


@dataclass(frozen=True)
class Cut:
    """What decides how work is cut.

    group: query heads per key head. heights: pairs of a tall and of a low tile.
    """

    group: int
    kv_heads: int
    heights: tuple[int, int]
    processors: int
    deterministic: bool

    def rows(self, height: int) -> int:
        """Query rows of a tile; one row if even its heads do not fit.

        They are then cut, see attend.py.
        """
        return max(1, height // self.group)


@dataclass(frozen=True)
class Work:
    """Items of both heights, limits[·] as their columns index them, and the partials to merge.

    Those of row i are entries[starts[i]] … entries[starts[i+1] - 1]. partials: how many there are
    room for. split: keys per split. Tables are int64 on the CPU.
    """

    tall: Tensor  # [·, 8]
    low: Tensor  # [·, 8]
    limits: Tensor
    starts: Tensor  # [rows + 1]
    entries: Tensor
    partials: int
    split: int

    def keys_read(self) -> int:
        """Positions of which some program reads the keys and values (of one key head)."""
        return sum(int((t[:, 3] - t[:, 1]).sum()) for t in (self.tall, self.low))


def work(
    segments: Tensor,
    reads: Tensor,
    limits: Tensor,
    rows: tuple[int, int],
    cut: Cut,
    extra: Tensor | None = None,
) -> Work:
    """The items of rows[0] … rows[1]-1 of a layout, in which row rows[0] is number 0.

    segments [S, 2], reads [R, 4], limits [·] as a Layout has them. extra [·]: rows (numbered in the
    same way) that bring a partial of their own, from elsewhere: extra[i]'s is number partials -
    len(extra) + i, merged after its others.
    """
    first, last = rows
    tiles = _tiles(reads, limits, first, last, cut)
    split = FIXED_SPLIT if cut.deterministic else _split(tiles.max_limit, cut)
    # A tile that reads n keys of its segment makes ceil(n / split) items.
    pieces = -(-tiles.max_limit // split)
    tile, piece = _spread(pieces)
    start = piece * split
    end = torch.minimum(start + split, tiles.max_limit[tile])
    full = torch.minimum(torch.maximum(tiles.min_limit[tile], start), end)
    count = tiles.rows[tile]
    items = torch.stack(
        [
            segments[tiles.segment[tile], 0], start, full, end,
            tiles.row[tile] - first, count, tiles.limits[tile], _before(count),
        ], dim=1,
    )  # fmt: skip
    tall = tiles.tall[tile]

    # Whose partial is it, and does that row read any key of the split?
    item, inside = _spread(count)
    keep = tiles.limit[items[item, 6] + inside] > start[item]
    owner, entry = (items[item, 4] + inside)[keep], torch.arange(len(item))[keep]
    partials = len(item)
    if extra is not None:
        owner = torch.cat([owner, extra])
        entry = torch.cat([entry, torch.arange(partials, partials + len(extra))])
        partials += len(extra)
    starts = torch.zeros(last - first + 1, dtype=torch.int64)
    torch.cumsum(torch.bincount(owner, minlength=last - first), 0, out=starts[1:])
    order = torch.argsort(owner, stable=True)
    return Work(items[tall], items[~tall], tiles.limit, starts, entry[order], partials, split)


@dataclass
class _Tiles:
    """The tiles of a pass.

    Per tile: segment, first row, rows, where its limits start, largest limit, smallest one above 0,
    height. limit: of every row of every tile, tile by tile.
    """

    segment: Tensor
    row: Tensor
    rows: Tensor
    limits: Tensor
    max_limit: Tensor
    min_limit: Tensor
    tall: Tensor
    limit: Tensor


def _tiles(reads: Tensor, limits: Tensor, first: int, last: int, cut: Cut) -> _Tiles:
    a, b = reads[:, 1].clamp(min=first), reads[:, 2].clamp(max=last)
    some = a < b
    reads, a, b = reads[some], a[some], b[some]
    tall = ((b - a) * cut.group > cut.heights[1]) | cut.deterministic
    high, low = (cut.rows(height) for height in cut.heights)
    max_rows = torch.where(tall, high, low)
    read, number = _spread(-(-(b - a) // max_rows))
    row = a[read] + number * max_rows[read]
    rows = torch.minimum(max_rows[read], b[read] - row)
    tile, inside = _spread(rows)
    limit = limits[(reads[:, 3] - reads[:, 1])[read[tile]] + row[tile] + inside]
    max_limit = torch.zeros_like(rows).scatter_reduce_(0, tile, limit, "amax")
    above = torch.where(limit > 0, limit, _END)
    min_limit = torch.full_like(rows, _END).scatter_reduce_(0, tile, above, "amin")
    return _Tiles(reads[read, 0], row, rows, _before(rows), max_limit, min_limit, tall[read], limit)


def _split(max_limit: Tensor, cut: Cut) -> int:
    """The longest split that gives every processor two programs; the shortest if none does."""
    for split in SPLITS[:-1]:
        if int((-(-max_limit // split)).sum()) * cut.kv_heads >= 2 * cut.processors:
            return split
    return SPLITS[-1]


def _before(count: Tensor) -> Tensor:
    """[0, count₀, count₀+count₁, …], as long as count."""
    return count.cumsum(0) - count


def _spread(count: Tensor) -> tuple[Tensor, Tensor]:
    """i repeated countᵢ times, for all i in turn.

    And the number of each repetition: 0 … countᵢ-1.
    """
    owner = torch.repeat_interleave(count)
    return owner, torch.arange(len(owner)) - _before(count)[owner]
