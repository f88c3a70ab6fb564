"""Eq. 3 to 5 of arXiv 2606.12384 in PyTorch, float64.

The formulas that every backend is tested against.

Everything works on *packed* roots: vectors of N tokens and offsets[B+1] that cut them into B
segments, one per root. The torch backends call these functions. The policy loss calls
`future_value_torch` and `omega` too (Eq. 7).
"""

from __future__ import annotations

import torch
from torch import Tensor

from appo._kernels.common import packed

SUM_CLAMP = 20.0  # on log-ratios and on their discounted sums, before exp
Z_EPS = 1e-6  # added to the population standard deviation
FLAT = 1e-8  # a standard deviation below FLAT · max(1, max|x|) is rounding, not information

RULE_STRICT, RULE_ENTROPY, RULE_PRODUCT = 0, 1, 2


def future_value_torch(log_ratio: Tensor, mask: Tensor, offsets: Tensor, gamma: float) -> Tensor:
    """S_t = Σ_{k ≥ t} γ^(k-t) · mask_k · d_k inside each segment (Eq. 4).

    [N] in the dtype of log_ratio.

    By doubling: after step j every token holds the sum of its next 2^j terms. O(N log L).
    """
    offsets = offsets.to(log_ratio.device)
    lengths = packed.segment_lengths(offsets, log_ratio.shape[0])
    total = torch.where(mask.to(torch.bool), log_ratio.double(), 0.0)
    if total.numel() == 0 or gamma == 0.0:
        return total.to(log_ratio.dtype)
    end = torch.repeat_interleave(offsets[1:], lengths)  # [N] one past each token's own segment
    position = torch.arange(total.shape[0], device=total.device)
    longest, reach = int(lengths.max()), 1
    while reach < longest:
        inside = position[:-reach] + reach < end[:-reach]
        ahead = torch.where(inside, total[reach:], 0.0)
        if gamma**reach == 0.0:
            break  # not 0 · inf: what is that far ahead has no weight
        total = torch.cat([total[:-reach] + gamma**reach * ahead, total[-reach:]])
        reach *= 2
    return total.to(log_ratio.dtype)


def omega(future: Tensor, low: float, high: float) -> Tensor:
    """clip(exp(clamp(S, ±20)), low, high): Ω of Eq. 5, and f of Eq. 7. [N] → [N]."""
    return future.clamp(-SUM_CLAMP, SUM_CLAMP).exp().clamp(low, high)


def standardise(
    x: Tensor, mask: Tensor, segment: Tensor, segments: int, variant: str
) -> tuple[Tensor, Tensor]:
    """z = (x - mean) / (std + 1e-6) over the mask tokens of each segment.

    Population std, in two passes.

    x[N] float64, mask[N] bool, segment[N] → (z[N], 0 where the mask is False; uninformative[B]).
    "paper": a vector whose deviation is rounding is standardized to exactly 0; "released": the bare
    formula.
    """

    def per_segment(values: Tensor) -> Tensor:
        return values.new_zeros(segments).index_add_(0, segment, values)

    count = per_segment(mask.double()).clamp(min=1.0)
    mean = per_segment(torch.where(mask, x, 0.0)) / count
    centred = torch.where(mask, x - mean[segment], 0.0)
    std = (per_segment(centred.square()) / count).sqrt()
    largest = x.new_zeros(segments).scatter_reduce_(
        0, segment, torch.where(mask, x.abs(), 0.0), "amax"
    )
    uninformative = std <= FLAT * largest.clamp(min=1.0)  # False for NaN: unknown is not flat
    z = centred / (std + Z_EPS)[segment]
    if variant == "paper":
        z = torch.where(uninformative[segment], 0.0, z)
    return torch.where(mask, z, 0.0), uninformative


def branching_score(z_entropy: Tensor, z_omega: Tensor) -> Tensor:
    """BS = z(clip(Ω)) · z(H) (Eq. 5). [N] → [N]."""
    return z_entropy * z_omega


def branch_scores_torch(
    entropy: Tensor,
    log_ratio: Tensor,
    mask: Tensor,
    offsets: Tensor,
    gamma: float,
    clip: float,
    variant: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The fields of `BranchScores`."""
    m, segments = mask.to(torch.bool), offsets.shape[0] - 1
    segment = packed.segment_ids(offsets, log_ratio)
    future = future_value_torch(log_ratio.double(), m, offsets, gamma)
    clipped = omega(future, 1.0 - clip, 1.0 + clip)
    z_omega, uninformative = standardise(clipped, m, segment, segments, variant)
    z_entropy, _ = standardise(entropy.double(), m, segment, segments, variant)
    score = branching_score(z_entropy, z_omega)
    dtype = log_ratio.dtype
    z_h, z_o = z_entropy.to(dtype), z_omega.to(dtype)
    return clipped.to(dtype), z_h, z_o, score.to(dtype), uninformative


def ranking(
    z_entropy: Tensor, z_omega: Tensor, score: Tensor, eligible: Tensor, variant: str
) -> tuple[Tensor, Tensor, Tensor]:
    """(usable[N] bool, rule[N], value[N]): candidates go by rule, then by value, the largest first.

    strict    eligible, z(H) > 0 and z(Ω) > 0      by the score
    entropy   eligible, z(H) > 0                   by z(H); "paper" only
    product   eligible                             by the score; "released" only
    """
    candidate = eligible.to(torch.bool)
    strict = candidate & (z_entropy > 0) & (z_omega > 0)
    if variant == "paper":
        usable, filler = candidate & (z_entropy > 0), RULE_ENTROPY
        value = torch.where(strict, score, z_entropy)
    else:
        usable, filler, value = candidate, RULE_PRODUCT, score
    return usable, torch.where(strict, RULE_STRICT, filler), value
