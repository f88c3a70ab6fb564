"""Tree attention, forward.

A program owns a block of queries of one head and walks the blocks of keys that it sees.

`subtree_end` and its least and largest per block of keys are all there is of a mask. Runs of blocks
that nobody here sees are stepped over by scalar loads; only a block seen in part compares
positions.
"""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from appo._kernels.common.gpu import launch
from appo._kernels.common.gpu.aot import AotCase
from appo._kernels.common.gpu.config import TREE_FORWARD, Walk, ceil_div, walk
from appo._kernels.common.stats import LN2, LOG2E


@triton.jit
def heads_tile(x, token, heads, head, N, DIM: tl.constexpr, WIDTH: tl.constexpr):
    """x[token, head, :] of a contiguous [N, heads, DIM] as [tokens, WIDTH].

    Tokens past the end repeat the last one.
    """
    d = tl.arange(0, WIDTH)[None, :]
    at = x + (tl.minimum(token, N - 1).to(tl.int64)[:, None] * heads + head) * DIM + d
    return tl.load(at) if WIDTH == DIM else tl.load(at, mask=d < DIM, other=0.0)


@triton.jit
def store_tile(x, value, token, heads, head, N, DIM: tl.constexpr, WIDTH: tl.constexpr):
    """The way back; tokens past the end are left out."""
    d = tl.arange(0, WIDTH)[None, :]
    at = x + (token.to(tl.int64)[:, None] * heads + head) * DIM + d
    tl.store(at, value.to(x.dtype.element_ty), mask=(token < N)[:, None] & (d < DIM))


@triton.jit
def sees(row, key, ends_ptr, N):
    """bool[rows, keys]: key ≤ row < subtree_end[key]."""
    ends = tl.load(ends_ptr + key, mask=key < N, other=0)
    return (key[None, :] <= row[:, None]) & (row[:, None] < ends[None, :])


@triton.jit
def next_run(block, stop, max_end_ptr, row0):
    """(first, last + 1) of the next run of key blocks, from `block` on.

    A query from row0 on may see a part of them.

    max_end[blocks + 1] ends with a 0.
    """
    while (block < stop) & (tl.load(max_end_ptr + block) <= row0):
        block += 1
    end = block
    while (end < stop) & (tl.load(max_end_ptr + end) > row0):
        end += 1
    return block, end


