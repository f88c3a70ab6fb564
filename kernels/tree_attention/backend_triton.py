"""Backend "triton" of tree attention: kernels/gpu/tree_attention_{forward,backward}.

Heads up to 128, not float64.

16-bit inputs are multiplied as they are with float32 sums (weights and their gradients rounded to
the dtype before a product), float32 exactly. Inputs are handed over without what is not finite, see
`cleaned`: a copy of each.
"""

from __future__ import annotations

import torch
from torch import Tensor

from appo._kernels.common import packed
from appo._kernels.tree_attention.op import TRITON_DIM, Saved, TreeCall


def forward(call: TreeCall) -> tuple[Tensor, Tensor]:
    """(o like q, lse[N, Hq] float32). Workspace: copies of k and v."""
    _check(call)
    (k, hurt_k), (v, hurt_v) = cleaned(call.k), cleaned(call.v)
    run = packed.gpu("tree_attention.gpu.forward").forward
    return run(call.q.contiguous(), k, v, call.subtree_end, hurt_k + hurt_v, call.scale)


def backward(
    call: TreeCall, saved: Saved, d_o: Tensor, d_lse: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv) in the dtype of q. Workspace: copies of q, k, v and d_o."""
    _check(call)
    (q, hurt_q), (g, hurt_g) = cleaned(call.q), cleaned(d_o)
    # A query that is not finite, or its upstream, is to make NaN of all that it saw; who saw such a
    # key has lse NaN already.
    lse = saved.lse + hurt_q + hurt_g
    k, v = cleaned(call.k)[0], cleaned(call.v)[0]
    run = packed.gpu("tree_attention.gpu.backward").backward
    return run(q, k, v, call.subtree_end, call.scale, g, saved.o, lse, d_lse)


def cleaned(x: Tensor) -> tuple[Tensor, Tensor]:
    """x[N, H, D] contiguous with zeros for what is not finite, and hurt[N, H] float32.

    hurt is NaN for a row with such a number, else 0.

    In a block that is seen in part a weight of 0 meets every row: NaN must not be in it.
    """
    fine = torch.isfinite(x)
    hurt = torch.where(fine.all(-1), 0.0, torch.nan).float()
    return torch.where(fine, x, 0.0).contiguous(), hurt


def _check(call: TreeCall) -> None:
    packed.gpu("common.gpu.launch").check_tensors("triton", call.q, call.k, call.v)
    if call.q.shape[2] > TRITON_DIM:
        raise ValueError(
            f"backend='triton' takes heads up to {TRITON_DIM}, not {call.q.shape[2]}; use backend='auto'"
        )
