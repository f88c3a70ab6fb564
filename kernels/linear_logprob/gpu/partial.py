"""Hidden states and head in, softmax statistics out. No logit ever leaves the registers.

A program owns one block of tokens and one slot of columns. It walks the slot tile by tile: matrix
product, then the tile joins the statistics of the slot, which are stored once. Nobody else writes
there: no atomics, no locks.
"""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from appo._kernels.common.gpu import launch
from appo._kernels.common.gpu.algebra import (
    LOG2E,
    no_columns,
    scaled,
    store_stats,
    tanh_over,
    target_column,
    update,
)
from appo._kernels.common.gpu.aot import AotCase
from appo._kernels.common.gpu.config import PARTIAL, SMALL, Tile, ceil_div
from appo._kernels.linear_logprob.gpu.tile import column_pieces, grouped, logit_tile


@triton.jit(do_not_specialize=["N", "slots", "tiles_per_slot"])
def partial_kernel(
    h, w, column_ptr, rows_ptr, scale_ptr, cap_ptr, stats_ptr,
    stride_h, stride_w, N, V, H, slots, tiles_per_slot,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, PIECES: tl.constexpr, GROUP: tl.constexpr,
    H_TMA: tl.constexpr, W_TMA: tl.constexpr, EVEN: tl.constexpr, TYPE: tl.constexpr,
):  # fmt: skip
    """stats[slots, 4, N] float32: (m, s, u, z) of every slot of tiles_per_slot · COLUMNS columns.

    See kernels/common/stats.py.

    column[N] int64, rows[N] int64 or None, scale[N] float32, cap[1] float32 or None; grid: token
    blocks · slots
    """
    block, slot = grouped(tl.program_id(0), tl.cdiv(N, ROWS), slots, GROUP)
    row = block * ROWS + tl.arange(0, ROWS)
    # Rows past the end repeat the last token and are not stored.
    token = tl.minimum(row, N - 1).to(tl.int64)
    target = target_column(column_ptr, token, 0, V)
    scale2 = tl.load(scale_ptr + token) * LOG2E
    if rows_ptr is None:
        h_rows = token
    else:
        h_rows = tl.load(rows_ptr + token).to(tl.int64)
    if cap_ptr is not None:
        cap = tl.load(cap_ptr)

    m, s, u, z = no_columns(ROWS)
    first = slot * tiles_per_slot
    for tile in range(first, tl.minimum(first + tiles_per_slot, tl.cdiv(V, COLUMNS))):
        col0 = tile * COLUMNS
        w_rows = tl.minimum(col0 + tl.arange(0, COLUMNS), V - 1).to(tl.int64)
        acc = logit_tile(
            h, w, h_rows, w_rows, stride_h, stride_w, block * ROWS, col0, H,
            ROWS, COLUMNS, DEPTH, H_TMA, W_TMA, EVEN, TYPE,
        )  # fmt: skip
        pieces = column_pieces(acc, ROWS, COLUMNS, PIECES)
        for i in tl.static_range(PIECES):
            x = pieces[i]
            if cap_ptr is not None:
                x = cap * tanh_over(x, cap)
            column = col0 + i * (COLUMNS // PIECES) + tl.arange(0, COLUMNS // PIECES)
            x2 = scaled(x, scale2[:, None], (column < V)[None, :])
            m, s, u, z = update(m, s, u, z, x2, column[None, :] == target[:, None])

    out = stats_ptr + slot.to(tl.int64) * 4 * N + token
    store_stats(out, N, m, s, u, z, row < N)


def partial(
    h: Tensor, w: Tensor, column: Tensor, rows: Tensor | None, scale: Tensor, cap: Tensor | None,
    stats: Tensor, tiles_per_slot: int, tile: Tile,
) -> None:  # fmt: skip
    """Launch on h[·, H], w[V, H] (unit stride in a row), column[N], rows[N], scale[N].

    Fills stats[slots, 4, N].
    """
    slots, _, n = stats.shape
    vocab, hidden = w.shape
    h_tma = tile.tma and rows is None
    a = launch.descriptor(h, tile.rows, tile.depth) if h_tma else h
    b = launch.descriptor(w, tile.columns, tile.depth) if tile.tma else w
    grid = (ceil_div(n, tile.rows) * slots,)
    with launch.on(h.device):
        partial_kernel[grid](
            a, b, column, rows, scale, cap, stats,
            h.stride(0), w.stride(0), n, vocab, hidden, slots, tiles_per_slot,
            tile.rows, tile.columns, tile.depth, tile.pieces, tile.group,
            h_tma, tile.tma, hidden % tile.depth == 0, launch.triton_type(h, w),
            num_warps=tile.warps, num_stages=tile.stages, **launch.OPTIONS,
        )  # fmt: skip


def traffic(n: int, v: int, hidden: int, slots: int, itemsize: int = 2) -> tuple[int, int]:
    """(bytes, FLOP) at least: (N·H + V·H)·itemsize + 20·N in, 16·slots·N out; 2·N·V·H."""
    return (n + v) * hidden * itemsize + 20 * n + 16 * slots * n, 2 * n * v * hidden


def aot_cases(arch: str) -> list[AotCase]:
    """The shipped tile, also with gathered rows (h by pointers) and with a cap.

    And the tile of every other call.
    """
    return [
        _case("partial", PARTIAL[arch], "bf16"),
        _case("partial rows", PARTIAL[arch], "bf16", rows=True),
        _case("partial cap", PARTIAL[arch], "bf16", cap=True),
        _case("partial odd H", SMALL, "bf16", even=False),
        _case("partial float32", SMALL, "fp32", rows=True, cap=True),
    ]


def _case(
    name: str, tile: Tile, dtype: str, rows: bool = False, cap: bool = False, even: bool = True
) -> AotCase:
    h_tma = tile.tma and not rows
    pointers = {
        "h": f"tensordesc<{dtype}[{tile.rows},{tile.depth}]>" if h_tma else f"*{dtype}",
        "w": f"tensordesc<{dtype}[{tile.columns},{tile.depth}]>" if tile.tma else f"*{dtype}",
        "column_ptr": "*i64",
        "rows_ptr": "*i64" if rows else "constexpr",
        "scale_ptr": "*fp32",
        "cap_ptr": "*fp32" if cap else "constexpr",
        "stats_ptr": "*fp32",
    }
    numbers = ("stride_h", "stride_w", "N", "V", "H", "slots", "tiles_per_slot")
    absent = {k: None for k, t in pointers.items() if t == "constexpr"}
    constexprs = absent | {
        "ROWS": tile.rows, "COLUMNS": tile.columns, "DEPTH": tile.depth, "PIECES": tile.pieces, "GROUP": tile.group,
        "H_TMA": h_tma, "W_TMA": tile.tma, "EVEN": even, "TYPE": tl.bfloat16 if dtype == "bf16" else tl.float32,
    }  # fmt: skip
    signature = pointers | dict.fromkeys(numbers, "i32") | dict.fromkeys(constexprs, "constexpr")
    aligned = [k for k, t in pointers.items() if t.startswith("*")]
    aligned += ["stride_h", "stride_w", "H"] if even else []
    return AotCase(
        name, partial_kernel, signature, constexprs,
        tile.warps, tile.stages, tuple(aligned), launch.OPTIONS,
    )  # fmt: skip
