"""Exact attention over one segment of keys, with the log-sum-exp that lets segments be merged.

Softmax attention over the union of segments s is Σ_s exp(lse_s − lse)·o_s with lse = log Σ_s exp(lse_s), so a
shared prefix is read once for all its descendants and added to what each row finds in its own segment.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

NO_KEYS = (
    -1.0e30
)  # lse of a segment a row does not read: finite, so that merging never computes inf - inf


def attend(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Attention of q over k, v: (o[B,H,T,D] in q's dtype, lse[B,H,T] float32, natural logarithm).

    q[B,H,T,D] · k, v[B,H,S,D] (any strides, last one 1) · mask additive, broadcastable to [B,H,T,S], in q's dtype.
    Every row must see at least one key.
    """
    if q.device.type == "cpu":
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, is_causal=causal, attn_mask=mask, scale=1.0 / math.sqrt(q.shape[-1])
        )
    return attend_reference(q, k, v, causal=causal, mask=mask)


def attend_reference(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The definition `attend` is tested against (and the path of devices without a fused kernel)."""
    scores = q.float() @ k.float().transpose(-1, -2) / math.sqrt(q.shape[-1])  # [B, H, T, S]
    if causal:
        t, s = scores.shape[-2:]
        seen = torch.ones(t, s, dtype=torch.bool, device=q.device).tril()
        scores = scores.masked_fill(~seen, -math.inf)
    if mask is not None:
        scores = scores + mask.float()
    lse = scores.logsumexp(-1)
    return ((scores - lse[..., None]).exp() @ v.float()).to(q.dtype), lse


def merge(o: Tensor, lse: Tensor) -> Tensor:
    """Combine partial attentions. o[P,M,H,D], lse[P,M,H] float32 -> [M,H,D] in o's dtype."""
    if o.shape[0] == 1:
        return o[0]
    weight = torch.softmax(lse, dim=0)  # [P, M, H]
    return (o * weight.unsqueeze(-1)).sum(0).to(o.dtype)
