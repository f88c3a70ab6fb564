"""The memory behind the segment tree: keys and values in blocks of 16 positions.

Who owns a block, and what it means, is the tree's business; here a block is a number. There are two
layouts.

packed  For the native kernels on a CPU. A block holds its positions for all layers and heads, in
        the order in which attention's products take them, so that nothing is packed when it is
        read: [L, 2, Hkv, 16 * D], where keys are [D / pair, 16, pair] and values [16 / pair, D,
        pair], pair = 2 for bfloat16 and 1 for float32. Blocks lie in arenas of about 64 MiB; more
        of them are added as the pool grows, so a block never moves.
plain   For PyTorch and Triton, on any device: one tensor [L, 2, blocks, 16, Hkv, D], copied when it
        grows.

What a slot holds before it is written is anything, not a number included.
"""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Sequence

import torch
from torch import Tensor

from appo._kernels.common import native
from appo.errors import EngineError
from appo.rollout.native.tree.block_list import BLOCK

ARENA = 64 << 20  # bytes
MAX_HEAD_DIM = 256  # of native attention
_HUGE = 2 << 20  # bytes of a huge page
# bytes behind an arena: where D is no multiple of 16, the last vector of values reads past its end
_SLACK = 64
_PACKED = (torch.float32, torch.bfloat16)


def available(dtype: torch.dtype, head_dim: int, device: torch.device) -> bool:
    """Whether the native code is there and takes this cache.

    float32, or bfloat16 with an even head dimension.
    """
    isa = native.function("native_isa")
    return (
        isa is not None
        and bool(isa())
        and device.type == "cpu"
        and dtype in (torch.float32, torch.bfloat16)
        and head_dim <= MAX_HEAD_DIM
        and (dtype == torch.float32 or head_dim % 2 == 0)
    )


