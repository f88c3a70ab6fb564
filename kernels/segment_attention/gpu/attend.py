"""Segment attention.

A program streams the keys of one item of the work list once, for all query rows of its tile.

    k[blocks, 16, Hkv, D] --block table--> scores of (row, head of the group) pairs --> partial o, lse per row

What comes out per item, row and head is the attention over the item's keys alone, o[D] float32, and
its log-sum-exp in units of log 2; attend_merge.py joins those of a row. A tall tile is for reads
that many rows share and for chunks of a prompt (limits that differ from row to row are a causal
mask), a low one for a row's own keys.

Keys that every row of the tile reads are taken without a mask. In the blocks where limits end,
values that a row does not read are kept from it even if they are not numbers; what no row of the
tile reads is not loaded.
"""
# mypy: disable-error-code="no-untyped-def, misc"

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from appo._kernels.common.gpu import launch
from appo._kernels.common.gpu.algebra import ABSENT, EMPTY, LOG2E
from appo._kernels.common.gpu.aot import AotCase
from appo._kernels.common.gpu.config import ceil_div
from appo._kernels.segment_attention.gpu.config import HEIGHTS, precision, stream
from appo._kernels.segment_attention.gpu.work import Work

BLOCK = tl.constexpr(16)  # positions of a block of the pool


@triton.jit
def keys_of(pool, blocks_ptr, first, key, kv_head, HKV, D: tl.constexpr, DIM: tl.constexpr, here):
    """[KEYS, DIM] of positions key[KEYS] of the segment whose block table starts at `first`.

    `here` None or [KEYS].
    """
    table = blocks_ptr + first + key // BLOCK
    block = tl.load(table) if here is None else tl.load(table, mask=here, other=0)
    d = tl.arange(0, DIM)[None, :]
    at = pool + ((block * BLOCK + key % BLOCK) * HKV + kv_head)[:, None] * D + d
    if here is not None:
        return tl.load(at, mask=here[:, None] & (d < D), other=0.0)
    elif D != DIM:
        return tl.load(at, mask=d < D, other=0.0)
    else:
        return tl.load(at)


@triton.jit
def absorb(m, s, acc, q, k, v, scale2, read, TYPE: tl.constexpr, PRECISION: tl.constexpr):
    """Softmax statistics joined by the keys k, v[KEYS, DIM].

    m, s[R] and acc[R, DIM] = Σ 2^(x2 - m) v.

    read[R, KEYS]: what each row reads; None: everything.
    """
    x2 = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale2
    if read is not None:
        x2 = tl.where(read, x2, ABSENT)
    top = tl.maximum(m, tl.max(x2, axis=1))
    p = tl.exp2(x2 - top[:, None]).to(TYPE)
    weight = tl.exp2(m - top)
    s = s * weight + tl.sum(p.to(tl.float32), axis=1)  # of the weights as rounded: they sum to 1
    if read is None:
        acc = tl.dot(p, v, acc * weight[:, None], input_precision=PRECISION)
    else:
        bad = v - v != 0  # NaN or infinite: 0 · v would be NaN in rows that do not read it
        acc = tl.dot(p, tl.where(bad, 0.0, v), acc * weight[:, None], input_precision=PRECISION)
        spoilt = tl.max(bad.to(tl.int32), axis=1)
        spoilt = tl.max(tl.where(read, spoilt[None, :], 0), axis=1)
        acc = tl.where(spoilt[:, None] != 0, float("nan"), acc)
    return top, s, acc


