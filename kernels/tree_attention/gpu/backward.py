"""Tree attention, backward: dq by programs that own queries, dk and dv by programs that own keys.

No atomics.

Both compute the weights again from lse: p = 2^(s - lse2), ds = p (g vᵀ - delta). The first also
leaves delta = Σ g o - d_lse for the second. A block of keys is seen by queries from its own first
token to the largest `subtree_end` in it, nobody else.
"""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from appo._kernels.common.gpu import launch
from appo._kernels.common.gpu.aot import AotCase
from appo._kernels.common.gpu.config import TREE_KEY_GRADS, TREE_QUERY_GRADS, Walk, ceil_div, walk
from appo._kernels.common.stats import LOG2E
from appo._kernels.tree_attention.gpu.forward import bounds, heads_tile, next_run, sees, store_tile


@triton.jit(do_not_specialize=["N"])
def tree_query_grads_kernel(
    q, k, v, g, o, ends_ptr, min_end_ptr, max_end_ptr, lse_ptr, d_lse_ptr, dq, delta_ptr,
    heads, kv_heads, N, scale: tl.float32,
    DIM: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, LOG2E: tl.constexpr,
):  # fmt: skip
    """dq[N, heads, DIM] and delta[N, heads]; grid: query blocks · heads. q, k, v, g finite.

    d_lse may be None.
    """
    row0 = (tl.cdiv(N, ROWS) - 1 - tl.program_id(0) // heads) * ROWS
    head = tl.program_id(0) % heads
    kv = head // (heads // kv_heads)
    row = row0 + tl.arange(0, ROWS)
    last = tl.minimum(row0 + ROWS, N) - 1
    at = tl.minimum(row, N - 1).to(tl.int64) * heads + head
    g_rd = heads_tile(g, row, heads, head, N, DIM, WIDTH)
    o_rd = heads_tile(o, row, heads, head, N, DIM, WIDTH)
    delta = tl.sum(g_rd.to(tl.float32) * o_rd.to(tl.float32), 1)
    if d_lse_ptr is not None:
        delta -= tl.load(d_lse_ptr + at)
    tl.store(delta_ptr + at, delta, mask=row < N)
    q_rd = heads_tile(q, row, heads, head, N, DIM, WIDTH)
    lse2 = tl.load(lse_ptr + at) * LOG2E
    acc = tl.zeros((ROWS, WIDTH), tl.float32)
    stop = last // KEYS + 1
    block, end = next_run(tl.full((), 0, tl.int32), stop, max_end_ptr, row0)
    while block < stop:
        for b in range(block, end):
            key = b * KEYS + tl.arange(0, KEYS)
            k_kd = heads_tile(k, key, kv_heads, kv, N, DIM, WIDTH)
            v_kd = heads_tile(v, key, kv_heads, kv, N, DIM, WIDTH)
            s = tl.dot(q_rd, k_kd.T, input_precision="ieee") * (scale * LOG2E)
            ds = tl.dot(g_rd, v_kd.T, input_precision="ieee") - delta[:, None]
            ds *= tl.exp2(s - lse2[:, None])
            if (tl.load(min_end_ptr + b) <= last) | ((b + 1) * KEYS - 1 > row0):
                ds = tl.where(sees(row, key, ends_ptr, N), ds, 0.0)
            acc = tl.dot(ds.to(k_kd.dtype), k_kd, acc, input_precision="ieee")
        block, end = next_run(end, stop, max_end_ptr, row0)
    store_tile(dq, acc * scale, row, heads, head, N, DIM, WIDTH)


@triton.jit(do_not_specialize=["N"])
def tree_key_grads_kernel(
    q, k, v, g, ends_ptr, min_end_ptr, max_end_ptr, lse_ptr, delta_ptr, dk, dv,
    heads, kv_heads, N, scale: tl.float32,
    DIM: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, LOG2E: tl.constexpr,
):  # fmt: skip
    """dk, dv[N, kv_heads, DIM], summed over the heads that share them.

    grid: key blocks · kv_heads, the longest first.
    """
    block = tl.program_id(0) // kv_heads
    kv = tl.program_id(0) % kv_heads
    group = heads // kv_heads
    key = block * KEYS + tl.arange(0, KEYS)
    k_kd = heads_tile(k, key, kv_heads, kv, N, DIM, WIDTH)
    v_kd = heads_tile(v, key, kv_heads, kv, N, DIM, WIDTH)
    ends = tl.load(ends_ptr + key, mask=key < N, other=0)
    min_end, max_end = tl.load(min_end_ptr + block), tl.load(max_end_ptr + block)
    dk_kd = tl.zeros((KEYS, WIDTH), tl.float32)
    dv_kd = tl.zeros((KEYS, WIDTH), tl.float32)
    first = block * KEYS // ROWS
    blocks = tl.cdiv(max_end, ROWS) - first
    for i in range(0, blocks * group):
        head, row0 = kv * group + i // blocks, (first + i % blocks) * ROWS
        row = row0 + tl.arange(0, ROWS)
        at = tl.minimum(row, N - 1).to(tl.int64) * heads + head
        q_rd = heads_tile(q, row, heads, head, N, DIM, WIDTH)
        g_rd = heads_tile(g, row, heads, head, N, DIM, WIDTH)
        s = tl.dot(k_kd, q_rd.T, input_precision="ieee") * (scale * LOG2E)  # [KEYS, ROWS]
        p = tl.exp2(s - (tl.load(lse_ptr + at) * LOG2E)[None, :])
        ds = tl.dot(v_kd, g_rd.T, input_precision="ieee") - tl.load(delta_ptr + at)[None, :]
        ds *= p
        if (min_end < row0 + ROWS) | (
            (block + 1) * KEYS - 1 > row0
        ):  # also where rows or keys run past the end
            seen = (key[:, None] <= row[None, :]) & (row[None, :] < ends[:, None])
            p = tl.where(seen, p, 0.0)
            ds = tl.where(seen, ds, 0.0)
        dv_kd = tl.dot(p.to(g_rd.dtype), g_rd, dv_kd, input_precision="ieee")
        dk_kd = tl.dot(ds.to(q_rd.dtype), q_rd, dk_kd, input_precision="ieee")
    store_tile(dk, dk_kd * scale, key, kv_heads, kv, N, DIM, WIDTH)
    store_tile(dv, dv_kd, key, kv_heads, kv, N, DIM, WIDTH)


def backward(
    q: Tensor, k: Tensor, v: Tensor, subtree_end: Tensor, scale: float, g: Tensor, o: Tensor, lse: Tensor,
    d_lse: Tensor | None, tiles: tuple[Walk, Walk] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(dq, dk, dv).

    Contiguous q, g, o[N, Hq, D], k, v[N, Hkv, D], finite but for o; lse and d_lse[N, Hq] float32,
    NaN in lse for rows that are to have NaN gradients. tiles: (dq, dk and dv).
    """
    n, heads, dim = q.shape
    arch, width = launch.arch(q.device), triton.next_power_of_2(max(dim, 16))
    rows, keys = tiles or (
        walk(TREE_QUERY_GRADS, arch, dim, q.element_size()),
        walk(TREE_KEY_GRADS, arch, dim, q.element_size()),
    )
    dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
    delta = torch.empty_like(lse)
    numbers = (heads, k.shape[1], n, scale, dim, width)
    with launch.on(q.device):
        tree_query_grads_kernel[(ceil_div(n, rows.rows) * heads,)](
            q, k, v, g, o, subtree_end, *bounds(subtree_end, rows.keys), lse, d_lse, dq, delta,
            *numbers, rows.rows, rows.keys, LOG2E, num_warps=rows.warps, num_stages=rows.stages,
        )  # fmt: skip
        tree_key_grads_kernel[(ceil_div(n, keys.keys) * k.shape[1],)](
            q, k, v, g, subtree_end, *bounds(subtree_end, keys.keys), lse, delta, dk, dv,
            *numbers, keys.rows, keys.keys, LOG2E, num_warps=keys.warps, num_stages=keys.stages,
        )  # fmt: skip
    return dq, dk, dv


def aot_cases(arch: str) -> list[AotCase]:
    """Heads of 64 and 128, one that is padded, a gradient of lse, and float32."""
    shapes = [(64, "bf16"), (128, "bf16"), (80, "bf16"), (64, "fp32"), (128, "fp32")]
    cases = [_query_case(arch, dim, dtype) for dim, dtype in shapes]
    cases += [_key_case(arch, dim, dtype) for dim, dtype in shapes]
    return [*cases, _query_case(arch, 64, "bf16", d_lse=True)]


def _query_case(arch: str, dim: int, dtype: str, d_lse: bool = False) -> AotCase:
    tile = walk(TREE_QUERY_GRADS, arch, dim, 2 if dtype == "bf16" else 4)
    pointers = dict.fromkeys(("q", "k", "v", "g", "o", "dq"), f"*{dtype}")
    pointers |= dict.fromkeys(("lse_ptr", "delta_ptr"), "*fp32")
    pointers |= {"d_lse_ptr": "*fp32"} if d_lse else {}
    absent = {} if d_lse else {"d_lse_ptr": None}
    name = f"attention query grads {dim} {dtype}{' lse' if d_lse else ''}"
    return _case(name, tree_query_grads_kernel, pointers, absent, dim, tile)


def _key_case(arch: str, dim: int, dtype: str) -> AotCase:
    tile = walk(TREE_KEY_GRADS, arch, dim, 2 if dtype == "bf16" else 4)
    pointers = dict.fromkeys(("q", "k", "v", "g", "dk", "dv"), f"*{dtype}")
    pointers |= dict.fromkeys(("lse_ptr", "delta_ptr"), "*fp32")
    return _case(
        f"attention key grads {dim} {dtype}", tree_key_grads_kernel, pointers, {}, dim, tile
    )


def _case(
    name: str,
    kernel: object,
    pointers: dict[str, str],
    absent: dict[str, None],
    dim: int,
    tile: Walk,
) -> AotCase:
    pointers = pointers | dict.fromkeys(("ends_ptr", "min_end_ptr", "max_end_ptr"), "*i32")
    constexprs = absent | {
        "DIM": dim, "WIDTH": triton.next_power_of_2(dim), "ROWS": tile.rows, "KEYS": tile.keys, "LOG2E": LOG2E,
    }  # fmt: skip
    signature = pointers | dict.fromkeys(("heads", "kv_heads", "N"), "i32") | {"scale": "fp32"}
    signature |= dict.fromkeys(constexprs, "constexpr")
    return AotCase(name, kernel, signature, constexprs, tile.warps, tile.stages, tuple(pointers))
