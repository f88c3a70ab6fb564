"""The tables of one pass on the device: one transfer from pinned memory into one buffer.

Sizes are rounded up to few shapes and a table's place follows from the shape, so a pass of the same
shape finds every table where the last one had it: what a captured CUDA graph needs. Padding does
nothing: rows without reads that are written nowhere, items without rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from appo._kernels.segment_attention.gpu.segments import Tables
from appo._kernels.segment_attention.gpu.work import COLUMNS, Work
from appo.rollout.native.tree.layout import Layout

BLOCKS = 4  # the block table has room for so many blocks per entry of the other tables
START = 1 << 16  # numbers in the first buffer
ROWS = ("ids", "positions", "slots", "starts")  # have an entry for every row, padding included


@dataclass(frozen=True)
class TableShape:
    """Sizes of the tables of a pass.

    rows   padded ones
    size   entries of each table that grows with what the rows read: rows · a power of two
    """

    rows: int
    size: int

    @classmethod
    def fitting(cls, rows: int, pass_work: Work, blocks: int) -> TableShape:
        """The smallest shape for `rows` padded rows that holds a pass and its `blocks`."""
        longest = max(
            len(pass_work.tall),
            len(pass_work.low),
            len(pass_work.limits),
            pass_work.partials,
            -(-blocks // BLOCKS),
        )
        size = rows
        while size < longest:
            size *= 2
        return cls(rows, size)

    def sections(self) -> dict[str, int]:
        """Name and length of every table, in their order."""
        rows = dict.fromkeys(("ids", "positions", "slots", "out"), self.rows)
        items = dict.fromkeys(("tall", "low"), self.size * len(COLUMNS))
        lists = {"limits": self.size, "entries": self.size, "blocks": BLOCKS * self.size}
        return rows | {"starts": self.rows + 1} | items | lists


@dataclass(frozen=True)
class Inputs:
    """What a pass over `rows` rows is given, int64 on the device.

    out: the rows whose hidden states are wanted.
    """

    ids: Tensor
    positions: Tensor
    slots: Tensor
    out: Tensor
    tables: Tables
    partials: int


class Stage:
    """The two buffers. `put` waits until the transfer before it is done, no more."""

    def __init__(self, device: torch.device):
        self.device = device
        self._copied = torch.cuda.Event() if device.type == "cuda" else None
        self._allocate(START)

    def _allocate(self, numbers: int) -> None:
        pinned = self._copied is not None
        self.host = torch.zeros(numbers, dtype=torch.int64, pin_memory=pinned)
        self.buffer = torch.zeros_like(self.host, device=self.device) if pinned else self.host

    def put(
        self, shape: TableShape, layout: Layout, first: int, last: int, pass_work: Work, out: Tensor, trim: bool
    ) -> Inputs:  # fmt: skip
        """Rows first … last-1 of a layout. out: rows wanted, counted from `first`.

        trim: of what is padded, show the rows alone; for a pass that is not captured.
        """
        sections = shape.sections()
        if self._copied is not None:
            self._copied.synchronize()
        if sum(sections.values()) > len(self.host):
            self._allocate(2 * sum(sections.values()))
        rows = slice(first, last)
        given = {
            "ids": layout.ids[rows],
            "positions": layout.positions[rows],
            "slots": layout.slots[rows],
            "out": out,
            "starts": pass_work.starts,
            "tall": pass_work.tall.view(-1),
            "low": pass_work.low.view(-1),
            "limits": pass_work.limits,
            "entries": pass_work.entries,
            "blocks": layout.blocks,
        }
        padding = {"slots": -1, "starts": int(pass_work.starts[-1])}
        at, views = 0, {}
        for name, size in sections.items():
            have = len(given[name])
            self.host[at : at + have] = given[name]
            self.host[at + have : at + size] = padding.get(name, 0)
            show = have if trim and name not in ROWS else size
            views[name] = self.buffer[at : at + show]
            at += size
        if self._copied is not None:
            self.buffer[:at].copy_(self.host[:at], non_blocking=True)
            self._copied.record()
        tall, low = (views[name].view(-1, len(COLUMNS)) for name in ("tall", "low"))
        lists = (views[name] for name in ("blocks", "limits", "starts", "entries"))
        return Inputs(
            ids=views["ids"],
            positions=views["positions"],
            slots=views["slots"],
            out=views["out"],
            tables=Tables(tall, low, *lists),
            partials=pass_work.partials if trim else shape.size,
        )
