"""Gradients of the head from strips of logit gradients.

Two matrix products of the vendor's library per strip.

A strip G is at most GRADIENT_TOKENS × GRADIENT_COLUMNS. The outer loop runs over columns, so the
float32 sum of dW is one strip high and is rounded once; dh is summed in float32 over all strips.
With N ≤ GRADIENT_TOKENS nothing is summed twice.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from appo._kernels.common.gpu.config import gradient_block
from appo._kernels.linear_logprob.blocks import LinearCall, Upstream

# fill(h[N, H], w[V, H], t, v0, out[t, V], weighted[t] or None): out = G of the columns v0 … v0+V-1,
# weighted += Σ g log2 p
Fill = Callable[[Tensor, Tensor, slice, int, Tensor, Tensor | None], None]


# Before torch 2.10, addmm wants its float32 summand in the dtype of the factors.
ADDMM_WIDENS = tuple(int(x) for x in torch.__version__.split(".")[:2]) >= (2, 10)


def widening_products(x: Tensor) -> bool:
    """Whether torch multiplies 16-bit matrices into float32 ones on the device of x.

    On NVIDIA GPUs.
    """
    return x.is_cuda and torch.version.hip is None


def product_dtype(h: Tensor, w: Tensor) -> torch.dtype:
    """What G and its partners are multiplied in.

    bfloat16 for 16-bit operands, float32 otherwise and on a CPU.

    float16 operands are converted: a small p · upstream is below the range of float16, not of
    bfloat16.
    """
    half = max(h.element_size(), w.element_size()) == 2 and widening_products(h)
    return torch.bfloat16 if half else torch.float32


def multiply_add(total: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
    """total (float32) += a @ b; = on the `first` strip.

    16-bit operands are summed in float32, never in 16 bits.
    """
    if a.dtype == torch.float32:
        torch.addmm(total, a, b, beta=0.0 if first else 1.0, out=total)
    elif first:
        torch.mm(a, b, out_dtype=torch.float32, out=total)
    elif ADDMM_WIDENS:
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    else:
        total += torch.mm(a, b, out_dtype=torch.float32)


def gradients(
    call: LinearCall,
    fill: Fill,
    need_h: bool,
    need_w: bool,
    need_scale: bool,
    dh_dtype: torch.dtype,
    block: tuple[int, int] | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(dh[T, H] in dh_dtype, dw[V, H] in the dtype of w, Σ_j g_j log2 p_j [N]).

    None for what was not asked.

    block  (tokens, columns) of a strip, default `config.gradient_block`
    Workspace: `config.gradient_workspace_bytes`, and with `rows` a copy of the hidden states they
    name.
    """
    h = call.h if call.rows is None else call.h.index_select(0, call.rows)
    n, v = call.scale.shape[0], call.w.shape[0]
    dtype = product_dtype(h, call.w)
    tokens, columns = block or gradient_block(n, v)
    dh = call.scale.new_empty(n, h.shape[1]) if need_h else None
    dw = call.w.new_empty(call.w.shape) if need_w else None
    dw_sum = call.scale.new_empty(min(columns, v), h.shape[1]) if need_w else None
    weighted = torch.zeros_like(call.scale) if need_scale else None
    strip = torch.empty(min(tokens, n), min(columns, v), dtype=dtype, device=h.device)
    partner = h.to(dtype)
    with torch.autocast(h.device.type, enabled=False):
        for v0 in range(0, v, columns):
            w_vh = call.w[v0 : v0 + columns]
            head = w_vh.to(dtype)
            dw_vh = None if dw_sum is None else dw_sum[: w_vh.shape[0]]
            for t0 in range(0, n, tokens):
                t = slice(t0, min(t0 + tokens, n))
                g = strip[: t.stop - t0, : w_vh.shape[0]]
                fill(h, w_vh, t, v0, g, None if weighted is None else weighted[t])
                if dh is not None:
                    multiply_add(dh[t], g, head, first=v0 == 0)
                if dw_vh is not None:
                    multiply_add(dw_vh, g.T, partner[t], first=t0 == 0)
            if dw is not None and dw_vh is not None:
                dw[v0 : v0 + columns] = dw_vh
    return _back_to_rows(dh, call, dh_dtype), dw, weighted


def _back_to_rows(dh: Tensor | None, call: LinearCall, dtype: torch.dtype) -> Tensor | None:
    """Sum over the targets of a row.

    By sorting: an index_add on a GPU would add repeats in any order.
    """
    if dh is None or call.rows is None:
        return None if dh is None else dh.to(dtype)
    return dh.new_zeros(call.h.shape).index_put_((call.rows,), dh, accumulate=True).to(dtype)


def contiguous(up: Upstream) -> Upstream:
    """The same with unit strides, which the kernels count on."""
    return up.map(Tensor.contiguous)


def slice_tokens(up: Upstream, t: slice) -> Upstream:
    """The upstream of a slice of the tokens."""
    return up.map(lambda x: x[t])
