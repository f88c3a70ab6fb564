"""Backend "cpu": the native kernels of csrc/linear_logprob/.

Logits exist as tiles of 48 KiB that never leave the cache.

bf16 inputs are multiplied as bf16 with float32 sums where the machine has AVX512-BF16; all else as
float32 (AVX-512 or AVX2), 16-bit numbers being widened on the way. w is read where it lies: each
tile is packed as it is needed, and nothing is kept between calls.

Same bits for any number of threads; the bits of a token depend on its row of h, on w and on the
size of the vocabulary.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from appo._kernels.common import native
from appo._kernels.common.backends import native_isa as isa
from appo._kernels.linear_logprob.blocks import LinearCall, Upstream

_WIDE_SUMS = 1 << 23  # numbers of dh up to which its float32 sums are simply kept (32 MiB)
_TILE, _KEPT_HEAD, _KEPT_TILE = (
    256,
    64,
    576,
)  # csrc/linear_logprob/linear_logprob.h: columns, bytes of what forward keeps
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def supports(call: LinearCall) -> bool:
    """Whether the native kernels can run this call on this machine."""
    tensors = (call.h, call.w)
    fits = all(t.device.type == "cpu" and t.dtype in DTYPES for t in tensors)
    return fits and isa() is not None


def cache_bytes(n: int, vocab: int) -> int:
    """Size of `prob_cache` at which it holds all probabilities of n targets: 2.25 B per logit."""
    return n * (_KEPT_HEAD + -(-vocab // _TILE) * _KEPT_TILE)


def partial_stats(
    call: LinearCall,
    *,
    prob_cache: Tensor | None = None,
    isa: str | None = None,
    threads: int | None = None,
) -> Tensor:
    """(m, s, u, z) of all columns of w, [4, N] float32.

    prob_cache  uint8 tensor of any size, overwritten with probabilities of the leading columns, as
                many as
             fit, for `gradients` of the same call; not used for float32 inputs or with a softcap
    isa      "avx512_bf16", "avx512", "avx2" or None, the best for these inputs
    threads  upper bound, default torch's
    Workspace: 256 B per target and, per thread, 1,024 rows of h, one tile of w and 192 B per target
    of those rows. Raises RuntimeError without the native library, TypeError for float64.
    """
    order, users = _users(call)
    out = torch.empty(4, call.column.shape[0])
    arguments = _arguments(call, order, users)
    _native("linear_logprob_stats")(*arguments, out, prob_cache, isa or "", _threads(threads))
    return out if order is None else _unsort(out, order)


def gradients(
    call: LinearCall,
    up: Upstream,
    need_h: bool,
    need_w: bool,
    need_scale: bool,
    dh_dtype: torch.dtype,
    *,
    prob_cache: Tensor | None = None,
    isa: str | None = None,
    threads: int | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(dh[T, H] in dh_dtype, dw[V, H] in the dtype of w, Σ_j g_j log2 p_j [N]).

    None for what was not asked.

    Sums are float32 and rounded once. G, the gradient of the logits, is rounded to bf16 for a bf16
    product. Columns in `prob_cache` need no logits: a quarter less work where all are there. Their
    p is rounded to 11 bits (fewer below 2^-29 of the largest), that of the target is not: the bits
    of dh depend on how many columns the cache holds. Workspace: 10 to 20 MB, and the sums of dh: 4
    B per number, 2 B for a bf16 dh above 8 million numbers.
    """
    order, users = _users(call)
    vectors = [up.m, up.log2s, up.p_factor, up.plogp_factor, up.d_logp]
    given = [None if x is None else _sorted(x, order) for x in vectors]
    dh = low = None
    if need_h:
        # Rows without a target have gradient 0.
        new = torch.empty if users.rows is None else torch.zeros
        # A large bf16 dh is summed in two halves, the upper one in the result: float32 sums would
        # take twice its bytes.
        split = dh_dtype == torch.bfloat16 and call.h.numel() > _WIDE_SUMS
        dtype = torch.bfloat16 if split else torch.float32
        dh = new(call.h.shape, dtype=dtype)
        if split:
            low = torch.empty(users.offsets.shape[0] - 1, call.h.shape[1], dtype=torch.int16)
    dw = torch.empty(call.w.shape, dtype=call.w.dtype) if need_w else None
    d_scale = torch.empty_like(up.m) if need_scale else None
    given += [dh, low, dw, d_scale, prob_cache]
    _native("linear_logprob_grads")(
        *_arguments(call, order, users), *given, isa or "", _threads(threads)
    )
    if d_scale is not None and order is not None:
        d_scale = _unsort(d_scale, order)
    return None if dh is None else dh.to(dh_dtype), dw, d_scale


class _Users(NamedTuple):
    """Targets by the row of h that they use.

    Row rows[i] (row i if None) has the targets offsets[i] … offsets[i+1]-1.
    """

    rows: Tensor | None
    offsets: Tensor


def _users(call: LinearCall) -> tuple[Tensor | None, _Users]:
    """(order of the targets by row, None if they are in order; the rows in use, each once)."""
    n = call.column.shape[0]
    if call.rows is None:
        return None, _Users(None, torch.arange(n + 1))
    order = torch.argsort(call.rows, stable=True)
    rows, counts = torch.unique_consecutive(call.rows[order], return_counts=True)
    offsets = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
    return order, _Users(rows, offsets)


def _arguments(call: LinearCall, order: Tensor | None, users: _Users) -> tuple[Any, ...]:
    vectors = (_sorted(call.column, order), _sorted(call.scale, order))
    return (
        call.h.detach(),
        call.w.detach(),
        users.rows,
        users.offsets,
        *vectors,
        call.softcap or 0.0,
    )


def _sorted(x: Tensor, order: Tensor | None) -> Tensor:
    return x.detach().contiguous() if order is None else x.detach()[order]


def _unsort(x: Tensor, order: Tensor) -> Tensor:
    return torch.empty_like(x).index_copy_(-1, order, x)


def _threads(threads: int | None) -> int:
    return torch.get_num_threads() if threads is None else threads


def _native(name: str) -> Any:
    if isa() is None:
        native.require("native_isa")  # says why there is no library
        raise RuntimeError("backend='cpu' needs a machine with AVX2 and a library built for it")
    return native.require(name)
