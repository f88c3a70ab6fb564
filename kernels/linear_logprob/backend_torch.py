"""Backend "torch": the definition that every faster kernel is tested against.

Any device, block by block.

The outer loop runs over blocks of the vocabulary, so that a bf16 head is widened to float32 once
per pass; the inner one over blocks of tokens. Statistics are float32 for bf16 inputs as well: a
bf16 matrix product would round every logit to 8 bits (an error of 6e-2 in logp, which the
discounted sums of the branching score then add up).
"""

from __future__ import annotations

import torch
from torch import Tensor

from appo._kernels.common.stats import column_stats, empty, merge
from appo._kernels.linear_logprob.blocks import Blocks, LinearCall, Upstream, add_at


def partial_stats(call: LinearCall) -> Tensor:
    """(m, s, u, z) of all columns of w, [4, N].

    Workspace: two logit blocks and one widened block of w.
    """
    run = Blocks(call)
    total = [empty(t1 - t0, call.scale) for t0, t1 in run.tokens()]
    for v0, v1 in run.columns():
        w_vh = run.head(v0, v1)
        for i, (t0, t1) in enumerate(run.tokens()):
            x2 = run.scaled_logits(t0, t1, run.hidden(t0, t1), w_vh)
            total[i] = merge(total[i], column_stats(x2, call.column[t0:t1] - v0))
    return torch.cat([torch.stack(stats) for stats in total], dim=1)


def gradients(
    call: LinearCall,
    up: Upstream,
    need_h: bool,
    need_w: bool,
    need_scale: bool,
    dh_dtype: torch.dtype,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(dh[T, H] in dh_dtype, dw[V, H] in the dtype of w, Σ_j g_j log2 p_j [N]).

    None for what was not asked.

    G = scale · g is the gradient of a capped logit; g from p, the softmax, by the formula of
    `Upstream`. dh = G w and dw = Gᵀ h, summed in the dtype of `scale` and rounded once.
    """
    run = Blocks(call)
    n, scale = call.scale.shape[0], call.scale
    dh = scale.new_zeros(n, call.h.shape[1]) if need_h else None
    dw = call.w.new_empty(call.w.shape) if need_w else None
    d_scale = torch.zeros_like(scale) if need_scale else None
    for v0, v1 in run.columns():
        w_vh = run.head(v0, v1)
        dw_vh = scale.new_zeros(w_vh.shape) if need_w else None
        for t0, t1 in run.tokens():
            t = slice(t0, t1)
            h_th = run.hidden(t0, t1)
            x2 = run.scaled_logits(t0, t1, h_th, w_vh)
            slope = run.cap_slope(t0, t1, x2)
            # Two steps: x2 - m is exact where p matters, x2 - (m + log2 s) rounds by the size of m.
            logp2 = x2.sub_(up.m[t, None]).sub_(up.log2s[t, None])
            p = torch.exp2(logp2)
            if up.plogp_factor is None:
                g = p.mul_(up.p_factor[t, None])
            else:
                factor = torch.addcmul(
                    up.p_factor[t, None], up.plogp_factor[t, None], logp2, value=-1
                )
                g = p.mul_(factor)
            add_at(g, call.column[t] - v0, up.d_logp[t])
            if d_scale is not None:
                d_scale[t] += torch.linalg.vecdot(g, logp2)
            g.mul_(scale[t, None])
            if slope is not None:
                g.mul_(slope)
            if dh is not None:
                dh[t].addmm_(g, w_vh)
            if dw_vh is not None:
                dw_vh.addmm_(g.T, h_th)
        if dw is not None and dw_vh is not None:
            dw[v0:v1] = dw_vh
    if dh is not None:
        if call.rows is not None:
            # Not index_add: on a GPU it adds repeats in any order.
            dh = dh.new_zeros(call.h.shape).index_put_((call.rows,), dh, accumulate=True)
        dh = dh.to(dh_dtype)
    return dh, dw, d_scale
