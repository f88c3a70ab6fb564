"""Keys and values of a batch into the block pool.

Row i of k and v becomes slot slots[i] of one layer, -1: nowhere.

A slot is block·16 + offset, and in the pool [L, 2, blocks, 16, Hkv, D] a slot is one run of Hkv·D
numbers, as is a row of k and v. The rotary embedding is not part of this: it turns q together with
k, in one product, before it gets here.
"""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from appo._kernels.common.gpu import launch
from appo._kernels.common.gpu.aot import AotCase
from appo._kernels.common.gpu.config import ceil_div

WIDTH, WARPS = 1024, 4  # numbers of k and of v that a program copies
INTERPRET = 1 << 14


@triton.jit(do_not_specialize=["stride_k", "stride_v"])
def kv_write_kernel(
    k_ptr, v_ptr, slots_ptr, k_pool, v_pool, stride_k, stride_v, N, WIDTH: tl.constexpr
):
    """k[M, N], v[M, N] (rows stride_k, stride_v apart) → pool[slot, N].

    grid: (M, blocks of WIDTH).
    """
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    slot = tl.load(slots_ptr + row)
    here = (column < N) & (slot >= 0)
    k = tl.load(k_ptr + row * stride_k + column, mask=here)
    v = tl.load(v_ptr + row * stride_v + column, mask=here)
    tl.store(k_pool + slot * N + column, k, mask=here)
    tl.store(v_pool + slot * N + column, v, mask=here)


def kv_write(k: Tensor, v: Tensor, slots: Tensor, k_pool: Tensor, v_pool: Tensor) -> None:
    """Write the rows of k and v into the pool.

    k, v[M, Hkv, D] (any stride between rows) into k_pool, v_pool[blocks, 16, Hkv, D] (contiguous),
    slots[M] int64.

    No slot may appear twice, and each must lie inside the pool: neither is checked, the table is on
    the device.
    """
    launch.check_tensors("triton", k, v, k_pool)
    rows, numbers = k.shape[0], k.shape[1] * k.shape[2]
    if not rows:
        return
    width = INTERPRET if launch.interpreted() else WIDTH
    with launch.on(k.device):
        kv_write_kernel[(rows, ceil_div(numbers, width))](
            k, v, slots, k_pool, v_pool, k.stride(0), v.stride(0), numbers, width, num_warps=WARPS
        )


def traffic(rows: int, kv_heads: int, dim: int, itemsize: int = 2) -> tuple[int, int]:
    """(bytes, FLOP): k and v read once and written once, 8 bytes of slot per program."""
    numbers = kv_heads * dim
    return 4 * rows * numbers * itemsize + 8 * rows * ceil_div(numbers, WIDTH), 0


def aot_cases(arch: str) -> list[AotCase]:
    """Compilations of the kernels of this file that a package for `arch` holds."""

    def case(name: str, dtype: str) -> AotCase:
        pointers = dict.fromkeys(("k_ptr", "v_ptr", "k_pool", "v_pool"), f"*{dtype}")
        pointers["slots_ptr"] = "*i64"
        numbers = dict.fromkeys(("stride_k", "stride_v", "N"), "i32")
        signature = pointers | numbers | {"WIDTH": "constexpr"}
        return AotCase(
            name, kv_write_kernel, signature, {"WIDTH": WIDTH}, WARPS, divisible=(*pointers, "N")
        )

    return [case("kv write", "bf16"), case("kv write float32", "fp32")]
