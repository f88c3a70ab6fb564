"""Backend "triton": matrix product and statistics in one kernel, no logits in memory.

Forward is gpu/partial.py, then gpu/merge.py, in blocks of tokens that bound the workspace. Backward
recomputes the logits tile by tile (gpu/dlogits.py) into a strip of gradients for two matrix
products of the vendor's library.

deterministic=True: statistics are summed per canonical unit of 1,024 columns and joined in order,
so that a token's bits depend on that token and w alone (for given strides and GPU). The gradients
are the same on every run; their matrix products may use another algorithm for another number of
tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from appo._kernels.common.gpu import launch
from appo._kernels.common.gpu.config import DLOGITS, PARTIAL, Tile, ceil_div, cut
from appo._kernels.linear_logprob.blocks import LinearCall, Upstream, softcap_tensor
from appo._kernels.linear_logprob.gpu import backward
from appo._kernels.linear_logprob.gpu.dlogits import dlogits
from appo._kernels.linear_logprob.gpu.merge import merge_slots_into
from appo._kernels.linear_logprob.gpu.partial import partial


def partial_stats(call: LinearCall, tile: Tile | None = None) -> Tensor:
    """(m, s, u, z) of all columns of w, [4, N] float32.

    Workspace: `cut(…).workspace_bytes`, at most 80 MB.

    tile: for another than that of the table. h and w with unit stride inside a row, or they are
    copied. Never waits for the device. Raises TypeError for float64, or for bfloat16 in the
    interpreter; ValueError for tensors that are not on a GPU.
    """
    launch.check_tensors("triton", call.h, call.w)
    h, w = launch.contiguous_rows(call.h), launch.contiguous_rows(call.w)
    column, scale = call.column.contiguous(), call.scale.contiguous()
    cap = softcap_tensor(call)
    n, v = column.shape[0], w.shape[0]
    tile = tile or launch.tile(PARTIAL, h, w)
    plan = cut(n, v, tile, call.deterministic, launch.processors(h.device))

    out = scale.new_empty(4, n)
    stats = scale.new_empty(plan.slots * 4 * plan.tokens)
    for t0 in range(0, n, plan.tokens):
        t = slice(t0, min(t0 + plan.tokens, n))
        rows = None if call.rows is None else call.rows[t].contiguous()
        h_t = h[t] if rows is None else h
        part = stats[: plan.slots * 4 * (t.stop - t0)].view(plan.slots, 4, t.stop - t0)
        partial(h_t, w, column[t], rows, scale[t], cap, part, plan.tiles_per_slot, tile)
        merge_slots_into(out[:, t], part)
    return out


def gradients(
    call: LinearCall,
    up: Upstream,
    need_h: bool,
    need_w: bool,
    need_scale: bool,
    dh_dtype: torch.dtype,
    tile: Tile | None = None,
    block: tuple[int, int] | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(dh[T, H] in dh_dtype, dw[V, H] in the dtype of w, Σ_j g_j log2 p_j [N]).

    None for what was not asked.

    G is rounded once, to bfloat16 for 16-bit inputs; sums are float32. tile and block: for other
    sizes than those of the table. Workspace: see backward.gradients.
    """
    launch.check_tensors("triton", call.h, call.w)
    call = call._replace(
        h=launch.contiguous_rows(call.h), w=launch.contiguous_rows(call.w),
        column=call.column.contiguous(), scale=call.scale.contiguous(),
    )  # fmt: skip
    up = backward.contiguous(up)
    cap = softcap_tensor(call)

    def fill(h: Tensor, w: Tensor, t: slice, v0: int, out: Tensor, weighted: Tensor | None) -> None:
        size = tile or launch.tile(DLOGITS, h, w)
        parts = None
        if weighted is not None:
            parts = weighted.new_empty(ceil_div(w.shape[0], size.columns), out.shape[0])
        some = backward.slice_tokens(up, t)
        dlogits(h[t], w, call.column[t], call.scale[t], cap, some, v0, out, parts, size)
        if weighted is not None and parts is not None:
            weighted += parts.sum(dim=0)

    return backward.gradients(call, fill, need_h, need_w, need_scale, dh_dtype, block)
