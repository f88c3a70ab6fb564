"""Policy losses on packed rows: pure functions of log-probs, no model.

Layout: E tokens of R rows, row after row; `offsets[R+1]` marks the rows; `mask[E]` is True where a token is trained.
Loss is minimised. Advantages, old log-probs and every Ω-derived weight are constants under differentiation.
Denominators are handed in as `Counts` of the whole mini-batch (all ranks, all micro-batches), so any split into
micro-batches gives the same gradient.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from appo.kernels import future_value
from appo.types import Counts

Aggregate = Literal["token-mean", "seq-mean-token-mean", "rollout-mean"]


def log_ratio_of(logp: Tensor, old_logp: Tensor, mask: Tensor) -> Tensor:
    """d = ℓ - μ on trained tokens, 0 elsewhere. float32[E] (float64 stays)."""
    return torch.where(mask, logp - old_logp, torch.zeros((), dtype=logp.dtype, device=logp.device))


@torch.no_grad()
def future_scale(
    log_ratio: Tensor,
    mask: Tensor,
    offsets: Tensor,
    *,
    gamma: float,
    clip: tuple[float, float] = (1.0, 1.2),
) -> Tensor:
    """A_fut = clip(Ω, *clip), Ω = exp(clamp(S, ±20)), S the discounted future log-ratio. [E] → [E], no gradient.

    Source: paper Eq. 7; algorithm.md 1.11.
    """
    s = future_value(log_ratio.detach(), mask, offsets, gamma)
    return s.clamp(-20, 20).exp().clamp(*clip)


@torch.no_grad()
def released_scale(
    log_ratio: Tensor,
    advantage: Tensor,
    mask: Tensor,
    offsets: Tensor,
    *,
    gamma: float,
    c: float = 3.0,
    clip: tuple[float, float] = (1.0, 1.2),
    safety: float = 6.0,
) -> Tensor:
    """The future factor of the authors' code: tokens with d > ln c take no part, each term clamped to ±20, and tokens
    with A < 0 and r > `safety` are capped to [0.8, 1]. [E] → [E]. Source: algorithm.md section 2."""
    d = log_ratio.detach()
    takes_part = mask & (d <= torch.tensor(c, dtype=d.dtype).log())
    s = future_value(d.clamp(-20, 20), takes_part, offsets, gamma)
    f = s.exp().clamp(*clip)
    capped = f.clamp(0.8, 1.0)
    return torch.where((advantage < 0) & (d.exp() > safety), capped, f)


def clipped_policy_loss(
    log_ratio: Tensor,
    advantage: Tensor,
    *,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None = None,
) -> Tensor:
    """PPO's clipped surrogate per token: max(-Ar, -A clip(r, 1-lo, 1+hi)), for A < 0 at most -A·dual_clip. [E] → [E]."""
    ratio = log_ratio.clamp(-20, 20).exp()
    loss = torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - clip_low, 1 + clip_high))
    if dual_clip is None:
        return loss
    return torch.where(advantage < 0, torch.minimum(loss, -advantage * dual_clip), loss)


def row_of(offsets: Tensor) -> Tensor:
    """Row number of every token: offsets[R+1] → [E] int64."""
    lengths = offsets[1:] - offsets[:-1]
    return torch.repeat_interleave(torch.arange(len(lengths), device=offsets.device), lengths)


def row_sums(values: Tensor, offsets: Tensor) -> Tensor:
    """Σ of each row: values[E] → [R], differentiable, summed in float64 order-fixed."""
    out = torch.zeros(len(offsets) - 1, dtype=torch.float64, device=values.device)
    return out.index_add(0, row_of(offsets), values.double())


def aggregate(
    per_token: Tensor,
    mask: Tensor,
    offsets: Tensor,
    mode: Aggregate,
    counts: Counts,
    weight: Tensor | None = None,
) -> Tensor:
    """per_token[E] → scalar (float64), already divided by the global denominator.

    token-mean: Σ over tokens / counts.tokens · seq-mean-token-mean: Σ of row means / counts.rows ·
    rollout-mean: Σ of row means / counts.rollouts (APPO's 1/M: branches count, though they are not trained).
    A row without trained tokens adds 0. weight[R] multiplies rows.
    """
    kept = torch.where(
        mask, per_token, torch.zeros((), dtype=per_token.dtype, device=per_token.device)
    )
    sums = row_sums(kept, offsets)
    if weight is not None:
        sums = sums * weight.double()
    if mode == "token-mean":
        return sums.sum() / max(counts.tokens, 1.0)
    means = sums / row_sums(mask.double(), offsets).clamp(min=1.0)
    return means.sum() / max(counts.rows if mode == "seq-mean-token-mean" else counts.rollouts, 1.0)


def sequence_filter(
    log_ratio: Tensor, advantage: Tensor, mask: Tensor, offsets: Tensor, *, c: float
) -> Tensor:
    """Rows that stay: at most one dual-clipped token (A < 0 and r > c). → bool[R]. Source: algorithm.md section 2."""
    hit = mask & (advantage < 0) & (log_ratio.detach().exp() > c)
    return row_sums(hit.double(), offsets) <= 1


def kl_penalty(logp: Tensor, ref_logp: Tensor, kind: Literal["k1", "k2", "k3"]) -> Tensor:
    """Per-token estimate of KL(policy ‖ reference). Source: Schulman, "Approximating KL divergence".

    k1 = d, k2 = d²/2, k3 = exp(-d) - 1 + d with d = ℓ - ℓ_ref; k3 is clamped to ±10 (gradient 0 beyond), d to ±20.
    """
    d = logp - ref_logp
    if kind == "k1":
        return d
    if kind == "k2":
        return 0.5 * d * d
    if kind == "k3":
        d = d.clamp(-20, 20)
        return (torch.exp(-d) - 1 + d).clamp(-10, 10)
    raise ValueError(f"kind={kind!r}: must be k1, k2 or k3")
