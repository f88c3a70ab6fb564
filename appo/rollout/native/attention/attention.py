"""Attention over lists of KV segments, the definition in PyTorch.

Also what runs where there is no native code.

Softmax attention over the union of segments s is Σ_s exp(lse_s − lse)·o_s with lse = log Σ_s
exp(lse_s), so a shared prefix is read once for all its descendants and added to what each row finds
in its own segment.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from appo.rollout.native.attention.pool import KVPool
from appo.rollout.native.attention.segments import Reads
from appo.rollout.native.tree.block_list import BLOCK

NO_KEYS = -1.0e30  # lse of a row without keys: finite, so that merging never computes inf - inf


def attend(q: Tensor, k: Tensor, v: Tensor, limits: Tensor) -> tuple[Tensor, Tensor]:
    """Attention of each row over the first limits[i] keys.

    Returns (o[M,Hq,D], lse[M,Hq] natural logarithm), float32.

    q[M,Hq,D] · k, v[Hkv,N,D] · limits[M], 0 … N; a row that reads nothing has o = 0 and lse =
    NO_KEYS.
    """
    group = q.shape[1] // k.shape[0]
    k, v = (x.float().repeat_interleave(group, dim=0) for x in (k, v))  # [Hq, N, D]
    scores = torch.einsum("mhd,hnd->mhn", q.float(), k) / math.sqrt(q.shape[-1])
    hidden = torch.arange(k.shape[1], device=q.device) >= limits[:, None]  # [M, N]
    scores = scores.masked_fill(hidden[:, None], -math.inf)
    lse = scores.logsumexp(-1).masked_fill((limits == 0)[:, None], NO_KEYS)
    return torch.einsum("mhn,hnd->mhd", (scores - lse[..., None]).exp(), v), lse


def segment_attention_torch(
    q: Tensor, k: Tensor, v: Tensor, layout: Reads, pool: KVPool, layer: int, out: Tensor
) -> None:
    """`segments.segment_attention` on any device, for packed and plain pools, all dtypes.

    Sums in float32.

    Here a NaN among the values of a segment reaches every row of a read, also those whose limit
    ends before it.
    """
    pool.write(layer, k, v, layout.slots)
    total = torch.zeros(q.shape, dtype=torch.float32, device=q.device)
    size = torch.full(q.shape[:2], NO_KEYS, dtype=torch.float32, device=q.device)
    for segment, a, b, start in layout.reads.tolist():
        limits = layout.limits[start : start + b - a]
        count, first = int(limits.max()) if b > a else 0, int(layout.segments[segment, 0])
        if count == 0:
            continue
        blocks = layout.blocks[first : first - (-count // BLOCK)].tolist()
        keys, values = pool.read(blocks, count, layer)
        o, lse = attend(q[a:b], keys, values, limits.to(q.device))
        both = torch.logaddexp(size[a:b], lse)
        total[a:b] = (
            total[a:b] * (size[a:b] - both).exp()[..., None] + o * (lse - both).exp()[..., None]
        )
        size[a:b] = both
    out.copy_(total)
