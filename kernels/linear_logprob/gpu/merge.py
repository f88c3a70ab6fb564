"""The slots of one token joined into one.

Slot order, fixed blocks: the same bits for any batch and any launch of partial.py.
"""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from appo._kernels.common.gpu import launch
from appo._kernels.common.gpu.algebra import EMPTY, merge, merge_slots
from appo._kernels.common.gpu.aot import AotCase
from appo._kernels.common.gpu.config import ceil_div

SLOTS, TOKENS, WARPS = 16, 64, 4  # per step; a single token still has 64 loads in flight


@triton.jit(do_not_specialize=["N", "slots", "stride_out"])
def merge_kernel(
    stats_ptr, out_ptr, N, slots, stride_out, SLOTS: tl.constexpr, TOKENS: tl.constexpr
):
    """stats[slots, 4, N] float32 → out[4, N] with rows stride_out apart; grid: blocks of TOKENS."""
    token = (tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)
    inside = token < N
    m = tl.full((TOKENS,), EMPTY, dtype=tl.float32)
    s = tl.zeros((TOKENS,), dtype=tl.float32)
    u = tl.zeros((TOKENS,), dtype=tl.float32)
    z = tl.zeros((TOKENS,), dtype=tl.float32)
    for first in range(0, slots, SLOTS):
        slot = (first + tl.arange(0, SLOTS)).to(tl.int64)
        at = stats_ptr + slot[:, None] * 4 * N + token[None, :]
        here = (slot < slots)[:, None] & inside[None, :]
        m_k = tl.load(at, mask=here, other=EMPTY)
        s_k = tl.load(at + N, mask=here, other=0.0)
        u_k = tl.load(at + 2 * N, mask=here, other=0.0)
        z_k = tl.load(at + 3 * N, mask=here, other=0.0)
        m_b, s_b, u_b, z_b = merge_slots(m_k, s_k, u_k, z_k)
        m, s, u, z = merge(m, s, u, z, m_b, s_b, u_b, z_b)
    out = out_ptr + token
    step = stride_out.to(tl.int64)
    tl.store(out, m, mask=inside)
    tl.store(out + step, s, mask=inside)
    tl.store(out + 2 * step, u, mask=inside)
    tl.store(out + 3 * step, z, mask=inside)


def merge_slots_into(out: Tensor, stats: Tensor) -> None:
    """The statistics of all slots joined.

    out[4, N] (unit stride in a row) is made from stats[slots, 4, N], contiguous.
    """
    slots, _, n = stats.shape
    with launch.on(stats.device):
        merge_kernel[(ceil_div(n, TOKENS),)](
            stats, out, n, slots, out.stride(0), SLOTS, TOKENS, num_warps=WARPS, **launch.OPTIONS
        )


def traffic(n: int, slots: int) -> tuple[int, int]:
    """(bytes, FLOP): 16·slots·N in, 16·N out.

    About 12 operations per slot and token, exponentials included.
    """
    return 16 * (slots + 1) * n, 12 * slots * n


def aot_cases(arch: str) -> list[AotCase]:
    """Compilations of the kernels of this file that a package for `arch` holds."""
    names = {
        "stats_ptr": "*fp32",
        "out_ptr": "*fp32",
        "N": "i32",
        "slots": "i32",
        "stride_out": "i32",
    }
    constexprs = {"SLOTS": SLOTS, "TOKENS": TOKENS}
    signature = names | dict.fromkeys(constexprs, "constexpr")
    return [
        AotCase(
            "merge", merge_kernel, signature, constexprs, WARPS, divisible=("stats_ptr", "out_ptr"),
            options=launch.OPTIONS,
        )
    ]  # fmt: skip
