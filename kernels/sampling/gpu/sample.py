"""Tokens drawn from logits, with their logprobs and the entropies of their rows.

One read of the logits.

An exponential race over counter-based noise: the same uniforms, bit for bit, and the same tokens as
the definition in appo/rollout/native/sampling/definition.py. Per token a 32-bit hash, one product
and one comparison; only a block that holds a token which could still win takes logarithms, in
float64. Two launches: a program per row and UNIT columns, then a program per row that joins them.
The cut depends on V alone, so the bits of a row do not depend on the rows beside it. Nothing waits
for the device.
"""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from appo._kernels.common.gpu import launch
from appo._kernels.common.gpu.algebra import EMPTY, LOG2E
from appo._kernels.common.gpu.aot import AotCase
from appo._kernels.common.gpu.config import ceil_div

UNIT, BLOCK, WARPS = 4096, 512, 4
LN2 = tl.constexpr(0.6931471805599453)
NOBODY = tl.constexpr(2**31 - 1)  # above every token id
GOLDEN = tl.constexpr(0x9E3779B97F4A7C15)
BELOW_ONE = tl.constexpr(1.0 - 2.0**-53)
RAISE = tl.constexpr(
    2.0**24 * 1.0001
)  # upper 24 bits as a whole number; the margin covers the rounding of e


@triton.jit
def splitmix(x):
    """The finalizer of splitmix64: every bit of x changes about half of the result's."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)


@triton.jit
def keys_of(seed, position):
    """The two 64-bit keys of a draw, int64 → uint64.

    For the upper and the lower 32 bits of every token's noise.
    """
    of_seed = splitmix(seed.to(tl.uint64, bitcast=True) + GOLDEN)
    upper = splitmix(of_seed + (position + 1).to(tl.uint64, bitcast=True) * GOLDEN)
    return upper, splitmix(upper + GOLDEN)


@triton.jit
def mixed(key, ids):
    """32 bits of every id (uint32): see appo/rollout/native/sampling/noise.py."""
    x = ids * 0x9E3779B9 + (key & 0xFFFFFFFF).to(tl.uint32)
    x = (x ^ (x >> 17)) * 0xED5AD4BB + (key >> 32).to(tl.uint32)
    x = (x ^ (x >> 11)) * 0xAC4C1B51
    x = (x ^ (x >> 15)) * 0x31848BAB
    return x ^ (x >> 14)


@triton.jit
def log_exponential(upper, lower):
    """log E in float64, E = -log(1 - u).

    log(1 - u) as Kahan takes it, for there is no log1p here.
    """
    u = upper.to(tl.float64) * (2.0**-32) + (lower.to(tl.float64) + 0.5) * (2.0**-64)
    u = tl.minimum(u, BELOW_ONE)
    w = 1.0 - u
    off = tl.where(w == 1.0, 1.0, 1.0 - w)  # what 1 - u became
    return tl.log(tl.where(w == 1.0, u, -tl.log(w) * (u / off)))


@triton.jit(do_not_specialize=["V", "splits"])
def sample_kernel(
    logits_ptr, seed_ptr, position_ptr, inv_temp_ptr, greedy_ptr, stats_ptr, value_ptr, id_ptr,
    stride, V, splits, UNIT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (row, k) writes stats[row, k, 3] (m, s, u), value[row, k] and id[row, k].

    They are of the best of columns k·UNIT …

    m is the largest logit, s = Σ e, u = Σ e log2 e with e = 2^((x - m) scale2); value = log E - z,
    for greedy rows -x.
    """
    row, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    upper_key, lower_key = keys_of(tl.load(seed_ptr + row), tl.load(position_ptr + row))
    inv_temp = tl.load(inv_temp_ptr + row)
    greedy = tl.load(greedy_ptr + row) != 0
    scale2 = inv_temp * LOG2E
    lane = tl.arange(0, BLOCK)

    m = tl.full((), EMPTY, tl.float32)
    s = tl.zeros((), tl.float32)
    u = tl.zeros((), tl.float32)
    best = tl.full((), float("inf"), tl.float64)
    token = tl.full((), NOBODY, tl.int32)
    for first in range(split * UNIT, tl.minimum((split + 1) * UNIT, V), BLOCK):
        column = first + lane
        x = tl.load(logits_ptr + row * stride + column, mask=column < V, other=float("-inf"))
        x = x.to(tl.float32)
        largest = tl.max(x)
        top = tl.maximum(m, largest)
        shift = (m - top) * scale2
        shift = tl.where(shift < EMPTY, EMPTY, shift)
        y = (x - top) * scale2
        y = tl.where(y < EMPTY, EMPTY, y)  # -inf becomes EMPTY, NaN stays
        e = tl.exp2(y)
        weight = tl.exp2(shift)
        u = weight * (u + shift * s) + tl.sum(e * y)
        s = weight * s + tl.sum(e)
        m = top

        upper = mixed(upper_key, column.to(tl.uint32))
        lead = ((best + top.to(tl.float64) * inv_temp) * LOG2E).to(tl.float32)
        bound = tl.exp2(tl.minimum(lead, 100.0)) * RAISE
        could_win = (upper >> 8).to(tl.float32) <= bound * e
        could_win = tl.where(greedy, (x == largest) & (-x.to(tl.float64) < best), could_win)
        could_win = could_win & (column < V)
        if tl.max(could_win.to(tl.int32)) != 0:
            noise = log_exponential(upper, mixed(lower_key, column.to(tl.uint32)))
            value = tl.where(greedy, -x.to(tl.float64), noise - x.to(tl.float64) * inv_temp)
            value = tl.where(could_win, value, float("inf"))
            least = tl.min(value)
            if least < best:
                best = least
                token = tl.min(tl.where(value == least, column, NOBODY))
    at = row * splits + split
    tl.store(stats_ptr + 3 * at, m)
    tl.store(stats_ptr + 3 * at + 1, s)
    tl.store(stats_ptr + 3 * at + 2, u)
    tl.store(value_ptr + at, best)
    tl.store(id_ptr + at, token)


