"""Attention over a packed tree, forward and backward.

Memory grows with the tokens and not with their square.

A stream of N tokens in depth-first order, `subtree_end[i]` = where the subtree of token i ends:
query i sees key j iff j ≤ i < subtree_end[j]. Nothing else is stored: a block of keys is seen as a
whole, in part or not at all by a block of queries, and its first and last key and its least and
largest `subtree_end` say which.

Two operators do the work, `appo::tree_attention_forward` and `appo::tree_attention_backward`,
opaque to torch.compile; a backend is a module `backend_<name>` with `forward(call) -> (o, lse)` and
`backward(call, saved, d_o, d_lse)`. Kernels of others that bring their own gradients ("flex",
"flash") are called outside of the operators: `attend(call) -> (o, lse)`.
"""

from __future__ import annotations

import math
from importlib import import_module
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from appo._kernels.common import backends, debug
from appo._kernels.common.operators import operator

FOREIGN = ("flex", "flash")
BACKENDS = ("torch", "cpu", "triton", *FOREIGN)
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
TRITON_DIM = 128  # longest head of the Triton kernels


class TreeCall(NamedTuple):
    """One call as the backends see it: checked, N ≥ 1.

    q[N, Hq, D], k[N, Hkv, D], v[N, Hkv, D]  one dtype, last stride 1; query head h uses head h // (Hq / Hkv) of k and v
    subtree_end[N]  int32, contiguous, on the device of q
    scale    factor of the scores
    """

    q: Tensor
    k: Tensor
    v: Tensor
    subtree_end: Tensor
    scale: float


class Saved(NamedTuple):
    """What forward saves for backward: o like q, lse[N, Hq] float32 (float64 for float64)."""

    o: Tensor
    lse: Tensor


@overload
def tree_attention(
    q: Tensor, k: Tensor, v: Tensor, subtree_end: Tensor, *, scale: float | None = None, backend: str = "auto",
    return_lse: Literal[False] = False,
) -> Tensor: ...  # fmt: skip
@overload
def tree_attention(
    q: Tensor, k: Tensor, v: Tensor, subtree_end: Tensor, *, scale: float | None = None, backend: str = "auto",
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
def tree_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    subtree_end: Tensor,
    *,
    scale: float | None = None,
    backend: str = "auto",
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """o_i = Σ_j softmax_j(scale · q_i·k_j) v_j over the keys j ≤ i < subtree_end[j].

    [N, Hq, D] in the dtype of q.

    q[N, Hq, D]   float32, bfloat16, float16 (sums in float32) or float64; any strides
    k, v[N, Hkv, D]  Hkv divides Hq: neighbouring query heads share a head of keys
    subtree_end[N]       integer, i < subtree_end[i] ≤ N; the intervals [i, subtree_end[i]) of a
                         tree never cross
    scale         default 1/√D
    backend       "auto" | "torch" | "cpu" (heads up to 256) | "triton" (up to 128) | "flex" |
                  "flash", see `module`
    return_lse    also lse[N, Hq], log Σ exp of the scaled scores, float32 (float64 for float64)

    Gradients flow from o and lse to q, k and v; a key's gradients are summed over all queries and
    heads that see it, in float32, and rounded once. Every backend gives the same bits on every run,
    whatever the number of threads, so there is no switch for it. o, lse and the inputs are saved
    for backward. A token that is not finite makes NaN of those who see it, and of their gradients;
    nobody else is touched ("flex" and "flash" may touch neighbours). Raises ValueError or TypeError
    for shapes, dtypes, devices and a `subtree_end` that is no tree (on a GPU in `debug` only:
    looking at it waits for the device).
    """
    check_inputs(q, k, v, subtree_end, backend)
    if scale is None:
        scale = 1.0 / math.sqrt(q.shape[2])
    if not math.isfinite(scale):
        raise ValueError(f"scale is {scale}, expected a finite number")
    subtree_end = _int32(subtree_end)
    if backend in FOREIGN and q.numel():
        o, lse = _attend(TreeCall(q, k, v, subtree_end, float(scale)), backend)
    else:
        o, lse = _TreeAttention.apply(q, k, v, subtree_end, float(scale), backend)
    return (o, lse) if return_lse else o


def _int32(subtree_end: Tensor) -> Tensor:
    """The ends as contiguous int32.

    What int32 does not hold becomes its largest or smallest number, which no stream has.
    """
    if subtree_end.dtype == torch.int64:
        limits = torch.iinfo(torch.int32)
        subtree_end = subtree_end.clamp(limits.min, limits.max)
    return subtree_end.to(torch.int32).contiguous()


def _attend(call: TreeCall, backend: str) -> tuple[Tensor, Tensor]:
    if call.q.device.type == "cpu" or debug.active():
        check_tree(call.subtree_end)
    with torch.autocast(call.q.device.type, enabled=False):
        o, lse = module(backend, call.q).attend(call)
    debug.count_non_finite(lse.detach().T)
    return o, lse


class _TreeAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, subtree_end: Tensor, scale: float, backend: str
    ) -> tuple[Tensor, Tensor]:
        o, lse = forward_op(q, k, v, subtree_end, scale, backend)
        ctx.save_for_backward(q, k, v, subtree_end, o, lse)
        ctx.scale, ctx.backend = scale, backend
        ctx.set_materialize_grads(False)
        return o, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_o: Tensor | None, d_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, subtree_end, o, lse = ctx.saved_tensors
        if d_o is None:
            if d_lse is None:
                return (None,) * 6
            d_o = torch.zeros_like(o)
        grads = backward_op(q, k, v, subtree_end, ctx.scale, o, lse, d_o, d_lse, ctx.backend)
        needed = (g if need else None for g, need in zip(grads, ctx.needs_input_grad))
        return *needed, None, None, None


