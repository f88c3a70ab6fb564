"""A peer of bench/kernels/tree_attention.py.

torch's SDPA over a packed tree, one call per subtree under the prompt.

The prompt's keys are copied before each subtree; where a subtree is a chain no mask is needed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from appo.packing.pack import interval_mask


@dataclass(frozen=True)
class Segment:
    """Queries [start, stop) of the stream.

    They see [prefix, prefix_stop) and, causally or by `mask`, each other.

    mask is bool[stop-start+P, same] over prefix (P tokens) + segment, or None when all of it is one
    causal chain.
    """

    prefix: int
    prefix_stop: int
    start: int
    stop: int
    mask: Tensor | None


def plan_attention(subtree_end: Tensor) -> list[Segment]:
    """Cut a stream into segments from the ends of its subtrees, int32[T].

    Segments come in stream order.

    A tree starts with the tokens that all of it sees (prompt); each subtree after them is one
    segment. The first takes the prompt's own queries with it.
    """
    ends = subtree_end.cpu()
    segments: list[Segment] = []
    tree = 0
    while tree < ends.numel():
        stop = int(ends[tree])
        shared = tree + _leading(ends[tree:stop], stop)
        at, begin = shared, tree
        while begin < stop:
            end = int(ends[at]) if at < stop else stop
            prefix_stop = shared if begin > tree else tree
            mask = _mask(ends, prefix_stop - tree, begin, end)
            segments.append(Segment(tree, prefix_stop, begin, end, mask))
            begin = at = end
        tree = stop
    return [
        s if s.mask is None else replace(s, mask=s.mask.to(subtree_end.device)) for s in segments
    ]


def _leading(ends: Tensor, value: int) -> int:
    """How many of the first entries equal `value`."""
    other = (ends != value).nonzero()
    return int(other[0]) if other.numel() else ends.numel()


def _mask(ends: Tensor, prefix: int, start: int, stop: int) -> Tensor | None:
    """None for a chain, else the interval mask in local coordinates.

    It covers the `prefix` tokens seen by all and the segment.
    """
    own = ends[start:stop]
    if bool((own >= stop).all()):
        return None
    seen_by_all = torch.full((prefix,), stop, dtype=own.dtype)
    return interval_mask(torch.cat([seen_by_all, own]) - (start - prefix))


def attend(query: Tensor, key: Tensor, value: Tensor, segments: list[Segment]) -> Tensor:
    """q[1, Hq, T, D], k and v[1, Hkv, T, D] → out[1, Hq, T, D]."""
    out = []
    for s in segments:
        skip = s.prefix_stop - s.prefix
        q, k, v = (_rows(x, s, skip) for x in (query, key, value))
        o = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=s.mask,
            is_causal=s.mask is None,
            enable_gqa=q.shape[1] != k.shape[1],
        )
        out.append(o[:, :, skip:])
    return torch.cat(out, dim=2)


def _rows(x: Tensor, s: Segment, skip: int) -> Tensor:
    """Prefix and segment of x[1, H, T, D] as one run."""
    own = x[:, :, s.start : s.stop]
    return torch.cat([x[:, :, s.prefix : s.prefix_stop], own], dim=2) if skip else own