@triton.jit(do_not_specialize=["stride", "splits", "R"])
def sample_merge_kernel(
    logits_ptr, inv_temp_ptr, stats_ptr, value_ptr, id_ptr, out_ptr,
    stride, splits, R, SPLITS: tl.constexpr,
):  # fmt: skip
    """out[3, R] float64.

    Token (-1: NaN or +inf among the logits, or nothing but -inf), logp, entropy.
    """
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, SPLITS)
    here = lane < splits
    at = row * splits + lane
    inv_temp = tl.load(inv_temp_ptr + row)
    scale2 = inv_temp * LOG2E
    m_k = tl.load(stats_ptr + 3 * at, mask=here, other=EMPTY)
    s_k = tl.load(stats_ptr + 3 * at + 1, mask=here, other=0.0)
    u_k = tl.load(stats_ptr + 3 * at + 2, mask=here, other=0.0)
    m = tl.max(m_k)
    shift = (m_k - m) * scale2
    shift = tl.where(shift < EMPTY, EMPTY, shift)
    weight = tl.exp2(shift)
    s = tl.sum(weight * s_k)
    u = tl.sum(weight * (u_k + shift * s_k))

    value = tl.load(value_ptr + at, mask=here, other=float("inf"))
    ids = tl.load(id_ptr + at, mask=here, other=NOBODY)
    token = tl.min(tl.where(value == tl.min(value), ids, NOBODY))
    fine = (s >= 1.0) & (token < NOBODY)  # the largest logit weighs 1
    x = tl.load(logits_ptr + row * stride + token, mask=fine, other=0.0).to(tl.float32)
    log_s = tl.log2(s) * LN2
    tl.store(out_ptr + row, tl.where(fine, token, -1).to(tl.float64))
    tl.store(out_ptr + R + row, ((x - m) * inv_temp - log_s).to(tl.float64))
    tl.store(out_ptr + 2 * R + row, (log_s - u * LN2 / s).to(tl.float64))


def sample(
    logits: Tensor, seeds: Tensor, positions: Tensor, inv_temp: Tensor, greedy: Tensor
) -> Tensor:
    """logits[R, V] float32 or 16-bit → [3, R] float64: token, logp, entropy of each row.

    Token -1: none can be drawn.

    seeds, positions int64[R], inv_temp float32[R] above 0, greedy uint8[R], all on the device of
    the logits.
    """
    launch.check_tensors("triton", logits)
    logits = launch.contiguous_rows(logits)
    rows, vocab = logits.shape
    splits = ceil_div(vocab, UNIT)
    stats = logits.new_empty(rows * splits * 3, dtype=torch.float32)
    value = logits.new_empty(rows * splits, dtype=torch.float64)
    ids = logits.new_empty(rows * splits, dtype=torch.int32)
    out = logits.new_empty(3, rows, dtype=torch.float64)
    if rows == 0:
        return out
    block = (
        UNIT if launch.interpreted() else BLOCK
    )  # there a large block takes as long as a small one
    with launch.on(logits.device):
        sample_kernel[(rows, splits)](
            logits, seeds, positions, inv_temp, greedy, stats, value, ids,
            logits.stride(0), vocab, splits, UNIT, block, num_warps=WARPS, **launch.OPTIONS,
        )  # fmt: skip
        sample_merge_kernel[(rows,)](
            logits, inv_temp, stats, value, ids, out, logits.stride(0), splits, rows,
            triton.next_power_of_2(splits), num_warps=1, **launch.OPTIONS,
        )  # fmt: skip
    return out


def traffic(rows: int, vocab: int, itemsize: int = 4) -> tuple[int, int]:
    """(bytes, operations): the logits once.

    About 35 per logit, 13 of them the hash, and 150 where a block is raced.
    """
    return rows * (itemsize * vocab + 24 * ceil_div(vocab, UNIT)), 35 * rows * vocab


def aot_cases(arch: str) -> list[AotCase]:
    """Compilations of the kernels of this file that a package for `arch` holds."""
    return [case for kind in ("fp32", "bf16") for case in _cases(kind)]


def _cases(kind: str) -> list[AotCase]:
    pointers = {"logits_ptr": f"*{kind}", "inv_temp_ptr": "*fp32", "stats_ptr": "*fp32"}
    pointers |= {"value_ptr": "*fp64", "id_ptr": "*i32"}
    first = pointers | {"seed_ptr": "*i64", "position_ptr": "*i64", "greedy_ptr": "*u8"}
    last = pointers | {"out_ptr": "*fp64"}
    numbers = dict.fromkeys(("stride", "splits"), "i32")
    sample_signature = first | numbers | {"V": "i32", "UNIT": "constexpr", "BLOCK": "constexpr"}
    merge_signature = last | numbers | {"R": "i32", "SPLITS": "constexpr"}
    return [
        AotCase(
            f"sample {kind}", sample_kernel, sample_signature, {"UNIT": UNIT, "BLOCK": BLOCK}, WARPS,
            divisible=(*first, "stride"), options=launch.OPTIONS,
        ),
        AotCase(
            f"sample merge {kind}", sample_merge_kernel, merge_signature, {"SPLITS": 64}, 1,
            divisible=tuple(last), options=launch.OPTIONS,
        ),
    ]  # fmt: skip
