"""Runs layouts on a GPU.

PyTorch's layers, with attention and KV writes in Triton over a plain block pool.

    tables → one pinned transfer → embedding, layers (kv_write, attend, merge each), final norm → hidden states

What a decode step launches is captured in a CUDA graph, per bucket of rows and of table sizes:
everything between the transfer of the tables and the hidden states. The output head and the draw
are the sampler's, and chunks of prompts, whose shapes seldom return, run as they are.

No tail block is ever copied, and there is no kernel for it: a fork starts in a block of its own and
reads the parent's last one up to a limit, since our kernels take (segment, limit) lists, and
flash-attn gets the chunk itself. Only a kernel that wants one flat block table per sequence would
need the copy.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from appo._kernels.common.gpu import launch
from appo._kernels.segment_attention.gpu.kv_write import kv_write
from appo._kernels.segment_attention.gpu.segments import (
    heights,
    segment_attention,
    unavailable,
    workspace,
)
from appo._kernels.segment_attention.gpu.work import Cut, work
from appo.errors import EngineError
from appo.rollout.native.attention import flash as flash_attn
from appo.rollout.native.attention.pool import KVPool
from appo.rollout.native.device.device_tables import Inputs, Stage, TableShape
from appo.rollout.native.device.graphs import Graphs
from appo.rollout.native.model.model import Model
from appo.rollout.native.tree.layout import Layout

# Deterministic mode: every pass has exactly so many rows, since a library may sum a product of
# another height in another order. Rows beyond come in further passes; a row reads the KV of rows
# before it only.
FIXED_ROWS = 64
MAX_ROWS = 2048  # per pass otherwise: bounds the workspace of partial results
BUCKETS: tuple[int, ...] = (
    1,
    2,
    4,
    *range(8, 65, 8),
    *range(96, 257, 32),
)  # decode rows of a graph


class DeviceRunner:
    """See `runner.Runner`. Also runs on a CPU in Triton's interpreter, without graphs: for tests.

    flash    True: causal parts of long chunks by flash-attn, EngineError where it cannot; None:
             where it can; False: never. Deterministic mode never takes it: where a chunk ends would
             show in the bits
    graphs   capture decode steps
    """

    def __init__(
        self,
        model: Model,
        pool: KVPool,
        deterministic: bool,
        flash: bool | None = None,
        graphs: bool = True,
    ):
        c = model.config
        if (reason := unavailable(model.dtype, c.head_dim, model.device)) is not None:
            raise EngineError(f"runner='device': {reason}")
        if pool.layout != "plain":
            raise EngineError(
                f"runner='device' needs a pool of layout 'plain', not {pool.layout!r}"
            )
        if flash and deterministic:
            raise EngineError(
                "flash=True: deterministic mode has one way of cutting work; leave it out"
            )
        self.model, self.pool, self.deterministic = model, pool, deterministic
        self.flash = flash_attn.find(
            False if deterministic else flash, model.dtype, c.head_dim, model.device
        )
        self.graphs = Graphs(model.device, graphs)
        self.stage = Stage(model.device)
        self.cut = Cut(
            c.heads // c.kv_heads,
            c.kv_heads,
            heights(model.dtype, model.device),
            launch.processors(model.device),
            deterministic,
        )

    def weights_changed(self) -> None:
        """Drop the graphs: they were captured with the weights before."""
        self.graphs.clear()

    def idle(self) -> None:
        """No block is in use: drop the graphs and all memory of the pool."""
        self.graphs.clear()
        self.pool.trim(0)

    def forward(self, layout: Layout, rows: Tensor | None) -> Tensor:
        """Hidden states of `rows` (ascending; None: all), on the device.

        Deterministic: zeros up to a multiple of 64.

        Valid until the next call.
        """
        total = len(layout.ids)
        wanted = torch.arange(total) if rows is None else rows
        step = FIXED_ROWS if self.deterministic else MAX_ROWS
        parts = []
        for first in range(0, total, step):
            last = min(first + step, total)
            here = wanted[(first <= wanted) & (wanted < last)] - first
            hidden = self._pass(layout, first, last, here)
            # A graph's result lives in the graph: the next pass may overwrite it.
            parts.append(hidden if total <= step else hidden.clone())
        hidden = parts[0] if len(parts) == 1 else torch.cat(parts)
        if self.deterministic:
            hidden = F.pad(hidden, (0, 0, 0, -len(hidden) % FIXED_ROWS))
        return hidden

    def _pass(self, layout: Layout, first: int, last: int, out: Tensor) -> Tensor:
        """Rows first … last-1; → hidden states of the rows `out` (counted from first), [n, d]."""
        rows = self._rows(layout, last - first)
        chunks = None if self.flash is None else flash_attn.chunks(layout, first, last)
        pass_work = work(
            layout.segments,
            layout.reads,
            layout.limits if chunks is None else chunks.limits,
            (first, last),
            self.cut,
            None if chunks is None else chunks.rows,
        )
        captured = rows is not None and self.graphs.why_not is None
        shape = TableShape.fitting(rows or last - first, pass_work, len(layout.blocks))
        given = self.stage.put(shape, layout, first, last, pass_work, out, trim=not captured)
        # Sizes too: grown memory may lie where smaller memory did before, and its parts lie
        # elsewhere in it.
        arena, buffer = self.pool.arena, self.stage.buffer
        self.graphs.keep(arena.data_ptr(), self.pool.blocks, buffer.data_ptr(), len(buffer))
        if not captured:
            return self._run(given, None if chunks is None else chunks.on(self.model.device))
        return self.graphs.run(shape, lambda: self._run(given, None))[: len(out)]

    def _rows(self, layout: Layout, rows: int) -> int | None:
        """How many rows a pass is padded to so that its shape comes again.

        None: it is run as it is.
        """
        if self.deterministic:
            return FIXED_ROWS
        if layout.prefill_rows or rows > BUCKETS[-1]:
            return None
        return next(bucket for bucket in BUCKETS if bucket >= rows)

    def _run(self, given: Inputs, causal: flash_attn.Causal | None) -> Tensor:
        c, rows = self.model.config, len(given.ids)
        o, lse = workspace(given.partials, c.heads, c.head_dim, self.model.device)
        out = torch.empty(rows, c.heads, c.head_dim, dtype=self.model.dtype, device=o.device)

        def attention(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            keys, values = self.pool.arena[layer]
            kv_write(k, v, given.slots, keys, values)
            if causal is not None:
                assert self.flash is not None, "only flash-attn takes causal parts"
                causal.attend(self.flash, q, k, v, o, lse)
            segment_attention(q, keys, values, given.tables, o, lse, out)
            return out.view(rows, -1)

        return self.model.forward(given.ids, given.positions, attention, given.out)
