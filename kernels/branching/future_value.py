"""The segmented reverse discounted scan.

What lies ahead of each token, in O(N) and without a T × T matrix.

Along one segment (`future_value`) and along a tree of segments (`tree_future_value`). The native
code (csrc/branching/future_value.cpp), the Triton kernels (kernels/branching/gpu/scan.py) and the
PyTorch definitions compute the same sums in float64 and are tested against each other.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from appo._kernels.branching import definition
from appo._kernels.common import native, packed
from appo._kernels.common.operators import operator


@torch.no_grad()
def future_value(
    log_ratio: Tensor,
    mask: Tensor,
    offsets: Tensor,
    gamma: float,
    *,
    backend: str = "auto",
    threads: int | None = None,
) -> Tensor:
    """S_i = Σ_{k≥i} γ^(k-i) · mask_k · log_ratio_k over the raw positions of each segment.

    O(N), float64 inside.

    log_ratio[N] floating point; mask[N]; offsets[B+1] from 0 to N, not decreasing; 0 ≤ gamma ≤ 1
    backend  "auto" | "torch" | "cpu" (RuntimeError without the native library) | "triton"; see
             `packed`
    threads  upper bound for the native code (default torch's); it uses one per 65,536 tokens at
             most
    Returns [N] in the dtype of log_ratio. No gradient. NaN spreads to the earlier tokens of its
    segment, unless masked. Raises ValueError for shapes, offsets or a gamma that do not fit;
    "triton" trusts offsets that lie on the GPU, because to look at them would wait for it.
    """
    packed.check_gamma(gamma)
    packed.check_vectors(offsets, log_ratio=log_ratio, mask=mask)
    packed.check_floating(log_ratio=log_ratio)
    return future_value_op(log_ratio, mask, offsets, float(gamma), backend, threads)


def _future_value(
    log_ratio: Tensor,
    mask: Tensor,
    offsets: Tensor,
    gamma: float,
    backend: str,
    threads: int | None,
) -> Tensor:
    """`future_value` as an operator that is opaque to torch.compile.

    A compiled graph does not break at it.
    """
    how = packed.choose(backend, log_ratio)
    if how == "torch":
        return definition.future_value_torch(log_ratio, mask, offsets, gamma)
    (x,), m = packed.widened(log_ratio), packed.as_bytes(mask)
    if how == "triton":
        out = packed.gpu("branching.gpu.scan").future_value(x, m, offsets, gamma)
    else:
        out = torch.empty_like(x)
        max_threads = torch.get_num_threads() if threads is None else threads
        native.require("future_value")(x, m, packed.on_host(offsets), gamma, out, max_threads)
    return out.to(log_ratio.dtype)


def _fake_future_value(log_ratio: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(log_ratio, memory_format=torch.contiguous_format)


future_value_op = operator("future_value", _future_value, _fake_future_value)


@torch.no_grad()
def tree_future_value(
    log_ratio: Tensor,
    mask: Tensor,
    offsets: Tensor,
    parents: Tensor,
    gamma: float,
    *,
    weights: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """The same sum along a tree.

    What lies ahead of a node's last token is the weighted sum over its children.

        F_i = mask_i · log_ratio_i + γ · F_{i+1}                          inside a node
        F_i = mask_i · log_ratio_i + γ · Σ_{children c} w_c · F_first(c)  at the last token of a node

    offsets[B+1]   cuts the tokens into B nodes; an empty node hands on what lies ahead of it,
                   undiscounted
    parents[B]     integer, the node before this one on its path, or -1; a parent comes before its
                   children
    weights[B]     w_c, finite, of each node in its parent's sum; None: the mean over the children.
                   With all weights 1 and no forks this is `future_value` of the joined segments. A
                   child of weight 0 does not count, NaN or not.
    The rest is as in `future_value`. "cpu" runs in one thread; "triton" looks at parents and
    offsets on the host, so it waits for the device, and again for the copy of each level of the
    tree.
    """
    how = packed.choose(backend, log_ratio)
    packed.check_gamma(gamma)
    packed.check_vectors(offsets, log_ratio=log_ratio, mask=mask)
    packed.check_floating(log_ratio=log_ratio)
    nodes = offsets.shape[0] - 1
    at = packed.on_host(parents)
    _check_tree(at, weights, nodes)
    if weights is None:
        children = torch.bincount(at[at >= 0], minlength=nodes).double()
        w = torch.where(at >= 0, 1.0 / children[at.clamp(min=0)], 0.0) if nodes else children
    else:
        w = weights.detach().to(device="cpu", dtype=torch.float64).contiguous()
    if how == "torch":
        return _tree_torch(log_ratio, mask, offsets, at, w, gamma)
    (x,), m, cuts = packed.widened(log_ratio), packed.as_bytes(mask), packed.on_host(offsets)
    if how == "triton":
        out = packed.gpu("branching.gpu.tree_scan").tree_future_value(
            x, m, cuts, at, w, float(gamma)
        )
    else:
        out = torch.empty_like(x)
        native.require("tree_future_value")(x, m, cuts, at, w, float(gamma), out)
    return out.to(log_ratio.dtype)


def _tree_torch(
    log_ratio: Tensor, mask: Tensor, offsets: Tensor, parents: Tensor, weights: Tensor, gamma: float
) -> Tensor:
    """The definition: node by node, the last first.

    A node's carry enters as one more token behind it.
    """
    packed.segment_lengths(offsets, log_ratio.shape[0])
    x = torch.where(mask.to(torch.bool), log_ratio.double(), 0.0)
    carry = x.new_zeros(parents.shape[0])
    out = torch.empty_like(x)
    cuts = offsets.tolist()
    for node in range(parents.shape[0] - 1, -1, -1):
        own = torch.cat([x[cuts[node] : cuts[node + 1]], carry[node : node + 1]])
        ones = torch.ones_like(own, dtype=torch.bool)
        value = definition.future_value_torch(
            own, ones, torch.tensor([0, len(own)], device=x.device), gamma
        )
        out[cuts[node] : cuts[node + 1]] = value[:-1]
        parent, weight = int(parents[node]), float(weights[node])
        if parent >= 0 and weight != 0.0:
            carry[parent] += weight * value[0]
    return out.to(log_ratio.dtype)


def _check_tree(parents: Tensor, weights: Tensor | None, nodes: int) -> None:
    if parents.shape != (nodes,) or (weights is not None and weights.shape != (nodes,)):
        found = "none" if weights is None else tuple(weights.shape)
        raise ValueError(
            f"parents {tuple(parents.shape)}, weights {found}; expected [{nodes}], one per segment"
        )
    wrong = ((parents < -1) | (parents >= torch.arange(nodes))).nonzero()
    if len(wrong):
        node = int(wrong[0])
        raise ValueError(
            f"parents[{node}] is {int(parents[node])}, expected -1 or the number of a node before it"
        )
    if weights is not None and not bool(torch.isfinite(weights).all()):
        raise ValueError("weights must be finite")
