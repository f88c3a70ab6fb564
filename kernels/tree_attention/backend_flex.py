"""Backend "flex" of tree attention.

torch's FlexAttention, compiled, with a block mask made directly from `subtree_end`.

The block mask comes from four numbers per block (first and last token, least and largest
`subtree_end`), never from an N × N mask: O(N) and one entry per pair of blocks. Gradients are
FlexAttention's own, on CUDA only: torch has none for the CPU. Unlike in our kernels a token that is
not finite may reach others in its block (0 · NaN), and torch.compile specialises per dtype and
head.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import flex_attention as flex

from appo._kernels.tree_attention.last_call import LastCall
from appo._kernels.tree_attention.op import TreeCall

BLOCK = 128  # tokens per block, of queries and of keys


def attend(call: TreeCall) -> tuple[Tensor, Tensor]:
    """(o[N, Hq, D], lse[N, Hq]), differentiable by q, k and v.

    Raises TypeError for float64 on a GPU, NotImplementedError for a gradient on a CPU.
    """
    _check(call)
    heads = (x.transpose(0, 1)[None] for x in (call.q, call.k, call.v))
    o, aux = _function(call.q.device.type)(
        *heads,
        block_mask=_masks(call.subtree_end, BLOCK),
        scale=call.scale,
        enable_gqa=True,
        return_aux=flex.AuxRequest(lse=True),
    )
    return o[0].transpose(0, 1), aux.lse[0].T


def _check(call: TreeCall) -> None:
    if call.q.device.type == "cpu":
        if torch.is_grad_enabled() and any(x.requires_grad for x in call[:3]):
            raise NotImplementedError("backend='flex' has no gradient on a CPU; use backend='auto'")
    elif call.q.dtype == torch.float64:
        raise TypeError("backend='flex' takes no float64 on a GPU; use backend='torch'")


@functools.cache
def _function(device: str) -> Any:
    """Compiled for GPUs. On a CPU as it is, with all scores in memory: for tests."""
    return flex.flex_attention if device == "cpu" else torch.compile(flex.flex_attention)


def block_mask(subtree_end: Tensor, block: int = BLOCK) -> flex.BlockMask:
    """What `create_block_mask` would make of k ≤ q < subtree_end[k].

    Pairs of tokens are not looked at.

    Keys [k₀, k₁] and queries [q₀, q₁], both ends included: all seen iff k₁ ≤ q₀ and min subtree_end
    > q₁; none iff k₀ > q₁ or max subtree_end ≤ q₀; else some, which the mask function decides one
    by one. A block that runs past the end is never "all".
    """
    n = subtree_end.shape[0]
    short = -n % block
    first = torch.arange(0, n, block, device=subtree_end.device)
    last = first + block - 1
    min_end = (
        torch.nn.functional.pad(subtree_end, (0, short)).view(-1, block).amin(1)
    )  # past the end: 0
    max_end = torch.nn.functional.pad(subtree_end, (0, short)).view(-1, block).amax(1)
    q0, q1 = first[:, None], last[:, None]
    whole = (last <= q0) & (min_end > q1)
    some = (first <= q1) & (max_end > q0) & ~whole

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (query < subtree_end[key])

    return flex.BlockMask.from_kv_blocks(
        *_listed(some), *_listed(whole), BLOCK_SIZE=block, mask_mod=sees, seq_lengths=(n, n)
    )


def _listed(table: Tensor) -> tuple[Tensor, Tensor]:
    """bool[queries, keys] as FlexAttention takes it.

    How many blocks of keys, and their numbers first in their row.
    """
    count = table.sum(1, dtype=torch.int32)
    order = table.to(torch.int8).argsort(dim=1, descending=True, stable=True).to(torch.int32)
    return count[None, None], order[None, None].contiguous()


_masks = LastCall(block_mask)
