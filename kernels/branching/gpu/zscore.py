"""The Branching Score of each segment from entropy and future value.

Ω, z-scores, product, uninformative flag.

One program per segment, three sweeps over its tokens: sums, centred squares, results. Two passes
for the deviation, in float64, because a clipped Ω is nearly constant: the mean of squares minus the
square of the mean would be all rounding. Reads 13 bytes a token three times (float32 entropy,
float64 future value, mask; the second and third time mostly from cache), writes 16. A segment is
one program's work: many segments fill a GPU, a single long one does not.
"""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from appo._kernels.branching.gpu.scan import future_value
from appo._kernels.common import packed
from appo._kernels.common.gpu import launch
from appo._kernels.common.gpu.aot import AotCase

BLOCK, WARPS = 1024, 8
# As in kernels/branching/op.py, which says what they are for.
SUM_CLAMP, Z_EPS, FLAT = tl.constexpr(20.0), tl.constexpr(1e-6), tl.constexpr(1e-8)


@triton.jit
def clip(x, low, high):
    """NaN stays NaN."""
    x = tl.where(x < low, low, x)
    return tl.where(x > high, high, x)


@triton.jit
def load_pair(entropy_ptr, future_ptr, mask_ptr, at, inside, low, high):
    """(entropy, Ω, keep) in float64; entropy is 0 where masked, Ω is what it is."""
    keep = tl.load(mask_ptr + at, mask=inside, other=0) != 0
    entropy = tl.load(entropy_ptr + at, mask=keep, other=0.0).to(tl.float64)
    future = tl.load(future_ptr + at, mask=inside, other=0.0)
    return entropy, clip(tl.exp(clip(future, -SUM_CLAMP, SUM_CLAMP)), low, high), keep


@triton.jit
def deviation(squares, count, largest):
    """(divisor of the z-score, whether the deviation is rounding; False for NaN)."""
    std = tl.sqrt(tl.sum(squares) / count)
    return std + Z_EPS, std <= tl.maximum(tl.max(largest), 1.0) * FLAT


@triton.jit
def zscore_kernel(
    entropy_ptr, future_ptr, mask_ptr, offsets_ptr, omega_ptr, z_entropy_ptr, z_omega_ptr, score_ptr, flat_ptr,
    low: tl.float64, high: tl.float64, PAPER: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """omega, z_entropy, z_omega, score [N], flat[B] uint8.

    PAPER: a flat vector is standardised to exactly 0.
    """
    segment = tl.program_id(0).to(tl.int64)
    begin, end = tl.load(offsets_ptr + segment), tl.load(offsets_ptr + segment + 1)
    lane = tl.arange(0, BLOCK)
    zero = tl.zeros((BLOCK,), tl.float64)

    number, sum_e, sum_o, most_e, most_o = zero, zero, zero, zero, zero
    for first in range(begin, end, BLOCK):
        at = first + lane
        e, o, keep = load_pair(entropy_ptr, future_ptr, mask_ptr, at, at < end, low, high)
        o = tl.where(keep, o, 0.0)
        number += tl.where(keep, 1.0, zero)
        sum_e += e
        sum_o += o
        most_e = tl.maximum(most_e, tl.abs(e))
        most_o = tl.maximum(most_o, tl.abs(o))
    count = tl.maximum(tl.sum(number), 1.0)
    mean_e, mean_o = tl.sum(sum_e) / count, tl.sum(sum_o) / count

    square_e, square_o = zero, zero
    for first in range(begin, end, BLOCK):
        at = first + lane
        e, o, keep = load_pair(entropy_ptr, future_ptr, mask_ptr, at, at < end, low, high)
        square_e += tl.where(keep, (e - mean_e) * (e - mean_e), 0.0)
        square_o += tl.where(keep, (o - mean_o) * (o - mean_o), 0.0)
    by_e, flat_e = deviation(square_e, count, most_e)
    by_o, flat_o = deviation(square_o, count, most_o)
    tl.store(flat_ptr + segment, flat_o.to(tl.uint8))

    for first in range(begin, end, BLOCK):
        at = first + lane
        e, o, keep = load_pair(entropy_ptr, future_ptr, mask_ptr, at, at < end, low, high)
        z_e = tl.where(keep, (e - mean_e) / by_e, 0.0)
        z_o = tl.where(keep, (o - mean_o) / by_o, 0.0)
        if PAPER:
            z_e = tl.where(flat_e, 0.0, z_e)
            z_o = tl.where(flat_o, 0.0, z_o)
        tl.store(omega_ptr + at, o, mask=at < end)
        tl.store(z_entropy_ptr + at, z_e, mask=at < end)
        tl.store(z_omega_ptr + at, z_o, mask=at < end)
        tl.store(score_ptr + at, z_e * z_o, mask=at < end)


def branch_scores(
    entropy: Tensor,
    log_ratio: Tensor,
    mask: Tensor,
    offsets: Tensor,
    gamma: float,
    low: float,
    high: float,
    paper: bool,
) -> list[Tensor]:
    """Scan and z-scores.

    [omega, z_entropy, z_omega, score] [N] in the dtype of log_ratio, and flat[B] uint8. Waits for
    the device only where offsets or groups lie on the CPU.
    """
    cuts = packed.on_device(offsets, log_ratio.shape[0], log_ratio.device)
    future = future_value(log_ratio, mask, cuts, gamma, torch.float64)
    segments = cuts.shape[0] - 1
    out = [torch.empty_like(log_ratio) for _ in range(4)]
    flat = mask.new_empty(segments)
    if segments:
        with launch.on(log_ratio.device):
            zscore_kernel[(segments,)](
                entropy, future, mask, cuts, *out, flat, low, high, paper, BLOCK, num_warps=WARPS
            )  # fmt: skip
    return [*out, flat]


def traffic(n: int) -> tuple[int, int]:
    """(bytes that must move, FLOP): entropy, future value and mask once, four results.

    Three exponentials and 30 operations.
    """
    return (13 + 16) * n, 90 * n


def aot_cases(arch: str) -> list[AotCase]:
    """Compilations of the kernels of this file that a package for `arch` holds."""
    names = ("omega_ptr", "z_entropy_ptr", "z_omega_ptr", "score_ptr")
    pointers = {
        "entropy_ptr": "*fp32",
        "future_ptr": "*fp64",
        "mask_ptr": "*u8",
        "offsets_ptr": "*i64",
    }
    pointers |= dict.fromkeys(names, "*fp32") | {"flat_ptr": "*u8"}
    rest = {"low": "fp64", "high": "fp64", "PAPER": "constexpr", "BLOCK": "constexpr"}

    def case(name: str, paper: bool) -> AotCase:
        constexprs = {"PAPER": paper, "BLOCK": BLOCK}
        aligned = tuple(pointers)
        return AotCase(name, zscore_kernel, pointers | rest, constexprs, WARPS, divisible=aligned)

    return [case("zscore", True), case("zscore released", False)]
