"""Attention over lists of segments, launched: items of both heights, then the merge.

Three launches whatever the tree is.

The definition is attention.segment_attention_torch of the rollout engine. Tables and workspace are
the caller's, so that a captured graph finds them where they were.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from appo._kernels.common.gpu import launch
from appo._kernels.segment_attention.gpu.attend import attend_items
from appo._kernels.segment_attention.gpu.config import HEIGHTS, MAX_DIM
from appo._kernels.segment_attention.gpu.merge import attend_merge


@dataclass(frozen=True)
class Tables:
    """A work list (attend_work.Work) and the block table it points into, int64 on the device.

    Padding: zeros.
    """

    tall: Tensor  # [·, 8]
    low: Tensor  # [·, 8]
    blocks: Tensor
    limits: Tensor
    starts: Tensor  # [M + 1]
    entries: Tensor


def heights(dtype: torch.dtype, device: torch.device) -> tuple[int, int]:
    """Pairs of a tall and of a low tile.

    The interpreter takes those of 16 bits: they are what a device mostly runs.
    """
    return HEIGHTS[2 if device.type == "cpu" else dtype.itemsize]


def unavailable(dtype: torch.dtype, head_dim: int, device: torch.device) -> str | None:
    """Why these kernels cannot run so; None if they can."""
    if dtype not in launch.TYPES:
        return f"segment attention runs in {', '.join(map(str, launch.TYPES))}, not in {dtype}"
    if head_dim > MAX_DIM[dtype.itemsize]:
        limit = MAX_DIM[dtype.itemsize]
        wider = "; 16-bit types take 256" if limit < head_dim <= MAX_DIM[2] else ""
        return f"head_dim is {head_dim}, in {dtype} it may be at most {limit}{wider}"
    if device.type != "cuda" and not launch.interpreted():
        return f"the device is {device}; use device='cuda', or set TRITON_INTERPRET=1 before triton is imported"
    return None


def workspace(
    partials: int, heads: int, dim: int, device: torch.device | str
) -> tuple[Tensor, Tensor]:
    """o[P, Hq, D] and lse[P, Hq] float32 for the partial results: 4·Hq·(D + 1) bytes each."""
    o = torch.empty(partials, heads, dim, device=device)
    return o, torch.empty(partials, heads, device=device)


def segment_attention(
    q: Tensor, k_pool: Tensor, v_pool: Tensor, tables: Tables, o: Tensor, lse: Tensor, out: Tensor
) -> None:
    """out[M, Hq, D] = attention of q[M, Hq, D] over what the tables say, scores scaled by 1/√D.

    Zeros for no keys.

    k_pool, v_pool [blocks, 16, Hkv, D] contiguous, of q's dtype · q any stride between rows · out
    contiguous · o, lse: workspace, in which partials that come from elsewhere are already filled
    in. Raises ValueError or TypeError (see `unavailable`); what the tables say is not checked, they
    are on the device.
    """
    launch.check_tensors("triton", q, k_pool)
    if (reason := unavailable(q.dtype, q.shape[2], q.device)) is not None:
        raise ValueError(reason)
    tall, low = heights(q.dtype, q.device)
    attend_items(q, k_pool, v_pool, tables.tall, tables.blocks, tables.limits, o, lse, tall)
    attend_items(q, k_pool, v_pool, tables.low, tables.blocks, tables.limits, o, lse, low)
    attend_merge(o, lse, tables.starts, tables.entries, out)
