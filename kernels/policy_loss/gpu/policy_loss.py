"""The fused policy loss.

Discounted future, ratio, clipped surrogate, its gradient and the metric sums, in float64.

With a future term: the first two launches of the discounted scan (branching/gpu/scan.py) over logp
- old_logp, then one that finishes the scan of its block and does the rest of the work on the values
it holds. Without: that launch alone. Sums leave as one row per block and are added in a second
step, so there are no atomics and the bits depend on N only. Reads 13 bytes a token (float32 logp,
old_logp, advantage, mask) and 9 more for the first launch of the scan, writes the gradient and the
future factor, 8.
"""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from appo._kernels.branching.gpu.scan import BLOCK as SCAN_BLOCK
from appo._kernels.branching.gpu.scan import (
    WARPS,
    block_size,
    carried,
    carries,
    load_difference,
    reversed_positions,
    scan_block,
    segment_of,
)
from appo._kernels.branching.gpu.zscore import clip
from appo._kernels.common import packed
from appo._kernels.common.gpu import launch
from appo._kernels.common.gpu.aot import AotCase
from appo._kernels.common.gpu.config import ceil_div

if TYPE_CHECKING:
    from appo._kernels.policy_loss.rules import Rules

CLAMP = tl.constexpr(20.0)  # on log-ratios and on their discounted sums, before exp
ALONE = 512  # tokens per program without a future term; with one they are those of the scan
SUMS = 6  # loss, tokens, clipped, kl, |d|, scale


@triton.jit
def surrogate(d, advantage, clip_low, clip_high, dual_clip):
    """(value, its derivative by d, ratio) of max(-A r, -A clip(r)).

    The value is capped at -A·dual_clip where A < 0.
    """
    ratio = tl.exp(clip(d, -CLAMP, CLAMP))
    plain = -advantage * ratio
    bounded = -advantage * clip(ratio, 1.0 - clip_low, 1.0 + clip_high)
    value = tl.where(plain < bounded, bounded, plain)
    slope = tl.where(plain < bounded, 0.0, plain)  # NaN stays NaN
    most = tl.where(advantage < 0, -advantage * dual_clip, float("inf"))
    slope = tl.where((value > most) | (tl.abs(d) > CLAMP), 0.0, slope)
    return tl.where(value > most, most, value), slope, ratio


@triton.jit(do_not_specialize=["N", "segments", "steps", "blocks"])
def policy_loss_kernel(
    logp_ptr, old_logp_ptr, advantage_ptr, mask_ptr, offsets_ptr, weight_ptr, state_ptr, future_ptr, gradient_ptr,
    sums_ptr, N, segments, steps, blocks, gamma: tl.float64, future_low: tl.float64, future_high: tl.float64,
    future_weight: tl.float64, clip_low: tl.float64, clip_high: tl.float64, dual_clip: tl.float64, BLOCK: tl.constexpr,
):  # fmt: skip
    """gradient[N], sums[6, blocks] float64; with state[blocks] (of the scan) also future[N].

    weight[B] float64.
    """
    at = reversed_positions(N, BLOCK)
    inside = at >= 0
    d, keep = load_difference(logp_ptr, old_logp_ptr, mask_ptr, at)
    segment = segment_of(offsets_ptr, tl.maximum(at, 0), segments, steps)
    weight = tl.load(weight_ptr + segment)
    zero = tl.zeros_like(d)
    scale = zero + 1.0
    if state_ptr is not None:
        a, b = scan_block(d, at, segment, offsets_ptr, gamma)
        ahead = carried(a, b, state_ptr)
        future = clip(tl.exp(clip(ahead, -CLAMP, CLAMP)), future_low, future_high)
        tl.store(future_ptr + at, future, mask=inside)
        scale = 1.0 + future_weight * future

    own = tl.load(advantage_ptr + at, mask=keep, other=0.0).to(tl.float64)
    value, slope, ratio = surrogate(d, own * scale, clip_low, clip_high, dual_clip)
    tl.store(gradient_ptr + at, tl.where(keep, weight * slope, 0.0), mask=inside)
    clipped = ((own > 0) & (ratio > 1.0 + clip_high)) | ((own < 0) & (ratio < 1.0 - clip_low))

    out = sums_ptr + tl.program_id(0)
    tl.store(out, tl.sum(tl.where(keep, weight * value, zero)))
    tl.store(out + blocks, tl.sum(tl.where(keep, 1.0, zero)))
    tl.store(out + 2 * blocks, tl.sum(tl.where(keep & clipped, 1.0, zero)))
    tl.store(out + 3 * blocks, tl.sum(tl.where(keep, ratio - 1.0 - d, zero)))
    tl.store(out + 4 * blocks, tl.sum(tl.abs(d)))
    tl.store(out + 5 * blocks, tl.sum(tl.where(keep, scale, zero)))


