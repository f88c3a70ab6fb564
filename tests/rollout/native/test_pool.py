"""The pool of KV blocks: what is written is read back, in both layouts; growing never moves a
packed block.
"""

import pytest
import torch

from appo._kernels.common import native
from appo.errors import EngineError
from appo.rollout.native.attention import pool as pool_module
from appo.rollout.native.attention.pool import KVPool

F32, BF16 = torch.float32, torch.bfloat16
LAYERS, HEADS = 3, 2


def filled(layout: str, dtype: torch.dtype, dim: int, blocks: list[int], count: int):
    """(pool, what was written [L, 2, Hkv, count, D]): positions 0 … count-1 of a segment in
    `blocks`, in two calls.
    """
    pool = KVPool(LAYERS, HEADS, dim, dtype, layout=layout)
    pool.ensure(1 + max(blocks))
    pool.fill_nan(range(pool.blocks) if layout == "plain" else range(1 + max(blocks)))
    kv = torch.randn(LAYERS, 2, HEADS, count, dim, generator=torch.Generator().manual_seed(dim))
    kv = kv.to(dtype)
    slots = torch.tensor([blocks[i // 16] * 16 + i % 16 for i in range(count)])
    for layer in range(LAYERS):
        k, v = kv[layer].transpose(1, 2)  # [count, Hkv, D] each
        for rows in (slice(0, count // 3), slice(count // 3, count)):
            pool.write(layer, k[rows], v[rows], slots[rows])
        pool.write(layer, k[:2] + 1, v[:2] + 1, torch.tensor([-1, -1]))  # written nowhere
    return pool, kv


@pytest.mark.parametrize("layout", ["packed", "plain"])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("dim", [2, 8, 64, 80])
@pytest.mark.parametrize("count", [2, 15, 16, 17, 40])
def test_what_is_written_is_read(layout, dtype, dim, count):
    blocks = [5, 0, 3]
    pool, kv = filled(layout, dtype, dim, blocks, count)
    assert torch.equal(pool.read(blocks, count), kv)
    assert torch.equal(pool.read(blocks, count - 1, layer=1), kv[1, :, :, : count - 1])
    assert pool.read(blocks, 48)[:, :, :, count:].isnan().all()
    assert pool.read([1, 2, 4], 48).isnan().all()
    assert pool.read([], 0).shape == (LAYERS, 2, HEADS, 0, dim)


@pytest.mark.parametrize("dtype,pair", [(F32, 1), (BF16, 2)], ids=str)
def test_a_packed_block_is_the_panels_of_the_products(dtype, pair):
    pool, kv = filled("packed", dtype, 8, [0], 16)
    block = pool.arenas[0][0]  # [L, 2, Hkv, 16 * D]
    for head in range(HEADS):
        keys, values = kv[1, :, head]  # [16, D]
        words = keys.view(16, 8 // pair, pair).transpose(0, 1)
        assert torch.equal(block[1, 0, head], words.flatten())
        words = values.view(16 // pair, pair, 8).transpose(1, 2)
        assert torch.equal(block[1, 1, head], words.flatten())


def test_growing_and_trimming(monkeypatch):
    size = KVPool(LAYERS, HEADS, 8, F32, layout="packed").block_bytes
    assert size == LAYERS * 2 * HEADS * 16 * 8 * 4
    monkeypatch.setattr(pool_module, "ARENA", 4 * size + size // 2)  # four blocks an arena
    pool = KVPool(LAYERS, HEADS, 8, F32, layout="packed")
    assert pool.blocks == pool.bytes == 0
    pool.ensure(3)
    assert pool.blocks == 4 and pool.bytes == 4 * size
    k = torch.ones(1, HEADS, 8)
    pool.write(2, k, 2 * k, torch.tensor([3 * 16 + 7]))
    before = pool.addresses.clone()
    pool.ensure(9)
    assert pool.blocks == 12 and torch.equal(pool.addresses[:4], before)
    assert torch.equal(pool.addresses[1:4] - pool.addresses[:3], torch.full((3,), size))
    assert (pool.read([3], 8)[2, :, :, 7].amax((-1, -2)) == torch.tensor([1.0, 2.0])).all()
    pool.write(0, k, k, torch.tensor([11 * 16]))
    for used, left in ((9, 12), (8, 8), (5, 8), (1, 4), (0, 0)):
        pool.trim(used)
        assert pool.blocks == left == len(pool.addresses)
    pool.ensure(1)
    assert pool.blocks == 4


def test_a_block_larger_than_an_arena_has_one_of_its_own(monkeypatch):
    monkeypatch.setattr(pool_module, "ARENA", 100)
    pool = KVPool(LAYERS, HEADS, 8, F32, layout="packed")
    pool.ensure(3)
    assert pool.blocks == 3 and len(pool.arenas) == 3


def test_a_plain_pool_keeps_what_is_in_it():
    pool, kv = filled("plain", F32, 8, [1, 0], 20)
    pool.ensure(5 * pool.blocks)
    assert torch.equal(pool.read([1, 0], 20), kv)
    assert pool.arena.shape == (LAYERS, 2, pool.blocks, 16, HEADS, 8)
    pool.trim(1)
    assert torch.equal(pool.read([1, 0], 20), kv)
    pool.trim(0)
    assert pool.bytes == 0


@pytest.mark.parametrize("layout", ["packed", "plain"])
def test_no_memory_is_taken_ahead_beyond_the_limit(layout):
    pool = KVPool(LAYERS, HEADS, 8, F32, layout=layout, limit=10)
    for wanted in (3, 7, 9, 10):
        pool.ensure(wanted)
        assert wanted <= pool.blocks <= 10


def test_the_default_layout_is_what_the_machine_can_use():
    packed = native.function("native_isa") is not None and native.function("native_isa")()
    assert KVPool(1, 1, 64, BF16).layout == ("packed" if packed else "plain")
    assert KVPool(1, 1, 64, torch.float16).layout == "plain"
    assert KVPool(1, 1, 7, BF16).layout == "plain"


def test_misuse_is_an_error():
    for dtype, dim, layout, message in (
        (F32, 8, "paged", "layout is 'paged'"),
        (torch.float16, 8, "packed", "use layout='plain'"),
        (BF16, 7, "packed", "needs an even one"),
    ):
        with pytest.raises(EngineError, match=message):
            KVPool(1, 1, dim, dtype, layout=layout)
    for layout in ("packed", "plain"):
        pool = KVPool(1, 1, 8, F32, layout=layout)
        pool.ensure(2)
        k = torch.zeros(1, 1, 8)
        with pytest.raises(EngineError, match="beyond the pool's"):
            pool.write(0, k, k, torch.tensor([pool.blocks * 16]))
        with pytest.raises(EngineError, match=r"block -1 is not one of"):
            pool.read([0, -1], 17)
        with pytest.raises(EngineError, match="count is 17; expected 0 … 16"):
            pool.read([0], 17)


def test_no_memory_is_an_error_and_what_is_there_stays(monkeypatch):
    def refuse(size):
        raise OSError("Cannot allocate memory")

    pool, kv = filled("packed", F32, 8, [0], 5)
    blocks = pool.blocks
    monkeypatch.setattr(pool_module, "_memory", refuse)
    with pytest.raises(EngineError, match=f"no memory for {blocks + 1} blocks .*; lower max_block"):
        pool.ensure(blocks + 1)
    assert pool.blocks == blocks and torch.equal(pool.read([0], 5), kv)
