"""The statistics algebra of a softmax that is never held: base 2, centred, mergeable in any tree.

Scaled logits are x2 = log2(e) · logit / temperature. A block of columns is summed up by four
numbers per token:

    m = max x2        s = Σ 2^(x2-m)        u = Σ 2^(x2-m) · (x2-m) ≤ 0        z = x2[target] if it
                      is here, else 0

Two blocks merge by shifting both to the larger maximum. In nats, with M, S, U, Z of all columns,

    logp = ln2 · ((Z-M) - log2 S)      entropy = ln2 · (log2 S - U/S)      lse = ln2 · (M + log2 S)

Entropy is a sum of two non-negative terms, so nothing cancels and it is never negative; logp is
never positive because z comes from the same accumulators and S ≥ 1. `EMPTY` stands for minus
infinity: -inf minus -inf would be NaN.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

LN2 = math.log(2.0)
LOG2E = 1.0 / LN2
EMPTY = -1e30


class Stats(NamedTuple):
    """Statistics of some columns for N tokens.

    Each field is [N], float32 (float64 for float64 logits).
    """

    m: Tensor
    s: Tensor
    u: Tensor
    z: Tensor


def empty(n: int, like: Tensor) -> Stats:
    """Statistics of no column at all: the neutral element of `merge`."""
    zero = like.new_zeros(n)
    return Stats(zero + EMPTY, zero, zero.clone(), zero.clone())


def column_stats(x2: Tensor, column: Tensor) -> Stats:
    """Statistics of a block of scaled logits.

    **Overwrites x2.**

    x2[N, V] float32/float64; column[N] int64 is the target's column inside the block, any value
    outside 0 … V-1 if the target is elsewhere. Finite inputs only; replace -inf by EMPTY first.
    """
    here = (column >= 0) & (column < x2.shape[1])
    picked = x2.gather(1, column.clamp(0, x2.shape[1] - 1)[:, None])[:, 0]
    z = torch.where(here, picked, 0.0)
    m = x2.amax(dim=1)
    x2.sub_(m[:, None])
    e = torch.exp2(x2)
    s = e.sum(dim=1)
    u = e.mul_(x2).sum(dim=1)
    return Stats(m, s, u, z)


def merge(a: Stats, b: Stats) -> Stats:
    """Statistics of the union of two disjoint sets of columns."""
    m = torch.maximum(a.m, b.m)
    da, db = a.m - m, b.m - m
    wa, wb = torch.exp2(da), torch.exp2(db)
    s = wa * a.s + wb * b.s
    u = wa * (a.u + da * a.s) + wb * (b.u + db * b.s)
    return Stats(m, s, u, a.z + b.z)


def finish(t: Stats) -> tuple[Tensor, Tensor, Tensor]:
    """(logp, entropy, lse), each [N], in nats."""
    log2s = torch.log2(t.s)
    logp = LN2 * ((t.z - t.m) - log2s)
    entropy = LN2 * (log2s - t.u / t.s)
    lse = LN2 * (t.m + log2s)
    return logp, entropy, lse
