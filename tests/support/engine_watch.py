"""A runner that looks over an engine's shoulder.

What is written where, what is read, and the logits of every row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from appo.rollout.native.tree.block_list import BLOCK
from appo.rollout.native.tree.layout import Layout


class Watch:
    """Stands between an engine and its runner.

    Before a forward, memory that nobody owns and blocks just taken are filled with NaN: what reads
    them is not finite. After it, the KV of all blocks must be bit for bit what it was, but for the
    rows' own slots, each in a block of the row's node. With `keep`, logits of every row are kept by
    (node, own position).
    """

    def __init__(self, engine, keep: bool = False):
        self.engine, self.inner, self.keep = engine, engine.runner, keep
        self.model, self.pool = self.inner.model, self.inner.pool
        self.logits: dict[tuple[int, int], Tensor] = {}
        engine.runner = self

    def weights_changed(self) -> None:
        self.inner.weights_changed()

    def idle(self) -> None:
        self.inner.idle()

    def forward(self, layout: Layout, rows: Tensor | None) -> Tensor:
        slots = layout.slots[layout.slots >= 0]
        taken = (slots[slots % BLOCK == 0] // BLOCK).tolist()  # nothing was written there before
        self.pool.fill_nan(self.engine.tree.free_blocks() + taken)
        self._check_owners(layout)
        before = self._bits()
        hidden = self.inner.forward(layout, rows)
        changed = (self._bits() != before).any(-1).any(0)  # [positions]
        changed[slots] = False
        assert not changed.any(), f"slots {changed.nonzero()[:, 0].tolist()} were overwritten"
        assert hidden.isfinite().all(), "something was read that is not there"
        if self.keep:
            self._keep(layout, hidden, rows)
        return hidden

    def _check_owners(self, layout: Layout) -> None:
        assert len(set(layout.slots.tolist()) - {-1}) == (layout.slots >= 0).sum(), "two writers"
        for node, (row, _, count) in layout.rows_of.items():
            slots = layout.slots[row : row + count]
            blocks = set((slots[slots >= 0] // BLOCK).tolist())
            foreign = blocks - set(self.engine.tree.blocks_of(node))
            assert not foreign, f"node {node} writes to blocks {foreign} of others"

    def _bits(self) -> Tensor:
        """[layers * 2 * heads, positions, D] of every block that may be in use, as integers."""
        blocks = range(self.engine.tree.span)
        kv = self.pool.read(blocks, len(blocks) * BLOCK).flatten(0, 2)
        return kv.view(torch.int16 if kv.element_size() == 2 else torch.int32)

    def _keep(self, layout: Layout, hidden: Tensor, rows: Tensor | None) -> None:
        every = self.inner.forward(layout, None)[: len(layout.ids)]
        chosen = every if rows is None else every[rows]
        torch.testing.assert_close(hidden[: len(chosen)], chosen)
        logits = self.model.logits(every).float()
        for node, (row, start, count) in layout.rows_of.items():
            for i in range(count):
                self.logits[node, start + i] = logits[row + i]

    def along(self, seq: int) -> Tensor:
        """Logits of positions 0 … length-2 of a sequence, as they were when the rows were run.

        [length - 1, V].
        """
        *path, (leaf, own) = self.engine.tree.path(seq)
        nodes = [*path, (leaf, own - 1)]
        return torch.stack([self.logits[node, i] for node, count in nodes for i in range(count)])
