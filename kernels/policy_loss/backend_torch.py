"""The policy loss and its gradient in PyTorch: `definition`, put together.

Every device, float64 inside.
"""

from __future__ import annotations

import torch
from torch import Tensor

from appo._kernels.common import packed
from appo._kernels.policy_loss import definition
from appo._kernels.policy_loss.rules import Rules, stored


def policy_loss_torch(
    logp: Tensor,
    old_logp: Tensor,
    advantage: Tensor,
    mask: Tensor,
    offsets: Tensor,
    weight: Tensor,
    rules: Rules,
) -> tuple[Tensor, Tensor, Tensor]:
    """(sums[6], future, gradient) as `op.policy_loss_op` returns them."""
    segment = packed.segment_ids(offsets, logp)
    keep, own = mask.to(torch.bool), advantage.double()
    clips = (rules.clip_low, rules.clip_high)
    d = definition.log_ratio(logp, old_logp, keep)
    ratio = definition.ratio(d)
    future, scale = d.new_empty(0), torch.ones_like(d)
    if rules.gamma is not None:
        bounds = (rules.future_low, rules.future_high)
        future = definition.future_factor(d, keep, offsets, rules.gamma, *bounds)
        scale = definition.future_scale(future, rules.future_weight)
    a = own * scale
    value = definition.clipped_surrogate(a, ratio, *clips, rules.dual_clip)
    slope = definition.surrogate_slope(a, d, *clips, rules.dual_clip)

    def row_sums(x: Tensor) -> Tensor:
        return definition.row_sums(torch.where(keep, x, 0.0), segment, weight.shape[0])

    clipped = definition.is_clipped(own, ratio, *clips)
    kl = definition.kl_estimate(d, ratio)
    metrics = (torch.ones_like(d), clipped.double(), kl, d.abs(), scale)
    sums = torch.stack([weight @ row_sums(value), *(row_sums(x).sum() for x in metrics)])
    gradient = torch.where(keep, weight[segment] * slope, 0.0)
    return sums, future.to(logp.dtype), gradient.to(stored(logp))
