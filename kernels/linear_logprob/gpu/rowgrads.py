"""K4r: the gradient of a block of float32 logits that a library's matrix product left in memory.

One read, one write.
"""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from appo._kernels.common.gpu import launch
from appo._kernels.common.gpu.algebra import gradient, load_upstream, target_column
from appo._kernels.common.gpu.aot import AotCase
from appo._kernels.common.gpu.config import ROW, Row, ceil_div, row
from appo._kernels.linear_logprob.blocks import Upstream


@triton.jit(do_not_specialize=["N", "v0"])
def rowgrads_kernel(
    logits_ptr, column_ptr, scale_ptr, cap_ptr, m_ptr, log2s_ptr,
    p_factor_ptr, plogp_factor_ptr, d_logp_ptr, out_ptr, weighted_ptr,
    stride, stride_out, N, V, v0, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """out[N, V] = G of logits[N, V], the columns v0 … v0+V-1; weighted[N] += Σ g log2 p over them.

    Per token [N] float32: scale, m, log2s, p_factor, plogp_factor (or None), d_logp; column int64.
    cap[1] or None; weighted or None. out may be the logits themselves when it is float32: a program
    reads a block before it writes it. Grid: blocks of ROWS
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < N
    token = tl.minimum(row, N - 1).to(tl.int64)
    target = target_column(column_ptr, token, v0, V)
    scale, m, log2s, p_factor, plogp_factor, d_logp, cap = load_upstream(
        token, scale_ptr, m_ptr, log2s_ptr, p_factor_ptr, plogp_factor_ptr, d_logp_ptr, cap_ptr
    )
    total = tl.zeros((ROWS,), dtype=tl.float32)
    for col0 in range(0, V, COLUMNS):
        column = col0 + tl.arange(0, COLUMNS)
        exists = (column < V)[None, :]
        here = inside[:, None] & exists
        x = tl.load(logits_ptr + token[:, None] * stride + column[None, :], mask=here, other=0.0)
        hit = column[None, :] == target[:, None]
        g, weighted = gradient(
            x, scale, m, log2s, p_factor, plogp_factor, d_logp, cap, exists, hit,
            cap_ptr is not None, plogp_factor_ptr is not None,
        )  # fmt: skip
        total += weighted
        out = out_ptr + token[:, None] * stride_out + column[None, :]
        tl.store(out, g.to(out_ptr.dtype.element_ty), mask=here)
    if weighted_ptr is not None:
        total += tl.load(weighted_ptr + token)
        tl.store(weighted_ptr + token, total, mask=inside)


def rowgrads(
    logits: Tensor, column: Tensor, scale: Tensor, cap: Tensor | None, up: Upstream, v0: int,
    out: Tensor, weighted: Tensor | None,
) -> None:  # fmt: skip
    """Launch on logits[N, V] float32; fills out[N, V] and adds to weighted[N].

    All with unit stride in a row.
    """
    n, v = logits.shape
    size = row(logits.device.type)
    with launch.on(logits.device):
        rowgrads_kernel[(ceil_div(n, size.rows),)](
            logits, column, scale, cap, up.m, up.log2s,
            up.p_factor, up.plogp_factor, up.d_logp, out, weighted,
            logits.stride(0), out.stride(0), n, v, v0, size.rows, size.columns,
            num_warps=size.warps, **launch.OPTIONS,
        )  # fmt: skip


def traffic(n: int, v: int, itemsize: int = 2) -> tuple[int, int]:
    """(bytes, FLOP): 4·N·V in, itemsize·N·V out, 36·N beside them.

    About 12 operations per logit.
    """
    return (4 + itemsize) * n * v + 36 * n, 12 * n * v


def aot_cases(arch: str) -> list[AotCase]:
    """Compilations of the kernels of this file that a package for `arch` holds."""
    return [
        _case("rowgrads", ROW, "bf16"),
        _case("rowgrads entropy, cap, scale", ROW, "bf16", options=True),
        _case("rowgrads float32", ROW, "fp32", options=True),
    ]


def _case(name: str, size: Row, dtype: str, options: bool = False) -> AotCase:
    optional = "*fp32" if options else "constexpr"
    pointers = {
        "logits_ptr": "*fp32",
        "column_ptr": "*i64",
        **dict.fromkeys(("scale_ptr", "m_ptr", "log2s_ptr", "p_factor_ptr", "d_logp_ptr"), "*fp32"),
        **dict.fromkeys(("cap_ptr", "plogp_factor_ptr", "weighted_ptr"), optional),
        "out_ptr": f"*{dtype}",
    }
    constexprs: dict[str, Any] = {k: None for k, t in pointers.items() if t == "constexpr"}
    constexprs |= {"ROWS": size.rows, "COLUMNS": size.columns}
    numbers = dict.fromkeys(("stride", "stride_out", "N", "V", "v0"), "i32")
    signature = pointers | numbers | dict.fromkeys(constexprs, "constexpr")
    aligned = [k for k, t in pointers.items() if t.startswith("*")] + ["stride", "stride_out", "V"]
    return AotCase(
        name, rowgrads_kernel, signature, constexprs, size.warps,
        divisible=tuple(aligned), options=launch.OPTIONS,
    )  # fmt: skip
