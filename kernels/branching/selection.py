"""The choice of positions to branch at.

The best k of every group by strictness, value and position.

The order is total, so selection has one result, whatever computes it: `_select_torch` by
`definition.ranking`, csrc/branching/selection.cpp or kernels/branching/gpu/topk.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from appo._kernels.branching import definition
from appo._kernels.branching.op import BranchScores, check_variant
from appo._kernels.common import native, packed

RULE_EMPTY, RULE_REPEAT = -1, 3  # the others: `definition`


@dataclass(frozen=True)
class BranchPoints:
    """The positions chosen in each segment.

    index[G, k] int64 packed positions (-1: slot not filled), count[G] filled slots, rule[G, k]
    which rule filled it.

    Rules: 0 strict, 1 entropy, and for `released` only 2 raw product, 3 repeat of an earlier slot;
    -1 not filled.
    """

    index: Tensor
    count: Tensor
    rule: Tensor


@torch.no_grad()
def select_branch_points(
    scores: BranchScores,
    eligible: Tensor,
    offsets: Tensor,
    groups: Tensor | None,
    k: int,
    variant: str = "paper",
    *,
    backend: str = "auto",
) -> BranchPoints:
    """The k positions to branch at in every group of segments.

    default: each segment is a group of its own.

    eligible[N] bool: sampled, not blank, not the end, room left; groups[B] integers number each
    segment's group, 0 … G-1 "paper": strict candidates (z_entropy > 0 and z_omega > 0) by score,
    then positives of z_entropy; distinct; never the raw product, in which two negatives look good.
    What is missing shows in `count`. "released": strict candidates by score, then any candidate by
    raw product, then repeats from the first on. Ties go to the earlier packed position; NaN ranks
    lowest; -0 equals +0. k may exceed a group's tokens. backend "auto" | "torch" | "cpu" | "triton"
    (k ≤ 64, float32 scores; "auto" falls back to "torch" otherwise). On a GPU `groups` are looked
    at once, which waits for the device. Raises ValueError for shapes, offsets, groups or a k that
    do not fit.
    """
    how = packed.choose(backend, scores.score)
    check_variant(variant)
    if k < 0:
        raise ValueError(f"k is {k}, expected ≥ 0")
    packed.check_vectors(
        offsets,
        eligible=eligible,
        score=scores.score,
        z_entropy=scores.z_entropy,
        z_omega=scores.z_omega,
    )
    group, n_groups = _groups(groups, offsets)
    if backend == "auto" and how == "triton" and (k > 64 or scores.score.dtype == torch.float64):
        how = "torch"
    run = {"torch": _select_torch, "cpu": _select_cpu, "triton": _select_triton}[how]
    index, rule, count = run(scores, eligible, offsets, group, n_groups, k, variant)
    if variant == "released":
        index, rule, count = _repeat(index, rule, count)
    return BranchPoints(index, count, rule)


def _groups(groups: Tensor | None, offsets: Tensor) -> tuple[Tensor, int]:
    """(group of each segment [B] int64, number of groups)."""
    segments = offsets.shape[0] - 1
    if groups is None:
        return torch.arange(segments, device=offsets.device), segments
    if groups.shape != (segments,):
        raise ValueError(f"groups has shape {tuple(groups.shape)}, expected [{segments}]")
    if groups.is_floating_point() or groups.dtype == torch.bool:
        raise TypeError(f"groups is {groups.dtype}, expected integers")
    if segments == 0:
        return groups.to(torch.int64), 0
    low, high = groups.aminmax()
    if int(low) < 0:
        raise ValueError(f"groups holds {int(low)}, expected numbers from 0 on")
    return groups.to(torch.int64), int(high) + 1


Chosen = tuple[Tensor, Tensor, Tensor]  # index[G, k], rule[G, k], count[G]


def _select_cpu(
    scores: BranchScores,
    eligible: Tensor,
    offsets: Tensor,
    group: Tensor,
    n_groups: int,
    k: int,
    variant: str,
) -> Chosen:
    z = packed.widened(scores.z_entropy, scores.z_omega, scores.score)
    index = torch.empty(n_groups * k, dtype=torch.int64)
    rule, count = torch.empty_like(index), torch.empty(n_groups, dtype=torch.int64)
    native.require("select_branch_points")(
        *z, packed.as_bytes(eligible), packed.on_host(offsets), group.contiguous(), k,
        variant == "paper", index, rule, count, torch.get_num_threads(),
    )  # fmt: skip
    return index.view(n_groups, k), rule.view(n_groups, k), count


def _select_triton(
    scores: BranchScores,
    eligible: Tensor,
    offsets: Tensor,
    group: Tensor,
    n_groups: int,
    k: int,
    variant: str,
) -> Chosen:
    z = packed.widened(scores.z_entropy, scores.z_omega, scores.score)
    m = packed.as_bytes(eligible)
    run = packed.gpu("branching.gpu.topk").select_branch_points
    return run(z, m, offsets, group, n_groups, k, variant == "paper")


def _select_torch(
    scores: BranchScores,
    eligible: Tensor,
    offsets: Tensor,
    groups: Tensor,
    n_groups: int,
    k: int,
    variant: str,
) -> Chosen:
    group = groups.to(eligible.device)[packed.segment_ids(offsets, eligible)]  # [N]
    z = (scores.z_entropy, scores.z_omega, scores.score)
    usable, rule, value = definition.ranking(*z, eligible, variant)

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
    return index, rules, found.clamp(max=k)


def _repeat(index: Tensor, rule: Tensor, count: Tensor) -> Chosen:
    """Fill free slots with the chosen ones over again, cyclically.

    A group with none stays empty.
    """
    k = index.shape[1]
    slot = torch.arange(k, device=index.device).expand_as(index)
    source = slot % count.clamp(min=1)[:, None]
    repeated = (slot >= count[:, None]) & (count[:, None] > 0)
    rule = torch.where(repeated, RULE_REPEAT, rule)
    return index.gather(1, source), rule, torch.where(count > 0, k, 0)
