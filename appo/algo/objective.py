"""The loss function that the learner is handed: it closes over an `Algorithm` and sees only packed tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from appo.algo.losses import aggregate, clipped_policy_loss, future_scale, log_ratio_of
from appo.algo.presets import Algorithm
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
        d = log_ratio_of(stats.logp, behaviour, mask)
        scale = torch.ones_like(d)
        if algo.future_weight:
            fut = future_scale(d, mask, rows.offsets, gamma=algo.gamma, clip=algo.future_clip)
            scale = 1 + algo.future_weight * fut
        advantage = rows.advantage * scale
        per_token = clipped_policy_loss(
            d,
            advantage,
            clip_low=algo.clip_low,
            clip_high=algo.clip_high,
            dual_clip=algo.dual_clip,
        )
        loss = aggregate(per_token, mask, rows.offsets, algo.aggregate, counts, rows.weight)
        if entropy_coef:
            loss = loss - entropy_coef * aggregate(
                stats.entropy, mask, rows.offsets, algo.aggregate, counts, rows.weight
            )
        return loss, _metrics(d, rows.advantage, scale, stats.entropy, mask, algo)

    return objective


@torch.no_grad()
def _metrics(
    d: Tensor, advantage: Tensor, scale: Tensor, entropy: Tensor, mask: Tensor, algo: Algorithm
) -> Metrics:
    n = float(mask.sum())
    d, a = d[mask].double(), advantage[mask]
    ratio = d.clamp(-20, 20).exp()
    clipped = ((a > 0) & (ratio > 1 + algo.clip_high)) | ((a < 0) & (ratio < 1 - algo.clip_low))
    return {
        "policy/clip_fraction": (float(clipped.sum()), n),
        "policy/kl_behaviour": (float((ratio - 1 - d).sum()), n),  # k3 of KL(behaviour ‖ current)
        "policy/log_ratio_abs": (float(d.abs().sum()), n),
        "policy/entropy": (float(entropy[mask].double().sum()), n),
        "policy/future_scale": (float(scale[mask].double().sum()), n),
    }
