"""Backend "flash" of tree attention.

flash-attn's varlen kernels, one sequence per leaf, shared queries computed once.

The stream is cut into runs, each token of which is the child of the one before it. The queries of a
run are its own tokens, its keys are their ancestors and themselves: a causal mask that ends bottom
right, which is what flash-attn means by `causal`. Keys and values are copied for every run that
sees them; the gradients of the copies are summed in float32.

flash-attn is an optional extra, CUDA only, bfloat16 and float16. Its lse has no gradient, so ours
has none either and says so. Unlike in our kernels a token that is not finite may reach others in
its run (0 · NaN).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor

from appo._kernels.tree_attention.last_call import LastCall
from appo._kernels.tree_attention.op import TreeCall


class Runs(NamedTuple):
    """keys[M] int64: stream indices, run after run, ancestors first.

    Queries are the stream as it is.

    q_ends, k_ends[runs + 1] int32: where the queries and the keys of a run begin and end; most_*:
    the longest run.
    """

    keys: Tensor
    q_ends: Tensor
    k_ends: Tensor
    most_q: int
    most_k: int


def runs(subtree_end: Tensor) -> Runs:
    """The plan of a stream, made on the host in the time that its M keys take.

    Waits for the device of subtree_end.
    """
    ends = subtree_end.cpu().long()
    n = ends.numel()
    forks = ends[:-1] == torch.arange(1, n)  # nobody follows on this token
    starts = [0, *(forks.nonzero()[:, 0] + 1).tolist()]
    stops = [*starts[1:], n]
    keys = [torch.arange(0)]
    for start, stop in zip(starts, stops):
        before = keys[-1]
        keys.append(torch.cat([before[ends[before] > start], torch.arange(start, stop)]))
    lengths = [k.numel() for k in keys]
    q_ends = torch.tensor([0, *stops], dtype=torch.int32, device=subtree_end.device)
    k_ends = torch.tensor(lengths, device=subtree_end.device).cumsum(0, dtype=torch.int32)
    longest = max(b - a for a, b in zip(starts, stops))
    return Runs(torch.cat(keys).to(subtree_end.device), q_ends, k_ends, longest, max(lengths))


def attend(call: TreeCall) -> tuple[Tensor, Tensor]:
    """(o[N, Hq, D], lse[N, Hq] float32); o is differentiable by q, k and v.

    Raises RuntimeError without flash-attn or a GPU, TypeError for other dtypes, ValueError for
    heads over 256.
    """
    varlen = _varlen()
    _check(call)
    plan = _plans(call.subtree_end)
    o, lse, _ = varlen(
        call.q.contiguous(),
        _Copies.apply(call.k, plan.keys),
        _Copies.apply(call.v, plan.keys),
        plan.q_ends,
        plan.k_ends,
        plan.most_q,
        plan.most_k,
        softmax_scale=call.scale,
        causal=True,
        deterministic=True,
        return_attn_probs=True,
    )
    return o, _NoGradient.apply(lse.T, o)


def _check(call: TreeCall) -> None:
    if call.q.device.type != "cuda":
        raise RuntimeError(f"backend='flash' needs a CUDA device, q is on {call.q.device}")
    if call.q.dtype not in (torch.bfloat16, torch.float16):
        raise TypeError(
            f"backend='flash' takes bfloat16 and float16, not {call.q.dtype}; use backend='auto'"
        )
    if call.q.shape[2] > 256:
        raise ValueError(f"backend='flash' takes heads up to 256, not {call.q.shape[2]}")


@functools.cache
def _varlen() -> Callable[..., Any]:
    try:
        return import_module("flash_attn").flash_attn_varlen_func
    except ImportError as error:
        raise RuntimeError(
            "backend='flash' needs flash-attn, which is not installed: pip install 'appo[flash-attn]', or use "
            "backend='auto'"
        ) from error


class _Copies(torch.autograd.Function):
    """x[N, H, D] → x[index].

    The gradients of the copies of a row are summed in float32 and rounded once.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.like = (x.shape, x.dtype)
        return x.index_select(0, index)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (index,) = ctx.saved_tensors
        shape, dtype = ctx.like
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        total = grad.new_zeros(shape, dtype=wide)
        # Not index_add_: on CUDA that adds in any order, while this sorts first and gives the same
        # bits on every run.
        total.index_put_((index,), grad.to(wide), accumulate=True)
        return total.to(dtype), None


class _NoGradient(torch.autograd.Function):
    """lse; where o has a gradient, to ask for that of lse is an error and not a zero."""

    @staticmethod
    def forward(ctx: Any, lse: Tensor, o: Tensor) -> Tensor:
        return lse.clone()

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> Tensor:
        raise RuntimeError("backend='flash' has no gradient of lse; use backend='auto'")


_plans = LastCall(runs)