def policy_loss(
    logp: Tensor,
    old_logp: Tensor,
    advantage: Tensor,
    mask: Tensor,
    offsets: Tensor,
    weight: Tensor,
    rules: Rules,
) -> tuple[Tensor, Tensor, Tensor]:
    """(sums[6], future, gradient) as kernels/policy_loss/op.py wants them.

    float32 or float64 vectors. Waits for the device only where offsets or groups lie on the CPU.
    """
    launch.check_tensors("triton", mask)
    n, with_future = logp.shape[0], rules.gamma is not None
    size = block_size() if with_future else min(block_size(), ALONE)
    blocks = ceil_div(n, size)
    cuts = packed.on_device(offsets, n, logp.device)
    segments = cuts.shape[0] - 1
    future, gradient = logp.new_empty(n if with_future else 0), torch.empty_like(logp)
    if n == 0:
        return logp.new_zeros(SUMS, dtype=torch.float64), future, gradient
    sums = logp.new_empty(SUMS, blocks, dtype=torch.float64)
    with launch.on(logp.device):
        state = None
        if rules.gamma is not None:
            state = carries(logp, old_logp, mask, cuts, rules.gamma)
        policy_loss_kernel[(blocks,)](
            logp, old_logp, advantage, mask, cuts, weight.contiguous(), state, future if with_future else None,
            gradient, sums, n, segments, segments.bit_length(), blocks, rules.gamma or 0.0, *rules[1:], size,
            num_warps=WARPS,
        )  # fmt: skip
    return sums.sum(1), future, gradient


def traffic(n: int, future: bool = True) -> tuple[int, int]:
    """(bytes, FLOP) for float32: 13·N in and 4·N out.

    With the future term 9·N in and 4·N out more, and two scans.
    """
    return (30 if future else 17) * n, (170 if future else 60) * n


def aot_cases(arch: str) -> list[AotCase]:
    """Compilations of the kernels of this file that a package for `arch` holds."""
    pointers = dict.fromkeys(("logp_ptr", "old_logp_ptr", "advantage_ptr"), "*fp32")
    pointers |= {"mask_ptr": "*u8", "offsets_ptr": "*i64", "weight_ptr": "*fp64"}
    pointers |= {
        "state_ptr": "*fp64",
        "future_ptr": "*fp32",
        "gradient_ptr": "*fp32",
        "sums_ptr": "*fp64",
    }
    rest = dict.fromkeys(("N", "segments", "steps", "blocks"), "i32")
    names = (
        "gamma",
        "future_low",
        "future_high",
        "future_weight",
        "clip_low",
        "clip_high",
        "dual_clip",
    )
    rest |= dict.fromkeys(names, "fp64") | {"BLOCK": "constexpr"}
    none = {"state_ptr": None, "future_ptr": None}
    alone = pointers | dict.fromkeys(none, "constexpr")

    def case(name: str, signature: dict[str, str], values: dict) -> AotCase:
        aligned = tuple(k for k, v in signature.items() if v.startswith("*"))
        return AotCase(name, policy_loss_kernel, signature | rest, values, WARPS, divisible=aligned)

    return [
        case("policy loss", pointers, {"BLOCK": SCAN_BLOCK}),
        case("policy loss, no future", alone, {"BLOCK": ALONE} | none),
    ]
