"""Statistics of a block of float32 logits that a library's matrix product left in memory.

One read, nothing else.

Blocks of columns come one after another; the statistics of the columns before are carried in
stats[4, N].
"""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import Any

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
from appo._kernels.common.gpu.config import ROW, Row, ceil_div, row


@triton.jit(do_not_specialize=["N", "v0", "stride_stats"])
def rowstats_kernel(
    logits_ptr, column_ptr, scale_ptr, cap_ptr, stats_ptr, stride, stride_stats, N, V, v0,
    FIRST: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """stats[4, N] joined by logits[N, V] (rows `stride` apart), the columns v0 … v0+V-1.

    FIRST: there is nothing yet.

    column[N] int64, scale[N] float32, cap[1] float32 or None; grid: blocks of ROWS tokens
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token = tl.minimum(row, N - 1).to(tl.int64)
    target = target_column(column_ptr, token, v0, V)
    scale2 = tl.load(scale_ptr + token) * LOG2E
    if cap_ptr is not None:
        cap = tl.load(cap_ptr)

    at = stats_ptr + token
    step = stride_stats.to(tl.int64)
    if FIRST:
        m, s, u, z = no_columns(ROWS)
    else:
        m = tl.load(at)
        s = tl.load(at + step)
        u = tl.load(at + 2 * step)
        z = tl.load(at + 3 * step)
    for col0 in range(0, V, COLUMNS):
        column = col0 + tl.arange(0, COLUMNS)
        exists = (column < V)[None, :]
        x = tl.load(logits_ptr + token[:, None] * stride + column[None, :], mask=exists, other=0.0)
        if cap_ptr is not None:
            x = cap * tanh_over(x, cap)
        x2 = scaled(x, scale2[:, None], exists)
        m, s, u, z = update(m, s, u, z, x2, column[None, :] == target[:, None])
    store_stats(at, step, m, s, u, z, row < N)


def rowstats(
    logits: Tensor, column: Tensor, scale: Tensor, cap: Tensor | None, v0: int, stats: Tensor
) -> None:
    """Join stats[4, N] by the columns of logits[N, V] float32; v0 = 0 starts afresh.

    All with unit stride in a row.
    """
    n, v = logits.shape
    size = row(logits.device.type)
    with launch.on(logits.device):
        rowstats_kernel[(ceil_div(n, size.rows),)](
            logits, column, scale, cap, stats, logits.stride(0), stats.stride(0), n, v, v0,
            v0 == 0, size.rows, size.columns, num_warps=size.warps, **launch.OPTIONS,
        )  # fmt: skip


def traffic(n: int, v: int) -> tuple[int, int]:
    """(bytes, FLOP): 4·N·V logits once, 44·N beside them (12 + carried statistics both ways).

    About 10 per logit.
    """
    return 4 * n * v + 44 * n, 10 * n * v


def aot_cases(arch: str) -> list[AotCase]:
    """Compilations of the kernels of this file that a package for `arch` holds."""
    return [_case("rowstats", ROW, cap=False), _case("rowstats cap", ROW, cap=True)]


def _case(name: str, size: Row, cap: bool) -> AotCase:
    pointers = {
        "logits_ptr": "*fp32",
        "column_ptr": "*i64",
        "scale_ptr": "*fp32",
        "cap_ptr": "*fp32" if cap else "constexpr",
        "stats_ptr": "*fp32",
    }
    constexprs: dict[str, Any] = {"FIRST": False, "ROWS": size.rows, "COLUMNS": size.columns}
    constexprs |= {} if cap else {"cap_ptr": None}
    numbers = dict.fromkeys(("stride", "stride_stats", "N", "V", "v0"), "i32")
    signature = pointers | numbers | dict.fromkeys(constexprs, "constexpr")
    aligned = ("logits_ptr", "column_ptr", "scale_ptr", "stats_ptr", "stride", "V")
    return AotCase(
        name, rowstats_kernel, signature, constexprs, size.warps,
        divisible=aligned, options=launch.OPTIONS,
    )  # fmt: skip