def _forward(
    q: Tensor, k: Tensor, v: Tensor, subtree_end: Tensor, scale: float, backend: str
) -> tuple[Tensor, Tensor]:
    if subtree_end.device.type == "cpu" or debug.active():
        check_tree(subtree_end)
    if not q.numel():
        return _fake_forward(q, k, v, subtree_end, scale, backend)
    with torch.autocast(q.device.type, enabled=False):
        o, lse = module(backend, q).forward(
            TreeCall(_rows(q), _rows(k), _rows(v), subtree_end, scale)
        )
    debug.count_non_finite(lse.T)
    return o, lse


def _backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    subtree_end: Tensor,
    scale: float,
    o: Tensor,
    lse: Tensor,
    d_o: Tensor,
    d_lse: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv), contiguous, in the dtype of q."""
    if not q.numel():
        return _fake_backward(q, k, v)
    call = TreeCall(_rows(q), _rows(k), _rows(v), subtree_end, scale)
    d_lse = None if d_lse is None else d_lse.contiguous()
    with torch.autocast(q.device.type, enabled=False):
        dq, dk, dv = module(backend, q).backward(call, Saved(o, lse), _rows(d_o), d_lse)
    return dq, dk, dv


def _rows(x: Tensor) -> Tensor:
    """x with its last numbers one after another; a copy only if they are not."""
    x = x.detach()
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _fake_forward(
    q: Tensor, k: Tensor, v: Tensor, subtree_end: Tensor, scale: float, backend: str
) -> tuple[Tensor, Tensor]:
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty(q.shape), q.new_empty(q.shape[:2], dtype=wide)


def _fake_backward(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


forward_op = operator("tree_attention_forward", _forward, _fake_forward)
backward_op = operator("tree_attention_backward", _backward, _fake_backward)


def module(backend: str, q: Tensor) -> Any:
    """The backend that a name means for these queries.

    A named one that cannot run them says so itself.

    auto: float64 → torch; CUDA → triton where it runs and the head is short enough; CPU → cpu where
    it runs; else torch. flex and flash are taken by name only: for a GPU whose Triton is too old
    for ours, for longer heads, and to compare.
    """
    name = backend
    if backend == "auto":
        name = "torch"
        if q.dtype != torch.float64 and q.device.type == "cuda":
            if q.shape[2] <= TRITON_DIM and backends.triton_runs(q.device):
                name = "triton"
        elif (
            q.dtype != torch.float64
            and q.device.type == "cpu"
            and q.shape[2] <= 256
            and backends.native_isa() is not None
        ):
            name = "cpu"
    return import_module(f"appo._kernels.tree_attention.backend_{name}")


def check_inputs(q: Tensor, k: Tensor, v: Tensor, subtree_end: Tensor, backend: str) -> None:
    """Shapes, dtypes, devices and the name of the backend; nothing that has to look at a value."""
    if backend not in ("auto", *BACKENDS):
        expected = ", ".join(repr(b) for b in ("auto", *BACKENDS))
        raise ValueError(f"backend is {backend!r}, expected one of {expected}")
    found = f"q is {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if q.ndim != 3 or k.ndim != 3 or k.shape != v.shape or q.shape[0::2] != k.shape[0::2]:
        raise ValueError(f"{found}; expected [N, Hq, D] and twice [N, Hkv, D]")
    if q.shape[2] == 0 or k.shape[1] == 0 or q.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(f"{found}; Hkv must divide Hq, and no head may be empty")
    if not q.is_floating_point() or not q.dtype == k.dtype == v.dtype:
        raise TypeError(
            f"q, k and v are {q.dtype}, {k.dtype} and {v.dtype}; expected one floating-point dtype"
        )
    if subtree_end.dtype not in INTEGERS:
        raise TypeError(
            f"subtree_end is {subtree_end.dtype}, expected a signed integer dtype (or uint8)"
        )
    if subtree_end.shape != q.shape[:1]:
        raise ValueError(
            f"subtree_end is {tuple(subtree_end.shape)}, expected [{q.shape[0]}], one per token"
        )
    for name, x in (("k", k), ("v", v), ("subtree_end", subtree_end)):
        if x.device != q.device:
            raise ValueError(f"{name} is on {x.device}, q on {q.device}; move it there first")


def check_tree(subtree_end: Tensor) -> None:
    """ValueError unless i < subtree_end[i] ≤ N and no two intervals [i, subtree_end[i]) cross.

    O(N log N), vectorised.
    """
    n = subtree_end.shape[0]
    if n == 0:
        return
    ends = subtree_end.to(torch.int64)
    at = torch.arange(n, device=subtree_end.device)
    wrong = ((ends <= at) | (ends > n)).nonzero()
    if wrong.numel():
        i = int(wrong[0, 0])
        raise ValueError(
            f"subtree_end[{i}] is {int(ends[i])}, expected {i + 1} … {n}: the token sees itself, and N = {n}"
        )
    # The largest end inside an interval must be its own: looked up in two overlapping spans of
    # 2^level tokens.
    spans = [ends]
    while 2 << (len(spans) - 1) <= n:
        half, last = 1 << (len(spans) - 1), spans[-1]
        spans.append(torch.cat([torch.maximum(last[:-half], last[half:]), last[-half:]]))
    table = torch.stack(spans)  # [levels, N]; entries that reach beyond N are not used
    level = torch.log2((ends - at).double()).long()
    largest = torch.maximum(table[level, at], table[level, ends - (1 << level)])
    wrong = (largest > ends).nonzero()
    if wrong.numel():
        i = int(wrong[0, 0])
        j = i + int((ends[i : int(ends[i])] > ends[i]).nonzero()[0, 0])
        raise ValueError(
            f"subtree_end[{i}] is {int(ends[i])} and subtree_end[{j}] is {int(ends[j])}: token {j} lies in the subtree of token {i}, so "
            "its own must end there too; the stream must be in depth-first order"
        )