class KVPool:
    """Blocks 0 … blocks-1 of keys and values.

    `ensure` before use; nothing is freed but by `trim`.
    """

    def __init__(
        self,
        layers: int,
        kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        layout: str | None = None,
        limit: int | None = None,
    ):
        """layout: "packed" | "plain".

        By default packed where native attention takes it (see `available`).

        limit   blocks that will ever be asked for: no memory is taken ahead beyond them (None: not
                known)
        """
        self.limit = limit
        self.layers, self.kv_heads, self.head_dim = layers, kv_heads, head_dim
        self.dtype, self.device = dtype, torch.device(device)
        self.layout = layout or ("packed" if available(dtype, head_dim, self.device) else "plain")
        self.pair = 2 if dtype == torch.bfloat16 else 1  # numbers per word of a packed block
        self._check()
        size = torch.empty(0, dtype=dtype).element_size()
        self.block_bytes = layers * 2 * kv_heads * BLOCK * head_dim * size
        self.arenas: list[Tensor] = []  # packed: [blocks, L, 2, Hkv, 16 * D] each
        self.arena = self._plain(0)  # plain: [L, 2, blocks, 16, Hkv, D]
        self.addresses = torch.empty(0, dtype=torch.int64)  # of packed blocks

    def _check(self) -> None:
        if self.layout not in ("packed", "plain"):
            raise EngineError(f"layout is {self.layout!r}; expected 'packed' or 'plain'")
        if self.layout == "plain":
            return
        if self.device.type != "cpu" or self.dtype not in _PACKED:
            raise EngineError(
                f"a packed pool is of float32 or bfloat16 on a CPU, not of {self.dtype} on {self.device}; "
                "use layout='plain'"
            )
        if self.head_dim % self.pair:
            raise EngineError(
                f"head_dim is {self.head_dim}; a packed pool of bfloat16 needs an even one, use layout='plain'"
            )

    @property
    def blocks(self) -> int:
        """How many there are, used or not."""
        return len(self.addresses) if self.layout == "packed" else self.arena.shape[2]

    @property
    def bytes(self) -> int:
        """What is allocated."""
        return self.blocks * self.block_bytes

    def ensure(self, blocks: int) -> None:
        """Have at least `blocks` blocks. Raises EngineError when the memory is not to be had."""
        if blocks <= self.blocks:
            return
        try:
            self._grow(blocks)
        except (OSError, RuntimeError) as error:  # what mmap, and torch, raise when memory is short
            raise EngineError(
                f"no memory for {blocks} blocks of KV of {self.block_bytes} bytes each, {self.blocks} are there: "
                f"{error}; lower max_blocks or the number of sequences"
            ) from error

    def _grow(self, blocks: int) -> None:
        if self.layout == "plain":
            larger = self._plain(max(blocks, self._within_limit(2 * self.blocks)))
            larger[:, :, : self.blocks] = self.arena
            self.arena = larger
            return
        count = max(1, self._within_limit(ARENA // self.block_bytes))
        while self.blocks < blocks:
            memory = _memory(count * self.block_bytes + _SLACK)[: count * self.block_bytes]
            shape = (count, self.layers, 2, self.kv_heads, BLOCK * self.head_dim)
            self.arenas.append(memory.view(self.dtype).view(shape))
            first = self.arenas[-1].data_ptr()
            self.addresses = torch.cat(
                (self.addresses, first + self.block_bytes * torch.arange(count))
            )

    def _within_limit(self, blocks: int) -> int:
        return blocks if self.limit is None else min(blocks, self.limit)

    def _plain(self, blocks: int) -> Tensor:
        shape = (self.layers, 2, blocks, BLOCK, self.kv_heads, self.head_dim)
        return torch.empty(shape, dtype=self.dtype, device=self.device)

    def trim(self, used: int) -> None:
        """Give memory back: arenas that hold no block below `used`.

        A plain pool only when none is used.
        """
        if self.layout == "plain":
            self.arena = self.arena if used else self._plain(0)
            return
        while self.arenas and self.blocks - len(self.arenas[-1]) >= used:
            self.addresses = self.addresses[: self.blocks - len(self.arenas.pop())]

    # -- the definition of what is where --

    def write(self, layer: int, k: Tensor, v: Tensor, slots: Tensor) -> None:
        """k, v[M, Hkv, D] become the KV of slots[M] = block * 16 + position in it.

        -1: that row is not written.
        """
        written = (slots >= 0).nonzero()[:, 0]
        slots = slots[written]
        if len(slots) and int(slots.max()) >= self.blocks * BLOCK:
            raise EngineError(
                f"slot {int(slots.max())} lies beyond the pool's {self.blocks} blocks; call ensure"
            )
        if self.layout == "plain":
            block, at = (slots // BLOCK).to(self.device), (slots % BLOCK).to(self.device)
            written = written.to(self.device)
            self.arena[layer, 0, block, at] = k[written]
            self.arena[layer, 1, block, at] = v[written]
            return
        k = k[written].unflatten(-1, (-1, self.pair))  # [M, Hkv, D / pair, pair]
        number, at = slots // BLOCK, slots % BLOCK
        for i, arena in enumerate(self.arenas):
            here = number // len(arena) == i
            block, inside = number[here] % len(arena), at[here]
            keys, values = self._words(arena[:, layer])
            keys[block, :, :, inside] = k[here]
            values[block, :, inside // self.pair, :, inside % self.pair] = v[written][here]

    def read(self, blocks: Sequence[int], count: int, layer: int | None = None) -> Tensor:
        """The first `count` positions of a segment that lies in `blocks`.

        A copy [L, 2, Hkv, count, D].

        With a layer, that one: [2, Hkv, count, D].
        """
        if not 0 <= count <= len(blocks) * BLOCK:
            raise EngineError(
                f"count is {count}; expected 0 … {len(blocks) * BLOCK}, {BLOCK} positions per block"
            )
        for block in blocks:
            self._must_have(block)
        layers = slice(None) if layer is None else slice(layer, layer + 1)
        if not blocks:
            shape = (self.layers if layer is None else 1, 2, self.kv_heads, 0, self.head_dim)
            out = torch.empty(shape, dtype=self.dtype, device=self.device)
        elif self.layout == "plain":
            some = self.arena[layers, :, blocks]  # [L, 2, n, 16, Hkv, D]
            out = some.flatten(2, 3).transpose(2, 3)[:, :, :, :count].contiguous()
        else:
            keys, values = self._words(torch.stack([self._block(b)[layers] for b in blocks]))
            keys, values = (
                keys.transpose(-3, -2).flatten(-2),
                values.transpose(-2, -1).flatten(-3, -2),
            )
            some = torch.stack((keys, values), dim=2)  # [n, L, 2, Hkv, 16, D]
            out = some.movedim(0, 3).flatten(3, 4)[:, :, :, :count]
        return out if layer is None else out[0]

    def fill_nan(self, blocks: Sequence[int]) -> None:
        """Fill blocks with NaN: for tests that nothing reads what was freed or never written."""
        for block in blocks:
            self._must_have(block)
            part = self._block(block) if self.layout == "packed" else self.arena[:, :, block]
            part.fill_(torch.nan)

    def _must_have(self, block: int) -> None:
        if not 0 <= block < self.blocks:
            raise EngineError(f"block {block} is not one of the pool's {self.blocks}")

    def _block(self, block: int) -> Tensor:
        """[L, 2, Hkv, 16 * D] of a packed pool, whose arenas are all of one size."""
        arena, at = divmod(block, len(self.arenas[0]))
        return self.arenas[arena][at]

    def _words(self, part: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of packed blocks [..., 2, Hkv, 16 * D].

        Keys [..., Hkv, D / pair, 16, pair] and values [..., Hkv, 16 / pair, D, pair].
        """
        keys, values = part.unbind(-3)
        return (
            keys.unflatten(-1, (self.head_dim // self.pair, BLOCK, self.pair)),
            values.unflatten(-1, (BLOCK // self.pair, self.head_dim, self.pair)),
        )


def _memory(size: int) -> Tensor:
    """uint8[size], not touched yet.

    In huge pages where the system has them, as blocks are read all over the arena.
    """
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(size, dtype=torch.uint8)
    private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    pages = mmap.mmap(-1, size + _HUGE, flags=private)
    with contextlib.suppress(OSError):  # a wish: some kernels have no huge pages
        pages.madvise(mmap.MADV_HUGEPAGE)
    whole = torch.frombuffer(pages, dtype=torch.uint8)
    first = -whole.data_ptr() % _HUGE
    return whole[first : first + size]
