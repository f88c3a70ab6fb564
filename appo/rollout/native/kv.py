"""Where the KV of tree nodes is kept, and how much of it there is.

Two homes. A *slab* [L, 2, slots, Hkv, capacity, D]: every running sequence has a slot, so that the private parts of all
rows are attended in one padded call. A *block* [L, 2, Hkv, n, D] per node for what does not decode: prompts, and
stopped sequences whose slot was needed. KV is written once and never moves at a fork; it moves when a node starts
decoding from a block, is evicted from its slot, or outgrows its capacity (doubling: amortised O(1) per token).
"""

from __future__ import annotations

import torch
from torch import Tensor

from appo.rollout.native import segments
from appo.rollout.native.tree import Node

FIRST_CAPACITY = 128  # tokens per slot of the first slab


class KVStore:
    """Keys and values of all nodes. `epoch` changes whenever an address changed, so plans know they are old.

    `native`: attention over them runs in C++ (segments.py); set it to False for the PyTorch definition.
    """

    def __init__(
        self,
        layers: int,
        kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
        max_slots: int,
    ):
        self.layers, self.kv_heads, self.head_dim = layers, kv_heads, head_dim
        self.dtype, self.device, self.max_slots = dtype, device, max_slots
        self.native = segments.available(dtype, head_dim, device)
        self.slab = self._new_slab(0, FIRST_CAPACITY)
        self.owner: list[Node | None] = []
        self.tokens = 0  # own positions with KV, over all nodes: each counted once
        self.block_tokens = 0  # capacity of all blocks
        self.epoch = 0

    @property
    def capacity(self) -> int:
        return self.slab.shape[4]

    @property
    def bytes(self) -> int:
        per_token = self.layers * 2 * self.kv_heads * self.head_dim * self.slab.element_size()
        return self.slab.numel() * self.slab.element_size() + self.block_tokens * per_token

    def view(self, node: Node, start: int, stop: int) -> Tensor:
        """The KV of own positions start … stop-1: a view [L, 2, Hkv, stop - start, D]."""
        if node.slot >= 0:
            return self.slab[:, :, node.slot, :, node.off + start : node.off + stop]
        assert node.block is not None
        return node.block[:, :, :, start:stop]

    def whole(self, node: Node) -> Tensor:
        """All the room of a node for own positions: a view [L, 2, Hkv, room, D]."""
        if node.slot >= 0:
            return self.slab[:, :, node.slot, :, node.off :]
        assert node.block is not None
        return node.block

    def written(self, node: Node, count: int, version: int) -> None:
        """Account for `count` own positions having KV now."""
        if count > node.kv:
            self.tokens += count - node.kv
            node.kv = count
        node.version, node.stale = version, False

    def shrink(self, node: Node, count: int) -> None:
        """Forget own positions from `count` on."""
        self.tokens -= node.kv - count
        node.kv = count

    def room(self, node: Node, need: int) -> None:
        """Make place for `need` own positions where the node lives now (a block if it lives nowhere)."""
        if node.slot >= 0:
            if node.off + need > self.capacity:
                self._grow(len(self.owner), node.off + need)
        elif node.block is None or node.block.shape[3] < need:
            self._to_block(node, need)

    def to_slot(self, node: Node) -> bool:
        """Give the node a slot, evicting a stopped one if it must; False when all slots are running."""
        if node.slot >= 0:
            return True
        slot = self._free_slot()
        if slot < 0:
            return False
        if node.kv + 1 > self.capacity:
            self._grow(len(self.owner), node.kv + 1)
        self._move(node, slot)
        return True

    def _move(self, node: Node, slot: int) -> None:
        """Put a node's private KV at the start of a free slot."""
        local = 0 if node.slot < 0 else node.off
        here = self.view(node, -local, node.kv) if node.kv + local else None
        if here is not None:
            self.slab[:, :, slot, :, : node.kv + local] = here
        first = node.local
        self._vacate(node)
        node.slot, node.off, node.local = slot, local, first
        self.owner[slot] = node
        self.epoch += 1

    def localise(self, node: Node, ancestor: Node, count: int) -> None:
        """Copy `count` positions of an ancestor in front of the node's own KV, so that no separate call reads them."""
        size = count + node.off + node.kv
        if size + 1 > self.capacity:
            self._grow(len(self.owner), size + 1)
        slot = self.slab[:, :, node.slot]
        if size > count:
            slot[:, :, :, count:size] = slot[:, :, :, : size - count].clone()
        slot[:, :, :, :count] = self.view(ancestor, 0, count)
        node.off += count
        node.local = ancestor.base
        self.epoch += 1

    def compact(self, rows: int) -> None:
        """Pull running nodes to the low slots, so that the padded call covers about `rows` slots."""
        top = len(self.owner) - 1
        for low in range(min(rows, len(self.owner))):
            idle = self.owner[low]
            if idle is not None and idle.running:
                continue
            while top > low and not _running(self.owner[top]):
                top -= 1
            last = self.owner[top]
            if top <= low or last is None:
                return
            if idle is not None:
                self._to_block(idle, idle.kv)
            self._move(last, low)

    def _free_slot(self) -> int:
        for slot, owner in enumerate(self.owner):
            if owner is None:
                return slot
        if len(self.owner) < self.max_slots:
            self._grow(min(self.max_slots, max(2 * len(self.owner), 4)), self.capacity)
            return self.owner.index(None)
        for slot, owner in enumerate(self.owner):
            if owner is not None and not owner.running:
                self._to_block(owner, owner.kv)
                return slot
        return -1

    def _to_block(self, node: Node, need: int) -> None:
        """Move a node's own KV into a block of its own with room for `need` positions."""
        capacity = max(need, node.kv)
        block = None
        if capacity:
            block = torch.zeros(
                self.layers,
                2,
                self.kv_heads,
                capacity,
                self.head_dim,
                dtype=self.dtype,
                device=self.device,
            )
            if node.kv:
                block[:, :, :, : node.kv] = self.view(node, 0, node.kv)
        self._vacate(node)
        node.block = block
        self.block_tokens += capacity
        self.epoch += 1

    def _vacate(self, node: Node) -> None:
        if node.block is not None:
            self.block_tokens -= node.block.shape[3]
            node.block = None
        if node.slot >= 0:
            self.owner[node.slot] = None
            node.slot, node.off, node.local = -1, 0, node.base

    def drop(self, node: Node) -> None:
        """Free all KV of a node."""
        self.shrink(node, 0)
        self._vacate(node)
        self.epoch += 1

    def _new_slab(self, slots: int, capacity: int) -> Tensor:
        shape = (self.layers, 2, slots, self.kv_heads, capacity, self.head_dim)
        return torch.zeros(
            shape, dtype=self.dtype, device=self.device
        )  # zeros: masked positions must be finite

    def _grow(self, slots: int, need: int) -> None:
        capacity = self.capacity
        while capacity < need:
            capacity *= 2
        old = self.slab
        self.slab = self._new_slab(slots, capacity)
        self.slab[:, :, : old.shape[2], :, : old.shape[4]] = old
        self.owner += [None] * (slots - len(self.owner))
        self.epoch += 1


def _running(node: Node | None) -> bool:
    return node is not None and node.running
