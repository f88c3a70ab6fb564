"""A strip of logits recomputed tile by tile and turned into its gradient.

The gradient is rounded once, on its way out.
"""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from appo._kernels.common.gpu import launch
from appo._kernels.common.gpu.algebra import gradient, load_upstream, target_column
from appo._kernels.common.gpu.aot import AotCase
from appo._kernels.common.gpu.config import DLOGITS, SMALL, Tile, ceil_div
from appo._kernels.linear_logprob.blocks import Upstream
from appo._kernels.linear_logprob.gpu.tile import column_pieces, grouped, logit_tile


@triton.jit(do_not_specialize=["N", "v0"])
def dlogits_kernel(
    h, w, column_ptr, scale_ptr, cap_ptr, m_ptr, log2s_ptr,
    p_factor_ptr, plogp_factor_ptr, d_logp_ptr, out_ptr, weighted_ptr,
    stride_h, stride_w, stride_out, N, V, H, v0,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, PIECES: tl.constexpr, GROUP: tl.constexpr,
    TMA: tl.constexpr, EVEN: tl.constexpr, TYPE: tl.constexpr,
):  # fmt: skip
    """out[N, V] = G of the columns v0 … v0+V-1, whose head is w[V, H].

    weighted[tiles, N] = Σ g log2 p of each tile.

    Per token [N] float32: scale, m, log2s, p_factor, plogp_factor (or None), d_logp; column int64.
    cap[1] or None; weighted or None.
    Grid: token blocks · tiles of columns.
    """
    block, tile = grouped(tl.program_id(0), tl.cdiv(N, ROWS), tl.cdiv(V, COLUMNS), GROUP)
    row = block * ROWS + tl.arange(0, ROWS)
    # Rows past the end repeat the last token and are not stored.
    token = tl.minimum(row, N - 1).to(tl.int64)
    col0 = tile * COLUMNS
    w_rows = tl.minimum(col0 + tl.arange(0, COLUMNS), V - 1).to(tl.int64)
    acc = logit_tile(
        h, w, token, w_rows, stride_h, stride_w, block * ROWS, col0, H,
        ROWS, COLUMNS, DEPTH, TMA, TMA, EVEN, TYPE,
    )  # fmt: skip

    target = target_column(column_ptr, token, v0, V)
    scale, m, log2s, p_factor, plogp_factor, d_logp, cap = load_upstream(
        token, scale_ptr, m_ptr, log2s_ptr, p_factor_ptr, plogp_factor_ptr, d_logp_ptr, cap_ptr
    )
    total = tl.zeros((ROWS,), dtype=tl.float32)
    inside = row < N
    pieces = column_pieces(acc, ROWS, COLUMNS, PIECES)
    for i in tl.static_range(PIECES):
        column = col0 + i * (COLUMNS // PIECES) + tl.arange(0, COLUMNS // PIECES)
        exists = (column < V)[None, :]
        hit = column[None, :] == target[:, None]
        g, weighted = gradient(
            pieces[i], scale, m, log2s, p_factor, plogp_factor, d_logp, cap, exists, hit,
            cap_ptr is not None, plogp_factor_ptr is not None,
        )  # fmt: skip
        total += weighted
        out = out_ptr + token[:, None] * stride_out + column[None, :]
        tl.store(out, g.to(out_ptr.dtype.element_ty), mask=inside[:, None] & exists)
    if weighted_ptr is not None:
        tl.store(weighted_ptr + tile.to(tl.int64) * N + token, total, mask=inside)


def dlogits(
    h: Tensor, w: Tensor, column: Tensor, scale: Tensor, cap: Tensor | None, up: Upstream, v0: int,
    out: Tensor, weighted: Tensor | None, tile: Tile,
) -> None:  # fmt: skip
    """Launch on h[N, H], w[V, H] (unit stride in a row).

    Fills out[N, V] and weighted[ceil(V / tile.columns), N].
    """
    n, hidden = h.shape
    v = w.shape[0]
    a = launch.descriptor(h, tile.rows, tile.depth) if tile.tma else h
    b = launch.descriptor(w, tile.columns, tile.depth) if tile.tma else w
    grid = (ceil_div(n, tile.rows) * ceil_div(v, tile.columns),)
    with launch.on(h.device):
        dlogits_kernel[grid](
            a, b, column, scale, cap, up.m, up.log2s,
            up.p_factor, up.plogp_factor, up.d_logp, out, weighted,
            h.stride(0), w.stride(0), out.stride(0), n, v, hidden, v0,
            tile.rows, tile.columns, tile.depth, tile.pieces, tile.group,
            tile.tma, hidden % tile.depth == 0, launch.triton_type(h, w),
            num_warps=tile.warps, num_stages=tile.stages, **launch.OPTIONS,
        )  # fmt: skip


def traffic(n: int, v: int, hidden: int, itemsize: int = 2) -> tuple[int, int]:
    """(bytes, FLOP) at least: (N·H + V·H)·itemsize + 32·N in, N·V·itemsize out; 2·N·V·H."""
    return ((n + v) * hidden + n * v) * itemsize + 32 * n, 2 * n * v * hidden


def aot_cases(arch: str) -> list[AotCase]:
    """The shipped tile with and without every option; and the tile of every other call."""
    return [
        _case("dlogits", DLOGITS[arch], "bf16"),
        _case("dlogits entropy, cap, scale", DLOGITS[arch], "bf16", options=True),
        _case("dlogits odd H", SMALL, "bf16", options=True, even=False),
        _case("dlogits float32", SMALL, "fp32", options=True),
    ]


def _case(name: str, tile: Tile, dtype: str, options: bool = False, even: bool = True) -> AotCase:
    optional = "*fp32" if options else "constexpr"
    pointers = {
        "h": f"tensordesc<{dtype}[{tile.rows},{tile.depth}]>" if tile.tma else f"*{dtype}",
        "w": f"tensordesc<{dtype}[{tile.columns},{tile.depth}]>" if tile.tma else f"*{dtype}",
        "column_ptr": "*i64",
        **dict.fromkeys(("scale_ptr", "m_ptr", "log2s_ptr", "p_factor_ptr", "d_logp_ptr"), "*fp32"),
        **dict.fromkeys(("cap_ptr", "plogp_factor_ptr", "weighted_ptr"), optional),
        "out_ptr": f"*{dtype}",
    }
    numbers = ("stride_h", "stride_w", "stride_out", "N", "V", "H", "v0")
    constexprs = {k: None for k, t in pointers.items() if t == "constexpr"} | {
        "ROWS": tile.rows, "COLUMNS": tile.columns, "DEPTH": tile.depth, "PIECES": tile.pieces, "GROUP": tile.group,
        "TMA": tile.tma, "EVEN": even, "TYPE": tl.bfloat16 if dtype == "bf16" else tl.float32,
    }  # fmt: skip
    signature = pointers | dict.fromkeys(numbers, "i32") | dict.fromkeys(constexprs, "constexpr")
    aligned = [k for k, t in pointers.items() if t.startswith("*")] + ["stride_out", "V"]
    aligned += ["stride_h", "stride_w", "H"] if even else []
    return AotCase(
        name, dlogits_kernel, signature, constexprs,
        tile.warps, tile.stages, tuple(aligned), launch.OPTIONS,
    )  # fmt: skip
