"""Backend "cublas32".

Blocks of float32 logits by the vendor's matrix product, and one row kernel over each of them.

The plain counterpart of "triton": every GPU, every shape, the same accuracy, and nothing to tune
but the block, which is small enough to stay in L2. The library may sum in another order for another
number of tokens, so bits depend on the batch even with deterministic=True; from run to run they do
not. 16-bit inputs of one type give float32 logits directly (CUDA); mixed types, and the CPU
interpreter, are widened first.
"""

from __future__ import annotations

import torch
from torch import Tensor

from appo._kernels.common.gpu import launch
from appo._kernels.common.gpu.config import logit_block
from appo._kernels.linear_logprob.blocks import LinearCall, Upstream, softcap_tensor
from appo._kernels.linear_logprob.gpu import backward
from appo._kernels.linear_logprob.gpu.rowgrads import rowgrads
from appo._kernels.linear_logprob.gpu.rowstats import rowstats


def float_logits(h: Tensor, w: Tensor) -> Tensor:
    """h @ w.T in float32: [N, V]."""
    if backward.widening_products(h) and h.dtype == w.dtype and h.element_size() == 2:
        return torch.mm(h, w.T, out_dtype=torch.float32)
    return h.float() @ w.float().T


def partial_stats(call: LinearCall, block: tuple[int, int] | None = None) -> Tensor:
    """(m, s, u, z) of all columns of w, [4, N] float32.

    block  (tokens, columns) of logits at once, default `logit_block`. Workspace: one block of
           float32 logits (32 MiB) and with `rows` the hidden states of one block of tokens. Never
           waits for the device.
    Raises TypeError for float64, or for bfloat16 in the interpreter; ValueError for tensors that
    are not on a GPU.
    """
    launch.check_tensors("cublas32", call.h, call.w)
    column, scale, cap = call.column.contiguous(), call.scale.contiguous(), softcap_tensor(call)
    n, v = column.shape[0], call.w.shape[0]
    tokens, columns = block or logit_block(n, v)
    out = scale.new_empty(4, n)
    with torch.autocast(call.h.device.type, enabled=False):
        for t0 in range(0, n, tokens):
            t = slice(t0, min(t0 + tokens, n))
            h_th = call.h[t] if call.rows is None else call.h.index_select(0, call.rows[t])
            for v0 in range(0, v, columns):
                # Without a name, so that it is gone before the next one is made.
                w_vh = call.w[v0 : v0 + columns]
                rowstats(float_logits(h_th, w_vh), column[t], scale[t], cap, v0, out[:, t])
    return out


def gradients(
    call: LinearCall,
    up: Upstream,
    need_h: bool,
    need_w: bool,
    need_scale: bool,
    dh_dtype: torch.dtype,
    block: tuple[int, int] | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(dh[T, H] in dh_dtype, dw[V, H] in the dtype of w, Σ_j g_j log2 p_j [N]).

    None for what was not asked.

    G is rounded once, to bfloat16 for 16-bit inputs; sums are float32. block (tokens, columns) of a
    strip, instead of `gradient_block`. Workspace: one block of float32 logits beside that of
    backward.gradients.
    """
    launch.check_tensors("cublas32", call.h, call.w)
    column, scale, cap = call.column.contiguous(), call.scale.contiguous(), softcap_tensor(call)
    up = backward.contiguous(up)

    def fill(h: Tensor, w: Tensor, t: slice, v0: int, out: Tensor, weighted: Tensor | None) -> None:
        tokens, _ = logit_block(out.shape[0], w.shape[0])
        for i in range(t.start, t.stop, tokens):
            s = slice(i, min(i + tokens, t.stop))
            at = slice(s.start - t.start, s.stop - t.start)
            some = backward.slice_tokens(up, s)
            total = None if weighted is None else weighted[at]
            rowgrads(float_logits(h[s], w), column[s], scale[s], cap, some, v0, out[at], total)

    return backward.gradients(call, fill, need_h, need_w, need_scale, dh_dtype, block)
