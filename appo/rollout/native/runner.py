"""Runs the rows of a Layout through the model.

Their KV goes into the pool, hidden states come back.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from appo.errors import EngineError
from appo.rollout.native.attention.attention import segment_attention_torch
from appo.rollout.native.attention.pool import KVPool
from appo.rollout.native.attention.segments import segment_attention
from appo.rollout.native.model.model import Model
from appo.rollout.native.tree.layout import Layout

# deterministic PyTorch: rows are padded to a multiple of this (products of 1-3 rows take another
# path)
BUCKET = 8


class Runner(Protocol):
    """What the engine needs of a device.

    The pool has room for every block of a layout (the engine saw to that).
    """

    model: Model
    pool: KVPool

    def forward(self, layout: Layout, rows: Tensor | None) -> Tensor:
        """Run a layout; → final hidden states, normed, of `rows` (None: all), [R, d].

        Padding may follow below.
        """

    def weights_changed(self) -> None:
        """The model's weights are others now."""

    def idle(self) -> None:
        """No block is in use: memory may be given back."""


class HostRunner:
    """On the CPU: the model in C++ where it can run, else in PyTorch.

    PyTorch's attention is the C++ one or its definition.
    """

    def __init__(self, model: Model, pool: KVPool, deterministic: bool):
        self.model, self.pool, self.deterministic = model, pool, deterministic

    def forward(self, layout: Layout, rows: Tensor | None) -> Tensor:
        """Run a layout's rows and fill their KV; → hidden states of `rows` (None: of all)."""
        if self.model.native is not None:
            return self.model.native.forward(self.model, layout, self.pool, rows)
        bucket = BUCKET if self.deterministic else 1
        ids, positions = _padded(layout.ids, bucket), _padded(layout.positions, bucket)
        m, c = len(layout.ids), self.model.config
        out = torch.zeros(len(ids), c.heads, c.head_dim, dtype=self.model.dtype)

        def attention(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            self._attend(q[:m], k[:m], v[:m], layout, layer, out[:m])
            return out.view(len(ids), -1)

        wanted = None if rows is None else _padded(rows, bucket)
        return self.model.forward(ids, positions, attention, wanted)

    def weights_changed(self) -> None:
        """Nothing is kept of them here."""

    def idle(self) -> None:
        """No block is in use: give back all memory of the pool."""
        self.pool.trim(0)

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, layout: Layout, layer: int, out: Tensor
    ) -> None:
        if self.pool.layout == "packed":
            segment_attention(q, k, v, layout, self.pool, layer, out)
        elif not self.deterministic:
            segment_attention_torch(q, k, v, layout, self.pool, layer, out)
        else:  # the definition's products depend on what else they are given: one row at a time
            self.pool.write(layer, k, v, layout.slots)
            for i, one in enumerate(_rows(layout)):
                row = slice(i, i + 1)
                segment_attention_torch(q[row], k[row], v[row], one, self.pool, layer, out[row])


@dataclass
class _Row:
    """The reads of a single row, see `segments.Reads`; nothing is written."""

    slots: Tensor
    segments: Tensor
    blocks: Tensor
    reads: Tensor
    limits: Tensor


def _rows(layout: Layout) -> list[_Row]:
    segments: list[list[int]] = [[] for _ in layout.ids]
    limits: list[list[int]] = [[] for _ in layout.ids]
    for segment, a, b, start in layout.reads.tolist():
        for row in range(a, b):
            segments[row].append(segment)
            limits[row].append(int(layout.limits[start + row - a]))
    none = torch.tensor([-1])
    return [
        _Row(
            none,
            layout.segments,
            layout.blocks,
            torch.tensor([[s, 0, 1, i] for i, s in enumerate(read)]),
            torch.tensor(counts),
        )
        for read, counts in zip(segments, limits)
    ]


def _padded(x: Tensor, bucket: int) -> Tensor:
    """x[n] with zeros up to a multiple of the bucket."""
    return F.pad(x, (0, -len(x) % bucket))


def make_runner(
    model: Model, deterministic: bool, device: bool, limit: int | None = None
) -> Runner:
    """The runner and pool of a model.

    device   the Triton runner, also where the model is not on a GPU (tests)
    limit    blocks that the tree may use
    """
    c = model.config
    shape = (c.layers, c.kv_heads, c.head_dim, model.dtype, model.device)
    if not device and model.device.type == "cpu":
        return HostRunner(model, KVPool(*shape, limit=limit), deterministic)
    try:
        from appo.rollout.native.device.device import DeviceRunner
    except ImportError as error:  # no Triton; it says what to install
        raise EngineError(f"runner='device': {error}") from error
    pool = KVPool(*shape, layout="plain", limit=limit)
    return DeviceRunner(model, pool, deterministic=deterministic)
