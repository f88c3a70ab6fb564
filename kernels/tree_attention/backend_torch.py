"""Backend "torch" of tree attention.

The definition, on every device and in every dtype, a block of queries at a time.

`dense` says what is computed in one piece, with the N × N mask and by autograd; `forward` and
`backward` are what is used, in O(N) memory. Sums are float32, float64 for float64.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from appo._kernels.tree_attention.op import Saved, TreeCall

QUERIES = 256  # per block


def visible(subtree_end: Tensor, first: int, last: int) -> Tensor:
    """bool[last-first, last]: True where query first+i sees key j."""
    i = torch.arange(first, last, device=subtree_end.device)[:, None]
    j = torch.arange(last, device=subtree_end.device)[None, :]
    return (j <= i) & (i < subtree_end[None, :last])


def dense(
    q: Tensor, k: Tensor, v: Tensor, subtree_end: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """(o[N, Hq, D], lse[N, Hq]) for finite inputs, in their dtype.

    Softmax with the mask, differentiable twice.
    """
    n, group = q.shape[0], q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, dim=1).transpose(0, 1) for x in (k, v))  # [Hq, N, D]
    x = scale * (q.transpose(0, 1) @ k.transpose(1, 2))  # [Hq, N, N]
    x = x.masked_fill(~visible(subtree_end, 0, n), -torch.inf)
    return (x.softmax(-1) @ v).transpose(0, 1), x.logsumexp(-1).T


def forward(call: TreeCall) -> tuple[Tensor, Tensor]:
    """(o like q, lse[N, Hq])."""
    x = _Heads.of(call)
    o, lse = [], []
    for a, b, seen in _blocks(call.subtree_end):
        scores = call.scale * (x.queries(x.q, a, b) @ x.k[:, None, :b].transpose(2, 3))
        scores = (scores + x.hurt_k[:, None, None, :b]).masked_fill(
            ~seen, -torch.inf
        )  # [Hkv, G, b-a, b]
        size = scores.logsumexp(-1, keepdim=True)
        p = torch.where(seen, (scores - size).exp(), 0.0)
        hurt = x.queries(x.hurt_q[..., None], a, b)
        o.append(x.rows(p @ x.v[:, None, :b] + hurt))
        lse.append(x.rows(size + hurt)[..., 0])
    return torch.cat(o).to(call.q.dtype), torch.cat(lse)


def backward(
    call: TreeCall, saved: Saved, d_o: Tensor, d_lse: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv) in the dtype of q."""
    x = _Heads.of(call)
    g, hurt_g = _cleaned(d_o, x.q.dtype)
    lse = (
        saved.lse + x.hurt_q + hurt_g
    )  # a query that is not finite, or its upstream: NaN for all it sees
    delta = (d_o.to(g.dtype) * saved.o.to(g.dtype)).sum(-1) - (0.0 if d_lse is None else d_lse)
    dq, dk, dv = [], torch.zeros_like(x.k), torch.zeros_like(x.v)
    for a, b, seen in _blocks(call.subtree_end):
        q, do = x.queries(x.q, a, b), x.queries(g, a, b)
        k, v = x.k[:, None, :b], x.v[:, None, :b]
        scores = call.scale * (q @ k.transpose(2, 3))
        p = torch.where(seen, (scores - x.queries(lse[..., None], a, b)).exp(), 0.0)
        slope = do @ v.transpose(2, 3) - x.queries(delta[..., None], a, b)
        ds = torch.where(seen, call.scale * p * slope, 0.0)
        dq.append(x.rows(ds @ k))
        dk[:, :b] += (ds.transpose(2, 3) @ q).sum(1)
        dv[:, :b] += (p.transpose(2, 3) @ do).sum(1)
    grads = torch.cat(dq), dk.transpose(0, 1), dv.transpose(0, 1)
    return tuple(t.to(call.q.dtype).contiguous() for t in grads)  # type: ignore[return-value]


def _blocks(subtree_end: Tensor) -> Iterator[tuple[int, int, Tensor]]:
    n = subtree_end.shape[0]
    for a in range(0, n, QUERIES):
        b = min(a + QUERIES, n)
        yield a, b, visible(subtree_end, a, b)


def _cleaned(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(x with zeros for rows that are not finite, NaN for those rows and 0 for the others).

    A zero weight times NaN is NaN: what is not finite must reach those who see it through their
    softmax, and no one else.
    """
    fine = torch.isfinite(x).all(-1)
    hurt = torch.where(fine, 0.0, torch.nan).to(dtype)
    return torch.where(fine[..., None], x, 0.0).to(dtype), hurt


class _Heads(NamedTuple):
    """Widened and cleaned.

    q[N, Hq, D], k[Hkv, N, D], v[Hkv, N, D], hurt_q[N, Hq], hurt_k[Hkv, N] (keys and values).
    """

    q: Tensor
    k: Tensor
    v: Tensor
    hurt_q: Tensor
    hurt_k: Tensor

    @classmethod
    def of(cls, call: TreeCall) -> _Heads:
        dtype = torch.float64 if call.q.dtype == torch.float64 else torch.float32
        (q, hurt_q), (k, hurt_k), (v, hurt_v) = (
            _cleaned(x, dtype) for x in (call.q, call.k, call.v)
        )
        return cls(q, k.transpose(0, 1), v.transpose(0, 1), hurt_q, (hurt_k + hurt_v).T)

    def queries(self, x: Tensor, a: int, b: int) -> Tensor:
        """x[N, Hq, ·] → [Hkv, Hq/Hkv, b-a, ·]."""
        return x[a:b].permute(1, 0, 2).unflatten(0, (self.k.shape[0], -1))

    def rows(self, x: Tensor) -> Tensor:
        """The way back: [Hkv, G, n, ·] → [n, Hq, ·]."""
        return x.flatten(0, 1).transpose(0, 1)
