"""The policy loss, formula by formula, in PyTorch and float64: Eq. 7 and 8 of arXiv 2606.12384.

`backend_torch` is composed of these functions; the native code (csrc/policy_loss.cpp) and the
Triton kernel (gpu/policy_loss.py) compute the same in one pass and are tested against it.
`appo.algo.objective` takes the denominators from here.

Layout: N tokens of R rows, row after row; offsets[R+1] marks the rows; mask[N] is True where a
token is trained. Losses are minimized. Advantages, old log-probs and every Ω-derived weight are
constants under differentiation.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from appo._kernels.branching import definition as branching
from appo.types import Aggregate, Counts

CLAMP = branching.SUM_CLAMP  # on log-ratios before exp


def log_ratio(logp: Tensor, old_logp: Tensor, mask: Tensor) -> Tensor:
    """d_t = m_t (ℓ_t - o_t). [N] → float64[N]."""
    return torch.where(mask, logp.double() - old_logp.double(), 0.0)


def ratio(d: Tensor) -> Tensor:
    """r_t = exp(clamp(d_t, ±20)). [N] → [N]."""
    return d.clamp(-CLAMP, CLAMP).exp()


def future_factor(
    d: Tensor, mask: Tensor, offsets: Tensor, gamma: float, low: float, high: float
) -> Tensor:
    """f_t = clip(exp(clamp(S_t, ±20)), low, high), S_t = Σ_{k ≥ t} γ^(k-t) d_k (Eq. 7).

    [N] → [N]
    """
    return branching.omega(branching.future_value_torch(d, mask, offsets, gamma), low, high)


def future_scale(f: Tensor, b: float) -> Tensor:
    """1 + b f_t: what A_base is multiplied with (Eq. 7). [N] → [N]."""
    return 1.0 + b * f


def clipped_surrogate(
    a: Tensor, r: Tensor, clip_low: float, clip_high: float, dual_clip: float
) -> Tensor:
    """u_t = max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high)) (Eq. 8).

    It is at most -A · dual_clip where A < 0.

    a[N], r[N] → [N]; dual_clip inf: no dual clip.
    """
    value = torch.maximum(-a * r, -a * r.clamp(1.0 - clip_low, 1.0 + clip_high))
    bound = torch.where(a < 0, -a * dual_clip, math.inf)
    return torch.where(value > bound, bound, value)


def surrogate_slope(
    a: Tensor, d: Tensor, clip_low: float, clip_high: float, dual_clip: float
) -> Tensor:
    """∂u_t / ∂d_t = -A r where the unclipped term is the maximum, within dual_clip and |d| ≤ 20.

    Else 0.

    a[N], d[N] → [N]. NaN stays NaN.
    """
    r = ratio(d)
    plain, bounded = -a * r, -a * r.clamp(1.0 - clip_low, 1.0 + clip_high)
    slope = torch.where(plain < bounded, 0.0, plain)
    bound = torch.where(a < 0, -a * dual_clip, math.inf)
    return torch.where((torch.maximum(plain, bounded) > bound) | (d.abs() > CLAMP), 0.0, slope)


def is_clipped(advantage: Tensor, r: Tensor, clip_low: float, clip_high: float) -> Tensor:
    """r > 1 + clip_high where A > 0, r < 1 - clip_low where A < 0. [N] → bool[N]."""
    up, down = r > 1.0 + clip_high, r < 1.0 - clip_low
    return ((advantage > 0) & up) | ((advantage < 0) & down)


def kl_estimate(d: Tensor, r: Tensor) -> Tensor:
    """r - 1 - d, the k3 estimate of KL(old ‖ current). [N] → [N]."""
    return r - 1.0 - d


def row_of(offsets: Tensor) -> Tensor:
    """Row number of every token: offsets[R+1] → int64[N]."""
    lengths = offsets[1:] - offsets[:-1]
    return torch.repeat_interleave(torch.arange(len(lengths), device=offsets.device), lengths)


def row_sums(x: Tensor, row: Tensor, rows: int) -> Tensor:
    """Σ of each row.

    x[N], row[N] as `row_of` gives it → float64[R], differentiable, in a fixed order.
    """
    return x.new_zeros(rows, dtype=torch.float64).index_add(0, row, x.double())


def denominators(
    mode: Aggregate, mask: Tensor, offsets: Tensor, counts: Counts
) -> tuple[Tensor, float]:
    """What a row's sum is divided by, and what the sum of rows is divided by.

    ([R] float64, number).

    token-mean            1     tokens of the mini-batch
    seq-mean-token-mean   T_i   trained rows of the mini-batch
    rollout-mean          T_i   graded leaves of the mini-batch: branches count, trained or not

    T_i: tokens of row i in the mask, at least 1. `counts` are those of all ranks and micro-batches,
    so any split into micro-batches gives the same gradient.
    """
    rows = offsets.shape[0] - 1
    if mode == "token-mean":
        ones = torch.ones(rows, dtype=torch.float64, device=mask.device)
        return ones, max(counts.tokens, 1.0)
    total = counts.rows if mode == "seq-mean-token-mean" else counts.rollouts
    return row_sums(mask, row_of(offsets), rows).clamp(min=1.0), max(total, 1.0)


@torch.no_grad()
def row_weight(
    mode: Aggregate, mask: Tensor, offsets: Tensor, counts: Counts, weight: Tensor
) -> Tensor:
    """`denominators` as one factor per row, for `policy_loss`: weight[R] / T_i / total.

    float64[R]
    """
    tokens, total = denominators(mode, mask, offsets, counts)
    return weight.double() / tokens / total


def aggregate(
    x: Tensor, mask: Tensor, offsets: Tensor, mode: Aggregate, counts: Counts, weight: Tensor
) -> Tensor:
    """Σ_rows weight_i · Σ_t m_t x_t / T_i / total.

    x[N], weight[R] → scalar, float64, differentiable.

    Values outside the mask count nothing, NaN or not.
    """
    kept = torch.where(mask, x, torch.zeros((), dtype=x.dtype, device=x.device))
    tokens, total = denominators(mode, mask, offsets, counts)
    sums = row_sums(kept, row_of(offsets), weight.shape[0])
    return (sums * weight.double() / tokens).sum() / total