@triton.jit(do_not_specialize=["stride_q"])
def attend_kernel(
    q_ptr, k_pool, v_pool, items_ptr, blocks_ptr, limits_ptr, o_ptr, lse_ptr,
    stride_q, HKV, scale2,
    D: tl.constexpr, DIM: tl.constexpr, GROUP: tl.constexpr, PAIRS: tl.constexpr, KEYS: tl.constexpr, TYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """o[P, Hq, D], lse[P, Hq] float32: the partials of one item's rows.

    grid: (items, Hkv · tiles of heads).

    q[·, Hq, D] with rows stride_q apart; items[·, 8] as attend_work.COLUMNS; PAIRS rows × heads of
    a tile.
    """
    item = items_ptr + tl.program_id(0).to(tl.int64) * 8
    first, start = tl.load(item), tl.load(item + 1).to(tl.int32)
    full, end = tl.load(item + 2).to(tl.int32), tl.load(item + 3).to(tl.int32)
    row0, rows = tl.load(item + 4), tl.load(item + 5).to(tl.int32)
    limits0, partial0 = tl.load(item + 6), tl.load(item + 7)
    # A tile holds all heads of a group if it can.
    HEADS: tl.constexpr = GROUP if GROUP < PAIRS else PAIRS
    pieces: tl.constexpr = (GROUP + HEADS - 1) // HEADS
    kv_head = tl.program_id(1) // pieces
    pair = tl.arange(0, PAIRS)
    row = pair // HEADS
    inner = tl.program_id(1) % pieces * HEADS + pair % HEADS
    live = (row < rows) & (inner < GROUP)
    head = kv_head * GROUP + inner
    d = tl.arange(0, DIM)

    here = live[:, None] & (d < D)[None, :]
    q = tl.load(
        q_ptr + ((row0 + row) * stride_q + head * D)[:, None] + d[None, :], mask=here, other=0.0
    )
    limit = tl.load(limits_ptr + limits0 + row, mask=live, other=0).to(tl.int32)
    m = tl.full((PAIRS,), EMPTY, dtype=tl.float32)
    s = tl.zeros((PAIRS,), dtype=tl.float32)
    acc = tl.zeros((PAIRS, DIM), dtype=tl.float32)
    whole = start + (full - start) // KEYS * KEYS
    for at in range(start, whole, KEYS):
        key = at + tl.arange(0, KEYS)
        k = keys_of(k_pool, blocks_ptr, first, key, kv_head, HKV, D, DIM, None)
        v = keys_of(v_pool, blocks_ptr, first, key, kv_head, HKV, D, DIM, None)
        m, s, acc = absorb(m, s, acc, q, k, v, scale2, None, TYPE, PRECISION)
    for at in tl.range(whole, end, KEYS, num_stages=1):  # seldom more than a step or two
        key = at + tl.arange(0, KEYS)
        k = keys_of(k_pool, blocks_ptr, first, key, kv_head, HKV, D, DIM, key < end)
        v = keys_of(v_pool, blocks_ptr, first, key, kv_head, HKV, D, DIM, key < end)
        m, s, acc = absorb(
            m, s, acc, q, k, v, scale2, key[None, :] < limit[:, None], TYPE, PRECISION
        )

    heads = HKV * GROUP
    out = (partial0 + row) * heads + head
    none = s == 0
    s = tl.where(none, 1.0, s)
    tl.store(o_ptr + out[:, None] * D + d[None, :], acc / s[:, None], mask=here)
    tl.store(lse_ptr + out, tl.where(none, EMPTY, m + tl.log2(s)), mask=live)


def attend_items(
    q: Tensor, k_pool: Tensor, v_pool: Tensor, items: Tensor, blocks: Tensor, limits: Tensor,
    o: Tensor, lse: Tensor, pairs: int,
) -> None:  # fmt: skip
    """One launch over items[·, 8], all tables int64 on the device of q[·, Hq, D].

    Fills o[P, Hq, D], lse[P, Hq].
    """
    heads, dim = q.shape[1:]
    kv_heads = k_pool.shape[2]
    group = heads // kv_heads
    arch = launch.arch(q.device)
    how = stream(arch, q.element_size(), padded(dim), pairs)
    if not items.shape[0]:
        return
    with launch.on(q.device):
        attend_kernel[(items.shape[0], kv_heads * ceil_div(group, pairs))](
            q, k_pool, v_pool, items, blocks, limits, o, lse,
            q.stride(0), kv_heads, LOG2E.value / math.sqrt(dim),
            dim, padded(dim), group, pairs, how.keys, launch.triton_type(q), precision(arch, q.element_size()),
            num_warps=how.warps, num_stages=how.stages, **launch.OPTIONS,
        )  # fmt: skip


def padded(dim: int) -> int:
    """The head dimension as a power of two that a matrix product takes."""
    return max(16, 1 << (dim - 1).bit_length())


def traffic(work: Work, heads: int, kv_heads: int, dim: int, itemsize: int = 2) -> tuple[int, int]:
    """(bytes, FLOP) of one layer.

    Keys and values of every item once, q per item and row, partials written in float32.

    FLOP: both products for the live pairs alone; a tile multiplies all of its pairs.
    """
    items = torch.cat([work.tall, work.low])
    keys = items[:, 3] - items[:, 1]
    moved = 2 * work.keys_read() * kv_heads * dim * itemsize
    moved += work.partials * heads * (dim * (itemsize + 4) + 4)
    return moved, 4 * int((keys * items[:, 5]).sum()) * heads * dim


def aot_cases(arch: str) -> list[AotCase]:
    """Both tiles at the dimensions models have.

    Groups of 4 heads, and of 3 and 7, which do not divide the tile.
    """
    tall, low = HEIGHTS[2]
    return [
        _case(arch, "attend", "bf16", 128, 4, tall),
        _case(arch, "attend low", "bf16", 128, 4, low),
        *(_case(arch, f"attend D={d}", "bf16", d, 3, tall) for d in (64, 96, 256)),
        *(_case(arch, f"attend low D={d}", "bf16", d, 3, low) for d in (64, 96, 256)),
        _case(arch, "attend float16", "fp16", 128, 7, tall),
        *(_case(arch, f"attend float32 D={d}", "fp32", d, 4, HEIGHTS[4][0]) for d in (64, 128)),
    ]


def _case(arch: str, name: str, dtype: str, dim: int, group: int, pairs: int) -> AotCase:
    kind = {"bf16": tl.bfloat16, "fp16": tl.float16, "fp32": tl.float32}[dtype]
    itemsize = 4 if dtype == "fp32" else 2
    how = stream(arch, itemsize, padded(dim), pairs)
    pointers = {
        **dict.fromkeys(("q_ptr", "k_pool", "v_pool"), f"*{dtype}"),
        **dict.fromkeys(("items_ptr", "blocks_ptr", "limits_ptr"), "*i64"),
        **dict.fromkeys(("o_ptr", "lse_ptr"), "*fp32"),
    }
    numbers = {"stride_q": "i32", "HKV": "i32", "scale2": "fp32"}
    constexprs = {
        "D": dim, "DIM": padded(dim), "GROUP": group, "PAIRS": pairs, "KEYS": how.keys, "TYPE": kind,
        "PRECISION": precision(arch, itemsize),
    }  # fmt: skip
    signature = pointers | numbers | dict.fromkeys(constexprs, "constexpr")
    return AotCase(
        name, attend_kernel, signature, constexprs, how.warps, how.stages,
        tuple(pointers), launch.OPTIONS,
    )  # fmt: skip
