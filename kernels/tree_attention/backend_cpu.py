"""Backend "cpu" of tree attention: the native kernels of csrc/tree_attention/.

bfloat16 is multiplied as bf16 with float32 sums where the machine has AVX512-BF16 (weights and
their gradients are rounded to bf16 before a product); all else as float32. Same bits for any number
of threads.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from appo._kernels.common import backends, native
from appo._kernels.tree_attention.op import Saved, TreeCall

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def forward(
    call: TreeCall, *, isa: str | None = None, threads: int | None = None
) -> tuple[Tensor, Tensor]:
    """(o like q, lse[N, Hq] float32).

    isa      "avx512_bf16", "avx512", "avx2" or None, the best for these inputs
    threads  upper bound, default torch's
    Workspace: as much as k and v hold (twice that where 16-bit numbers are widened) and under 1 MiB
    per thread. Raises RuntimeError without the native library, TypeError for float64, ValueError
    for heads over 256.
    """
    o = torch.empty(call.q.shape, dtype=call.q.dtype)
    lse = torch.empty(call.q.shape[:2])
    run = _native("tree_attention_forward", call)
    run(*call, o, lse, isa or "", _threads(threads))
    return o, lse


def backward(
    call: TreeCall,
    saved: Saved,
    d_o: Tensor,
    d_lse: Tensor | None,
    *,
    isa: str | None = None,
    threads: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv), contiguous, in the dtype of q. Sums are float32 and rounded once.

    Workspace: for the queries of one head of keys, four packed forms and a float32 dq; under 2 MiB
    per thread.
    """
    grads = tuple(torch.empty(x.shape, dtype=x.dtype) for x in (call.q, call.k, call.v))
    run = _native("tree_attention_backward", call)
    run(*call, saved.o, saved.lse, d_o, d_lse, *grads, isa or "", _threads(threads))
    return grads  # type: ignore[return-value]


def _threads(threads: int | None) -> int:
    return torch.get_num_threads() if threads is None else threads


def _native(name: str, call: TreeCall) -> Any:
    if call.q.device.type != "cpu" or call.q.dtype not in DTYPES:
        raise TypeError(
            f"backend='cpu' takes float32, bfloat16 and float16 on a CPU, not {call.q.dtype} on {call.q.device}; "
            "use backend='auto'"
        )
    if backends.native_isa() is None:
        native.require("native_isa")  # says why there is no library
        raise RuntimeError("backend='cpu' needs a machine with AVX2 and a library built for it")
    return native.require(name)
