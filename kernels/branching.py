"""Where to branch: the Branching Score and the choice of positions (arXiv 2606.12384, section 4).

Everything works on *packed* roots: vectors of N tokens and offsets[B+1] that cut them into B segments, one per root
rollout. A mask marks tokens that the policy sampled; tool tokens add nothing but keep their place in the exponent.
All sums run in float64: they are O(N), and a clipped ratio is so nearly constant that float32 would standardise noise.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from appo.kernels.scan import future_value, segment_ids

SUM_CLAMP = 20.0  # on the discounted sum of log-ratios, before exp
Z_EPS = 1e-6  # added to the population standard deviation
FLAT = 1e-8  # a standard deviation below FLAT · max(1, max|x|) is rounding, not information

RULE_EMPTY, RULE_STRICT, RULE_ENTROPY, RULE_PRODUCT, RULE_REPEAT = -1, 0, 1, 2, 3


class BranchScores(NamedTuple):
    """Per token [N] in the dtype of the log-ratios; 0 (omega: as computed) where the mask is False.

    omega     exp of the future value, clipped to 1 ± clip
    z_entropy, z_omega   standardised over the mask tokens of the segment
    score     z_entropy · z_omega
    flat[B]   True where omega carries no information in that segment
    """

    omega: Tensor
    z_entropy: Tensor
    z_omega: Tensor
    score: Tensor
    flat: Tensor


@dataclass(frozen=True)
class BranchPoints:
    """index[G, k] int64 packed positions (-1: slot not filled), count[G] filled slots, rule[G, k] which rule filled it.

    Rules: 0 strict, 1 entropy, and for `released` only 2 raw product, 3 repeat of an earlier slot; -1 not filled.
    """

    index: Tensor
    count: Tensor
    rule: Tensor


@torch.no_grad()
def branch_scores(
    entropy: Tensor,
    log_ratio: Tensor,
    mask: Tensor,
    offsets: Tensor,
    *,
    gamma: float,
    clip: float,
    variant: str = "paper",
    backend: str = "auto",
) -> BranchScores:
    """Branching Score z(clip(Ω, 1 ± clip)) · z(entropy) with Ω = exp(clamp(S, ± 20)), per segment.

    entropy[N] nats, log_ratio[N] current minus behaviour log-prob, mask[N], offsets[B+1]; see `future_value`.
    z uses the population standard deviation + 1e-6 over mask tokens, two passes in float64.
    variant "paper": a vector whose deviation is rounding (≤ 1e-8 · max(1, max|x|)) is standardised to exactly 0;
    "released": the bare formula. `flat` is reported in both.
    """
    _check_variant(variant)
    m = mask.to(torch.bool)
    future = future_value(log_ratio.double(), m, offsets, gamma, backend=backend)
    omega = future.clamp(-SUM_CLAMP, SUM_CLAMP).exp().clamp(1.0 - clip, 1.0 + clip)
    segment = segment_ids(offsets, log_ratio.shape[0])
    z_omega, flat = _standardise(omega, m, segment, offsets.shape[0] - 1, variant)
    z_entropy, _ = _standardise(entropy.double(), m, segment, offsets.shape[0] - 1, variant)
    score = z_entropy * z_omega
    dtype = log_ratio.dtype
    return BranchScores(
        omega.to(dtype), z_entropy.to(dtype), z_omega.to(dtype), score.to(dtype), flat
    )


def _standardise(
    x: Tensor, mask: Tensor, segment: Tensor, segments: int, variant: str
) -> tuple[Tensor, Tensor]:
    """(z[N], flat[B]) over the mask tokens of each segment; 0 where the mask is False. float64."""

    def per_segment(values: Tensor) -> Tensor:
        return values.new_zeros(segments).index_add_(0, segment, values)

    count = per_segment(mask.double()).clamp(min=1.0)
    mean = per_segment(torch.where(mask, x, 0.0)) / count
    centred = torch.where(mask, x - mean[segment], 0.0)
    std = (per_segment(centred.square()) / count).sqrt()
    largest = x.new_zeros(segments).scatter_reduce_(
        0, segment, torch.where(mask, x.abs(), 0.0), "amax"
    )
    flat = std <= FLAT * largest.clamp(min=1.0)  # False for NaN: unknown is not flat
    z = centred / (std + Z_EPS)[segment]
    if variant == "paper":
        z = torch.where(flat[segment], 0.0, z)
    return torch.where(mask, z, 0.0), flat


@torch.no_grad()
def select_branch_points(
    scores: BranchScores,
    eligible: Tensor,
    offsets: Tensor,
    groups: Tensor | None,
    k: int,
    variant: str = "paper",
) -> BranchPoints:
    """The k positions to branch at in every group of segments (default: each segment is a group of its own).

    eligible[N] bool: sampled, not blank, not the end, room left; groups[B] int64 numbers each segment's group, 0 … G-1
    "paper": strict candidates (z_entropy > 0 and z_omega > 0) by score, then positives of z_entropy; distinct; never the
    raw product, in which two negatives look good. What is missing shows in `count`.
    "released": strict candidates by score, then any candidate by raw product, then repeats from the first on.
    Ties go to the earlier packed position; NaN ranks lowest; -0 equals +0.
    """
    _check_variant(variant)
    if k < 0:
        raise ValueError(f"k is {k}, expected ≥ 0")
    n, segments = eligible.shape[0], offsets.shape[0] - 1
    if groups is None:
        groups = torch.arange(segments, device=eligible.device)
    elif groups.shape != (segments,):
        raise ValueError(f"groups has shape {tuple(groups.shape)}, expected [{segments}]")
    n_groups = int(groups.max()) + 1 if segments else 0
    group = groups[segment_ids(offsets, n)]  # [N]

    candidate = eligible.to(torch.bool)
    strict = candidate & (scores.z_entropy > 0) & (scores.z_omega > 0)
    if variant == "paper":
        value = torch.where(strict, scores.score, scores.z_entropy)
        usable, filler = candidate & (scores.z_entropy > 0), RULE_ENTROPY
    else:
        value, usable, filler = scores.score, candidate, RULE_PRODUCT
    rule = torch.where(strict, RULE_STRICT, filler)

    # One stable sort per key, least important first; positions are in order to begin with.
    order = usable.nonzero()[:, 0]
    rank_value = torch.nan_to_num(value, nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf) + 0.0
    for key, down in ((rank_value, True), (rule, False), (group, False)):
        order = order[torch.argsort(key[order], descending=down, stable=True)]

    found = torch.bincount(group[order], minlength=n_groups)
    slot = (
        torch.arange(order.shape[0], device=order.device) - (found.cumsum(0) - found)[group[order]]
    )
    chosen, slot = order[slot < k], slot[slot < k]
    index = torch.full((n_groups, k), -1, dtype=torch.int64, device=order.device)
    rules = torch.full_like(index, RULE_EMPTY)
    index[group[chosen], slot] = chosen
    rules[group[chosen], slot] = rule[chosen]
    count = found.clamp(max=k)
    if variant == "released":
        index, rules, count = _repeat(index, rules, count)
    return BranchPoints(index, count, rules)


def _repeat(index: Tensor, rule: Tensor, count: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Fill free slots with the chosen ones over again, cyclically; a group with none stays empty."""
    k = index.shape[1]
    slot = torch.arange(k, device=index.device).expand_as(index)
    source = slot % count.clamp(min=1)[:, None]
    repeated = (slot >= count[:, None]) & (count[:, None] > 0)
    rule = torch.where(repeated, RULE_REPEAT, rule)
    return index.gather(1, source), rule, torch.where(count > 0, k, 0)


def _check_variant(variant: str) -> None:
    if variant not in ("paper", "released"):
        raise ValueError(f"variant is {variant!r}, expected 'paper' or 'released'")
