"""The policy loss in one pass over the tokens.

Ratio, future-aware scale, clipped surrogate, its gradient, its metrics.

`definition` holds the formulas one by one. Composed by autograd they read the vectors a dozen
times, once more for each metric, and keep their intermediates for backward. Here one pass reads
logp, old_logp, advantage and mask and writes the gradient, so that backward is a single product.
The native code (csrc/policy_loss/policy_loss.cpp), the Triton kernel (gpu/policy_loss.py) and
`backend_torch`, which calls the definition, are tested against each other.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from appo._kernels.common import native, packed
from appo._kernels.common.operators import operator
from appo._kernels.policy_loss.backend_torch import policy_loss_torch
from appo._kernels.policy_loss.rules import Rules, check, stored


class PolicyLoss(NamedTuple):
    """loss [] float64, differentiable by logp.

    The rest without gradient, float64, on the device (no wait to compute it).

    future[N]       the future factor f in the dtype of logp, also behind the mask; no items without
                    gamma
    tokens          tokens in the mask
    clipped         of those, r > 1 + clip_high with A > 0 or r < 1 - clip_low with A < 0
    kl              Σ r - 1 - d, the k3 estimate of KL(old ‖ current)
    log_ratio_abs   Σ |d|
    scale           Σ 1 + future_weight · f
    """

    loss: Tensor
    future: Tensor
    tokens: Tensor
    clipped: Tensor
    kl: Tensor
    log_ratio_abs: Tensor
    scale: Tensor


def policy_loss(
    logp: Tensor,
    old_logp: Tensor,
    advantage: Tensor,
    mask: Tensor,
    offsets: Tensor,
    row_weight: Tensor | None = None,
    *,
    gamma: float | None = None,
    future_clip: tuple[float, float] = (1.0, 1.2),
    future_weight: float = 0.0,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
    dual_clip: float | None = None,
    backend: str = "auto",
) -> PolicyLoss:
    """Σ_rows w_row · Σ_{t in mask} max(-A'r, -A' clip(r, 1-clip_low, 1+clip_high)).

    Each term is at most -A' · dual_clip where A' < 0.

        d = logp - old_logp in the mask, 0 elsewhere        r = exp(clamp(d, ±20))
        f = clip(exp(clamp(S, ±20)), *future_clip)           S_t = Σ_{k≥t} γ^(k-t) d_k over the raw positions of the row
        A' = advantage · (1 + future_weight · f)             a constant under differentiation, like f

    logp[N]          floating point; the only input with a gradient, which is 0 where |d| > 20
    old_logp[N], advantage[N]  constants; mask[N]; offsets[B+1] cut the tokens into rows
    row_weight[B]    constant; None: 1. Holds the denominator: 1/tokens for a token mean, 1/(tokens
                     of the row · rows) for the mean of row means
    gamma            None: no future term (future_weight must be 0)
    backend          "auto" | "torch" | "cpu" | "triton"; see `packed`. "triton" trusts offsets on
                     the GPU
    Arithmetic in float64 for every dtype: the sums are O(N), and the loss is a small difference of
    large parts. Not twice differentiable. NaN or infinite inputs in the mask show in the loss and
    in their own gradient. Raises ValueError for shapes, devices and numbers that do not fit.
    """
    packed.check_vectors(offsets, logp=logp, old_logp=old_logp, advantage=advantage, mask=mask)
    rows = offsets.shape[0] - 1
    if row_weight is not None and row_weight.shape != (rows,):
        raise ValueError(f"row_weight has shape {tuple(row_weight.shape)}, expected [{rows}]")
    packed.check_floating(logp=logp)
    limit = math.inf if dual_clip is None else dual_clip
    rules = Rules(gamma, *future_clip, future_weight, clip_low, clip_high, limit)
    check(rules)
    weight = logp.new_ones(rows, dtype=torch.float64) if row_weight is None else row_weight
    weight = weight.detach().to(device=logp.device, dtype=torch.float64)
    sums, future = _Fused.apply(logp, old_logp, advantage, mask, offsets, weight, backend, rules)
    return PolicyLoss(sums[0], future, *sums.detach()[1:].unbind())


class _Fused(torch.autograd.Function):
    """Forward keeps the gradient of the loss by logp; backward scales it."""

    @staticmethod
    def forward(
        ctx: Any,
        logp: Tensor,
        old_logp: Tensor,
        advantage: Tensor,
        mask: Tensor,
        offsets: Tensor,
        weight: Tensor,
        backend: str,
        rules: Rules,
    ) -> tuple[Tensor, Tensor]:
        vectors = (old_logp.detach(), advantage.detach(), mask, offsets, weight)
        sums, future, gradient = policy_loss_op(logp.detach(), *vectors, backend, *rules)
        ctx.save_for_backward(gradient)
        ctx.dtype = logp.dtype
        ctx.mark_non_differentiable(future)
        return sums, future

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_sums: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return (gradient * d_sums[0].to(gradient.dtype)).to(ctx.dtype), *([None] * 7)


def _policy_loss(
    logp: Tensor,
    old_logp: Tensor,
    advantage: Tensor,
    mask: Tensor,
    offsets: Tensor,
    weight: Tensor,
    backend: str,
    gamma: float | None,
    future_low: float,
    future_high: float,
    future_weight: float,
    clip_low: float,
    clip_high: float,
    dual_clip: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """(sums[6] float64: loss, tokens, clipped, kl, |d|, scale; future[N] or [0]; gradient[N])."""
    rules = Rules(gamma, future_low, future_high, future_weight, clip_low, clip_high, dual_clip)
    how = packed.choose(backend, logp)
    if how == "torch":
        return policy_loss_torch(logp, old_logp, advantage, mask, offsets, weight, rules)
    x, mu, a = packed.widened(logp, old_logp, advantage)
    m = packed.as_bytes(mask)
    if how == "triton":
        run = packed.gpu("policy_loss.gpu.policy_loss").policy_loss
        sums, future, gradient = run(x, mu, a, m, offsets, weight, rules)
    else:
        future = x.new_empty(0 if gamma is None else x.shape[0])
        gradient, sums = torch.empty_like(x), x.new_empty(6, dtype=torch.float64)
        cuts, w = packed.on_host(offsets), weight.contiguous()
        numbers = (-1.0 if gamma is None else gamma, *rules[1:])
        native.require("policy_loss")(
            x, mu, a, m, cuts, w, *numbers, future, gradient, sums, torch.get_num_threads()
        )
    return sums, future.to(logp.dtype), gradient.to(stored(logp))


def _fake_policy_loss(
    logp: Tensor,
    old_logp: Tensor,
    advantage: Tensor,
    mask: Tensor,
    offsets: Tensor,
    weight: Tensor,
    backend: str,
    gamma: float | None,
    *_: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    n = logp.shape[0]
    sums, future = logp.new_empty(6, dtype=torch.float64), 0 if gamma is None else n
    return sums, logp.new_empty(future), logp.new_empty(n, dtype=stored(logp))


policy_loss_op = operator("policy_loss", _policy_loss, _fake_policy_loss)
