"""The loss function that the learner is handed: it closes over an `Algorithm` and sees only packed tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from appo.algo.losses import aggregate, row_sums
from appo.algo.presets import Algorithm
from appo.kernels import PolicyLoss, policy_loss
from appo.types import Counts


class TokenStats(Protocol):
    """Current-policy statistics per edge: logp[E], entropy[E], both float32 and differentiable."""

    logp: Tensor
    entropy: Tensor


class Rows(Protocol):
    """What the loss needs of a packed batch; E edges, R rows."""

    offsets: Tensor  # [R+1]
    mask: Tensor  # [E] bool
    version: Tensor  # [E] policy version that drew the token
    behaviour: Tensor  # [E]
    advantage: Tensor  # [E]
    weight: Tensor  # [R]


Metrics = dict[str, tuple[float, float]]  # name → (sum, count), so that micro-batches add up
Objective = Callable[[TokenStats, Rows, Counts], tuple[Tensor, Metrics]]


def make_objective(
    algo: Algorithm, *, entropy_coef: float = 0.0, version: Callable[[], int] = lambda: -2
) -> Objective:
    """Loss of `algo` on one micro-batch, divided by the global denominators, and its metrics.

    version() is the policy version under training. A token drawn by that very version has ratio 1 exactly: what two
    implementations of one policy differ by (engine and learner: 0.02 a token in bfloat16) is rounding, not policy,
    and summed by Ω it would look like information.
    """

    def objective(stats: TokenStats, rows: Rows, counts: Counts) -> tuple[Tensor, Metrics]:
        mask = rows.mask
        on_policy = rows.version == version()
        behaviour = torch.where(on_policy, stats.logp.detach(), rows.behaviour)
        fused = policy_loss(
            stats.logp,
            behaviour,
            rows.advantage,
            mask,
            rows.offsets,
            _row_weight(rows, algo, counts),
            gamma=algo.gamma if algo.future_weight else None,
            future_clip=algo.future_clip,
            future_weight=algo.future_weight,
            clip_low=algo.clip_low,
            clip_high=algo.clip_high,
            dual_clip=algo.dual_clip,
        )
        loss = fused.loss
        if entropy_coef:
            loss = loss - entropy_coef * aggregate(
                stats.entropy, mask, rows.offsets, algo.aggregate, counts, rows.weight
            )
        return loss, _metrics(fused, stats.entropy, mask)

    return objective


@torch.no_grad()
def _row_weight(rows: Rows, algo: Algorithm, counts: Counts) -> Tensor:
    """The denominators of `losses.aggregate` as one factor per row. float64[R]"""
    weight = rows.weight.double()
    if algo.aggregate == "token-mean":
        return weight / max(counts.tokens, 1.0)
    total = counts.rows if algo.aggregate == "seq-mean-token-mean" else counts.rollouts
    return weight / row_sums(rows.mask, rows.offsets).clamp(min=1.0) / max(total, 1.0)


@torch.no_grad()
def _metrics(fused: PolicyLoss, entropy: Tensor, mask: Tensor) -> Metrics:
    entropy_sum = torch.where(mask, entropy, 0.0).double().sum()
    sums = (fused.clipped, fused.kl, fused.log_ratio_abs, entropy_sum, fused.scale)
    n, *values = torch.stack([fused.tokens, *sums]).tolist()  # the one wait for the device
    names = ("clip_fraction", "kl_behaviour", "log_ratio_abs", "entropy", "future_scale")
    return {f"policy/{name}": (value, n) for name, value in zip(names, values)}
