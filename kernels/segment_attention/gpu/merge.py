"""The partial results of a row joined into one.

O = Σ 2^(lse_p - lse) o_p, lse = log2 Σ 2^lse_p, in the order of its list.

Nothing here depends on which program made a partial, or on the rows beside it. A row without
partials reads nothing: zeros.
"""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from appo._kernels.common.gpu import launch
from appo._kernels.common.gpu.algebra import EMPTY
from appo._kernels.common.gpu.aot import AotCase
from appo._kernels.common.gpu.config import ceil_div
from appo._kernels.segment_attention.gpu.attend import padded

NUMBERS, WARPS = 1024, 4  # of o that a program joins: NUMBERS / D heads of one row
INTERPRET = 1 << 14


@triton.jit
def attend_merge_kernel(
    o_ptr, lse_ptr, starts_ptr, entries_ptr, out_ptr, H, D: tl.constexpr, DIM: tl.constexpr, HEADS: tl.constexpr
):  # fmt: skip
    """o[P, H, D], lse[P, H] float32, entries[starts[i]] … of row i → out[M, H, D].

    grid: (M, blocks of HEADS).
    """
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    d = tl.arange(0, DIM)
    live = head < H
    here = live[:, None] & (d < D)[None, :]
    inner = head[:, None] * D + d[None, :]
    m = tl.full((HEADS,), EMPTY, dtype=tl.float32)
    s = tl.zeros((HEADS,), dtype=tl.float32)
    acc = tl.zeros((HEADS, DIM), dtype=tl.float32)
    for i in range(tl.load(starts_ptr + row), tl.load(starts_ptr + row + 1)):
        partial = tl.load(entries_ptr + i)
        lse = tl.load(lse_ptr + partial * H + head, mask=live, other=EMPTY)
        o = tl.load(o_ptr + partial * H * D + inner, mask=here, other=0.0)
        top = tl.maximum(m, lse)
        old, new = tl.exp2(m - top), tl.exp2(lse - top)
        s = s * old + new
        acc = acc * old[:, None] + o * new[:, None]
        m = top
    acc = acc / tl.where(s == 0, 1.0, s)[:, None]
    tl.store(out_ptr + row * H * D + inner, acc.to(out_ptr.dtype.element_ty), mask=here)


def attend_merge(o: Tensor, lse: Tensor, starts: Tensor, entries: Tensor, out: Tensor) -> None:
    """out[M, Hq, D] (contiguous) from partials o[P, Hq, D], lse[P, Hq] (in units of log 2).

    starts[M+1], entries[·].
    """
    rows, heads, dim = out.shape
    count = max(1, (INTERPRET if launch.interpreted() else NUMBERS) // padded(dim))
    with launch.on(out.device):
        attend_merge_kernel[(rows, ceil_div(heads, count))](
            o, lse, starts, entries, out, heads, dim, padded(dim), count,
            num_warps=WARPS, **launch.OPTIONS,
        )  # fmt: skip


def traffic(rows: int, entries: int, heads: int, dim: int, itemsize: int = 2) -> tuple[int, int]:
    """(bytes, FLOP): every partial once, 4·(D + 1) per head and 8 for its number; out once.

    4 operations per number.
    """
    moved = entries * (4 * heads * (dim + 1) + 8) + rows * (heads * dim * itemsize + 16)
    return moved, 4 * entries * heads * dim


def aot_cases(arch: str) -> list[AotCase]:
    """Compilations of the kernels of this file that a package for `arch` holds."""

    def case(name: str, dtype: str, dim: int) -> AotCase:
        pointers = {
            "o_ptr": "*fp32", "lse_ptr": "*fp32", "starts_ptr": "*i64", "entries_ptr": "*i64", "out_ptr": f"*{dtype}",
        }  # fmt: skip
        constexprs = {"D": dim, "DIM": padded(dim), "HEADS": NUMBERS // padded(dim)}
        signature = pointers | {"H": "i32"} | dict.fromkeys(constexprs, "constexpr")
        return AotCase(
            name, attend_merge_kernel, signature, constexprs, WARPS,
            divisible=tuple(pointers), options=launch.OPTIONS,
        )  # fmt: skip

    return [
        case("segment merge", "bf16", 128),
        *(case(f"segment merge D={d}", "bf16", d) for d in (64, 96, 256)),
        case("segment merge float32", "fp32", 128),
    ]