@triton.jit(do_not_specialize=["N"])
def tree_forward_kernel(
    q, k, v, ends_ptr, min_end_ptr, max_end_ptr, hurt_ptr, o, lse_ptr,
    heads, kv_heads, N, scale2: tl.float32,
    DIM: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, LN2: tl.constexpr,
):  # fmt: skip
    """o[N, heads, DIM], lse[N, heads] from q, k, v contiguous.

    grid: query blocks · heads, the longest first.

    k and v are finite; hurt[kv_heads, N] float32 is NaN where they were not, else 0
    min_end, max_end[blocks]  of ends per KEYS keys (max_end[blocks + 1], 0 at the end)
    """
    row0 = (tl.cdiv(N, ROWS) - 1 - tl.program_id(0) // heads) * ROWS
    head = tl.program_id(0) % heads
    kv = head // (heads // kv_heads)
    row = row0 + tl.arange(0, ROWS)
    last = tl.minimum(row0 + ROWS, N) - 1
    hurt_ptr += kv.to(tl.int64) * N
    q_rd = heads_tile(q, row, heads, head, N, DIM, WIDTH)
    m = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.sum(q_rd.to(tl.float32) * 0.0, 1)  # NaN for a query that is not finite
    acc = tl.zeros((ROWS, WIDTH), tl.float32)
    stop = last // KEYS + 1
    block, end = next_run(tl.full((), 0, tl.int32), stop, max_end_ptr, row0)
    while block < stop:
        for b in range(block, end):
            key = b * KEYS + tl.arange(0, KEYS)
            k_kd = heads_tile(k, key, kv_heads, kv, N, DIM, WIDTH)
            s = tl.dot(q_rd, k_kd.T, input_precision="ieee") * scale2
            s += tl.load(hurt_ptr + tl.minimum(key, N - 1))[None, :]
            if (tl.load(min_end_ptr + b) <= last) | ((b + 1) * KEYS - 1 > row0):
                s = tl.where(sees(row, key, ends_ptr, N), s, float("-inf"))
            above = tl.maximum(m, tl.max(s, 1))
            base = tl.where(above == float("-inf"), 0.0, above)  # nothing seen yet: not inf - inf
            shrink = tl.exp2(m - base)
            p = tl.exp2(s - base[:, None])
            total = total * shrink + tl.sum(p, 1)
            v_kd = heads_tile(v, key, kv_heads, kv, N, DIM, WIDTH)
            acc = tl.dot(p.to(v_kd.dtype), v_kd, acc * shrink[:, None], input_precision="ieee")
            m = above
        block, end = next_run(end, stop, max_end_ptr, row0)
    store_tile(o, acc / total[:, None], row, heads, head, N, DIM, WIDTH)
    lse = (m + tl.log2(total)) * LN2
    tl.store(lse_ptr + row.to(tl.int64) * heads + head, lse, mask=row < N)


def bounds(subtree_end: Tensor, keys: int) -> tuple[Tensor, Tensor]:
    """(min_end, max_end) of subtree_end[N] int32 per block of `keys`.

    max_end has one more entry, 0.
    """
    n = subtree_end.shape[0]
    short = -n % keys
    min_end = torch.nn.functional.pad(subtree_end, (0, short), value=n).view(-1, keys).amin(1)
    max_end = torch.nn.functional.pad(subtree_end, (0, short)).view(-1, keys).amax(1)
    return min_end, torch.nn.functional.pad(max_end, (0, 1))


def forward(
    q: Tensor, k: Tensor, v: Tensor, subtree_end: Tensor, hurt: Tensor, scale: float,
    tile: Walk | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Launch on contiguous q[N, Hq, D], k and v[N, Hkv, D] (finite), hurt[N, Hkv] float32 →.

    O, lse[N, Hq] float32.
    """
    n, heads, dim = q.shape
    size = tile or walk(TREE_FORWARD, launch.arch(q.device), dim, q.element_size())
    min_end, max_end = bounds(subtree_end, size.keys)
    o, lse = torch.empty_like(q), q.new_empty((n, heads), dtype=torch.float32)
    grid = (ceil_div(n, size.rows) * heads,)
    with launch.on(q.device):
        tree_forward_kernel[grid](
            q, k, v, subtree_end, min_end, max_end, hurt.T.contiguous(), o, lse,
            heads, k.shape[1], n, scale * LOG2E,
            dim, triton.next_power_of_2(max(dim, 16)), size.rows, size.keys, LN2,
            num_warps=size.warps, num_stages=size.stages,
        )  # fmt: skip
    return o, lse


def aot_cases(arch: str) -> list[AotCase]:
    """Heads of 64 and 128, one that is padded, and float32."""
    shapes = [(64, "bf16"), (128, "bf16"), (80, "bf16"), (64, "fp32"), (128, "fp32")]
    return [_case(arch, dim, dtype) for dim, dtype in shapes]


def _case(arch: str, dim: int, dtype: str) -> AotCase:
    tile = walk(TREE_FORWARD, arch, dim, 2 if dtype == "bf16" else 4)
    pointers = dict.fromkeys(("q", "k", "v", "o"), f"*{dtype}")
    pointers |= dict.fromkeys(("ends_ptr", "min_end_ptr", "max_end_ptr"), "*i32")
    pointers |= dict.fromkeys(("hurt_ptr", "lse_ptr"), "*fp32")
    constexprs = {
        "DIM": dim, "WIDTH": triton.next_power_of_2(dim), "ROWS": tile.rows, "KEYS": tile.keys, "LN2": LN2,
    }  # fmt: skip
    signature = pointers | dict.fromkeys(("heads", "kv_heads", "N"), "i32") | {"scale2": "fp32"}
    signature |= dict.fromkeys(constexprs, "constexpr")
    return AotCase(
        f"attention forward {dim} {dtype}", tree_forward_kernel, signature, constexprs,
        tile.warps, tile.stages, tuple(pointers),
    )  # fmt: skip
