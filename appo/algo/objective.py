"""The loss function that the learner is handed.

It closes over an `Algorithm` and sees only packed tensors.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from appo.algo.algorithm import Algorithm
from appo.kernels import PolicyLoss, aggregate, policy_loss, row_weight
from appo.types import Counts


class TokenStats(Protocol):
    """Current-policy statistics per edge: logp[E], entropy[E], both float32 and differentiable."""

    @property
    def logp(self) -> Tensor:
        """Log-prob of each edge's token, nats. [E] float32."""

    @property
    def entropy(self) -> Tensor:
        """Entropy of the distribution it was drawn from, nats. [E] float32."""


class LossRows(Protocol):
    """What the loss needs of a packed batch; E edges, R rows."""

    offsets: Tensor  # [R+1]
    mask: Tensor  # [E] bool
    version: Tensor  # [E] policy version that drew the token
    behavior_logp: Tensor  # [E] log-prob under the policy that drew the token, by the engine
    # [E] log-prob that ratios are taken against; behavior_logp where the learner did not compute
    # its own
    old_logp: Tensor
    advantage: Tensor  # [E]
    weight: Tensor  # [R]


Metrics = dict[
    str, tuple[Tensor, Tensor]
]  # name → (sum, count), scalars on the device: micro-batches add up
Objective = Callable[[TokenStats, LossRows, Counts], tuple[Tensor, Metrics]]


def make_objective(
    algo: Algorithm,
    *,
    entropy_coef: float = 0.0,
    version: Callable[[], int] = lambda: -2,
    old_logp_version: Callable[[], int | None] = lambda: None,
    importance_cap: float | None = 2.0,
) -> Objective:
    """Loss of `algo` on one micro-batch, divided by the global denominators, and its metrics.

    Ratios are exp(logp - old_logp). version() is the policy version under training,
    old_logp_version() the one whose log-probs the learner computes as old log-probs (None: it
    computes none, old log-probs are what the engine recorded). Two things are then known without
    looking, and hold exactly: a token drawn by the version under training has ratio 1, and so has
    every token while the version under training is that one. What two implementations of one policy
    differ by (engine and learner: 0.02 a token in bfloat16) is rounding, not policy, and summed by
    Ω it would look like information.

    From the policy that drew a token to the old log-prob leads a constant weight on its advantage,
    truncated importance sampling: min(exp(old_logp - behavior_logp), importance_cap), 1 for tokens
    of the version under training; None: always 1.
    """

    def objective(stats: TokenStats, rows: LossRows, counts: Counts) -> tuple[Tensor, Metrics]:
        now, current = version(), stats.logp.detach()
        fresh = rows.version == now
        old_logp = (
            current if old_logp_version() == now else torch.where(fresh, current, rows.old_logp)
        )
        drift = torch.where(fresh, 0.0, old_logp - rows.behavior_logp)
        weight = importance_weight(drift, importance_cap)
        fused = policy_loss(
            stats.logp,
            old_logp,
            rows.advantage * weight,
            rows.mask,
            rows.offsets,
            row_weight(algo.aggregate, rows.mask, rows.offsets, counts, rows.weight),
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
                stats.entropy, rows.mask, rows.offsets, algo.aggregate, counts, rows.weight
            )
        per_token = {
            "entropy": stats.entropy,
            "log_ratio_behavior": (current - rows.behavior_logp).abs(),
            "is_weight": weight,
            "is_clipped": drift > math.log(importance_cap or math.inf),
            "staleness": now - rows.version,
        }
        return loss, _metrics(fused, per_token, rows.mask)

    return objective


def importance_weight(drift: Tensor, cap: float | None) -> Tensor:
    """min(exp(drift), cap) per token; drift[E] = old_logp - behavior_logp.

    No cap: no correction, 1 everywhere.
    """
    return torch.ones_like(drift) if cap is None else drift.clamp(-20.0, math.log(cap)).exp()


@torch.no_grad()
def _metrics(fused: PolicyLoss, per_token: dict[str, Tensor], mask: Tensor) -> Metrics:
    """Means over trained tokens: those the loss has summed already, and those given per token.

    Does not wait for them.
    """
    sums = {"clip_fraction": fused.clipped, "kl_old_logp": fused.kl, "log_ratio_abs": fused.log_ratio_abs,
            "future_scale": fused.scale}  # fmt: skip
    sums |= {name: torch.where(mask, x, 0).double().sum() for name, x in per_token.items()}
    return {f"policy/{name}": (value, fused.tokens) for name, value in sums.items()}
