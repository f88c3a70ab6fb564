"""Log-probability and entropy of sampled tokens straight from hidden states.

Two operators do the work, `appo::linear_logprob_stats` and `appo::linear_logprob_grads`; both are opaque to
torch.compile and have fake implementations, so a compiled graph does not break at them. Between
them lie a few lines on vectors of N tokens: the merge over ranks, logp, entropy and lse from the
statistics, and the upstream factors of backward.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from appo._kernels.common import debug
from appo._kernels.common.operators import operator
from appo._kernels.common.stats import EMPTY, LN2, LOG2E, Stats, column_stats, finish
from appo._kernels.linear_logprob import backend_cpu as linear_cpu
from appo._kernels.linear_logprob import backends
from appo._kernels.linear_logprob.blocks import (
    IGNORE,
    LinearCall,
    Upstream,
    check_inputs,
    check_values,
    inverse_temperature,
)
from appo._kernels.linear_logprob.vocab_parallel import check_shards, merge_ranks, sum_ranks

SAVED_BYTES = 128 << 20


class LogProbEntropy(NamedTuple):
    """logp, entropy (nats, ≥ 0), log-sum-exp of scaled logits: [N] float32 (float64 for such)."""

    logp: Tensor
    entropy: Tensor
    lse: Tensor


class HeadOptions(NamedTuple):
    """What both operators are told beside tensors; see `linear_logprob_entropy`."""

    softcap: float | None
    vocab_start: int
    backend: str
    deterministic: bool
    block: Sequence[int] | None


def linear_logprob_entropy(
    h: Tensor,
    w: Tensor,
    targets: Tensor,
    *,
    rows: Tensor | None = None,
    inv_temp: float | Tensor = 1.0,
    softcap: float | None = None,
    vocab_start: int = 0,
    group: Any = None,
    backend: str = "auto",
    deterministic: bool = True,
    saved_bytes: int = SAVED_BYTES,
    block: tuple[int, int] | None = None,
) -> LogProbEntropy:
    """Statistics of softmax(inv_temp · cap(h @ w.T)) at `targets`; no [T, V] tensor is made.

    h[T, H], w[V, H]  hidden states and output head: float32, bfloat16, float16 (statistics in
                      float32) or float64
    targets[N]        integer ids in vocab_start … vocab_start+V-1, or IGNORE
    rows[N]           which rows of h belong to the targets (repeats allowed); None: all, N = T
    inv_temp          1/temperature > 0: a number, or a tensor [] or [N] (differentiable)
    softcap           logits become softcap · tanh(logits / softcap) before the temperature
    vocab_start       where the rows of w begin in the vocabulary; with `group` they are this
    group             rank's contiguous slice of it. Statistics are merged over the process group in
                      rank order, h and the upstream gradients must be the same on all its ranks,
                      and the gradient of h comes back summed
    backend           "auto" | "torch" | "cpu" | "triton" | "cublas32"; see `backends`
    deterministic     the bits of a token's results do not depend on the batch around it (same bits
                      on every run in any case; gradients are sums over the batch)
    saved_bytes       bytes that forward may save for backward where a gradient is wanted: a cache
                      of probabilities of the leading columns, for which backward then needs no
                      logits (backend "cpu", 16-bit inputs). 0: no cache. There is none either where
                      less than half of the columns would fit
    block             (tokens, columns) per block of the "torch" backend

    Gradients flow from logp, entropy and lse to h, w and inv_temp; what needs none is not computed
    (a frozen head costs no dW). They are summed in float32 and rounded once. A logit of -inf lies
    outside the support; a row with a NaN or +inf logit gets NaN for all three, other rows are not
    touched. IGNORE gets 0 for all three. Raises ValueError or TypeError for shapes, dtypes, devices
    and ids that do not fit (ids on a GPU: in `debug` only, as looking at them waits for it).
    """
    backends.check_name(backend)
    check_inputs(h, w, targets, rows, softcap)
    n = targets.shape[0]
    if n == 0:
        scale = inverse_temperature(inv_temp, 0, h, w)  # no item, but a part of the graph
        empty = scale * 1.0 + (h[:0].sum() + w[:0].sum()).to(scale.dtype)
        return LogProbEntropy(empty, empty, empty)
    scale = inverse_temperature(inv_temp, n, h, w)
    targets = targets.to(torch.int64)
    vocabulary = (vocab_start, vocab_start + w.shape[0])
    if group is not None:
        vocabulary = check_shards(vocab_start, w.shape[0], targets.device, group)
    # The temperature's gradient sums over all logits: half-precision probabilities would show.
    wanted = torch.is_grad_enabled() and (h.requires_grad or w.requires_grad)
    saved_bytes = saved_bytes if wanted and not scale.requires_grad else 0
    options = HeadOptions(softcap, vocab_start, backend, deterministic, block)
    call = (rows, options, vocabulary, group, saved_bytes)
    return LogProbEntropy(*_Fused.apply(h, w, targets, scale, *call))


@torch.no_grad()
def logprob_entropy(
    logits: Tensor, targets: Tensor, *, inv_temp: float | Tensor = 1.0
) -> LogProbEntropy:
    """The same statistics for logits[N, V] that exist anyway (a sampler's).

    -inf logits are outside the support (as a target they get a logp near -7e29, never NaN).
    targets[N] integer ids or IGNORE (0 for all three); inv_temp a number, [] or [N]. No gradient;
    logits are not changed. Works in row blocks. On a GPU ids are looked at in `debug` only.
    """
    n, vocab = logits.shape
    if targets.shape != (n,) or targets.is_floating_point() or targets.dtype == torch.bool:
        raise TypeError(
            f"targets must be integer [{n}], not {targets.dtype} {tuple(targets.shape)}"
        )
    scale = inverse_temperature(inv_temp, n, logits, logits)
    targets = targets.to(torch.int64)
    real = targets != IGNORE
    if logits.device.type == "cpu" or debug.active():
        check_values(targets, None, scale, n, (0, vocab))
    scale = scale * LOG2E
    step = max(1, (1 << 20) // max(vocab, 1))
    parts = []
    for i in range(0, n, step):
        x2 = logits[i : i + step].to(scale.dtype) * scale[i : i + step, None]
        parts.append(column_stats(x2.masked_fill_(x2 < EMPTY, EMPTY), targets[i : i + step]))
    if not parts:
        return LogProbEntropy(*(scale.new_zeros(0) for _ in range(3)))
    found = finish(Stats(*(torch.cat(x) for x in zip(*parts))))
    return LogProbEntropy(*(torch.where(real, x, 0.0) for x in found))


class _Fused(torch.autograd.Function):
    """Forward saves h, w, four numbers per token and at most `saved_bytes` of probabilities.

    Backward computes the logits that the cache does not hold again, block by block.
    """

    @staticmethod
    def forward(
        ctx: Any,
        h: Tensor,
        w: Tensor,
        targets: Tensor,
        scale: Tensor,
        rows: Tensor | None,
        options: HeadOptions,
        vocabulary: tuple[int, int],
        group: Any,
        saved_bytes: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        packed, prob_cache = stats_op(
            h, w, targets, scale, rows, *options, *vocabulary, saved_bytes
        )
        stats = Stats(*packed.unbind(0))
        if group is not None:
            stats = merge_ranks(stats, group)
        real = targets != IGNORE
        logp, entropy, lse = (torch.where(real, x, 0.0) for x in finish(stats))
        per_token = (stats.m.clone(), torch.log2(stats.s), entropy, lse)
        ctx.save_for_backward(h, w, targets, scale, rows, prob_cache, *per_token)
        ctx.options, ctx.group = options, group
        return logp, entropy, lse

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, d_logp: Tensor, d_entropy: Tensor, d_lse: Tensor
    ) -> tuple[Tensor | None, ...]:
        h, w, targets, scale, rows, prob_cache, m, log2s, entropy, lse = ctx.saved_tensors
        need_h, need_w, _, need_scale = ctx.needs_input_grad[:4]
        real = targets != IGNORE
        d_logp, d_entropy, d_lse = (torch.where(real, g, 0.0) for g in (d_logp, d_entropy, d_lse))
        needs = (need_h, need_w, need_scale)
        wide = ctx.group is not None  # a sum over ranks is rounded after it, not before
        up = Upstream(m, log2s, d_lse - d_logp - d_entropy * entropy, d_entropy * LN2, d_logp)
        dh, dw, d_scale = grads_op(
            h, w, targets, scale, rows, *ctx.options, prob_cache, *up, *needs, wide
        )
        if wide:
            if need_h:
                dh = sum_ranks(dh, ctx.group).to(h.dtype)
            if need_scale:
                d_scale = sum_ranks(d_scale, ctx.group)
        # Σ_j G_j x_j with x_j = log p_j + lse and Σ_j G_j = d_lse: the large common part of x never
        # enters a sum.
        d_inv_temp = (LN2 * d_scale + d_lse * lse) / scale if need_scale else None
        return dh if need_h else None, dw if need_w else None, None, d_inv_temp, *([None] * 5)


def linear_logprob_stats(
    h: Tensor,
    w: Tensor,
    targets: Tensor,
    scale: Tensor,
    rows: Tensor | None,
    options: HeadOptions,
    low: int,
    high: int,
    saved_bytes: int,
) -> tuple[Tensor, Tensor]:
    """Statistics (m, s, u, z) over the columns of w, and probabilities for backward.

    [4, N] in the dtype of `scale`, and uint8.

    low … high-1 is the vocabulary of all ranks. Rows without a target hold (0, 1, 0, 0).
    """
    if h.device.type == "cpu" or debug.active():
        check_values(targets, rows, scale, h.shape[0], (low, high))
    n = targets.shape[0]
    at, call = _call(h, w, targets, scale, rows, options)
    prob_cache = torch.empty(
        _cache_size(h, w, n, options, saved_bytes), dtype=torch.uint8, device=h.device
    )
    if call.column.shape[0] == 0:
        stats = scale.new_zeros(4, 0)
    else:
        how = {"prob_cache": prob_cache} if prob_cache.numel() else {}
        with torch.autocast(h.device.type, enabled=False):
            stats = backends.module(backends.choose(options.backend, h, w)).partial_stats(
                call, **how
            )
    debug.count_non_finite(stats)
    if at is not None:
        neutral = scale.new_tensor([0.0, 1.0, 0.0, 0.0])[:, None].repeat(1, n)
        stats = neutral.index_copy_(1, at, stats)
    return stats, prob_cache


def _cache_size(h: Tensor, w: Tensor, n: int, options: HeadOptions, saved_bytes: int) -> int:
    """Bytes of `prob_cache`: none where less than half of the probabilities would fit."""
    if not saved_bytes or options.softcap is not None or torch.float32 in (h.dtype, w.dtype):
        return 0
    if backends.choose(options.backend, h, w) != "cpu":
        return 0
    every = linear_cpu.cache_bytes(n, w.shape[0])
    return min(every, saved_bytes) if every <= 2 * saved_bytes else 0


def _fake_stats(
    h: Tensor,
    w: Tensor,
    targets: Tensor,
    scale: Tensor,
    rows: Tensor | None,
    options: HeadOptions,
    *rest: Any,
) -> tuple[Tensor, Tensor]:
    n, saved_bytes = targets.shape[0], rest[-1]
    prob_cache = h.new_empty(_cache_size(h, w, n, options, saved_bytes), dtype=torch.uint8)
    return scale.new_empty(4, n), prob_cache


def linear_logprob_grads(
    h: Tensor,
    w: Tensor,
    targets: Tensor,
    scale: Tensor,
    rows: Tensor | None,
    options: HeadOptions,
    prob_cache: Tensor,
    up: Upstream,
    need_h: bool,
    need_w: bool,
    need_scale: bool,
    wide: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dh[T, H], dw[V, H], Σ_j g_j log2 p_j [N]) of one slice.

    An empty tensor for what is not needed.

    The vectors are those of `Upstream`. dh has the dtype of h, or with `wide` that of `scale`.
    """
    at, call = _call(h, w, targets, scale, rows, options)
    if at is not None:
        up = up.map(lambda x: x[at])
    if h.device.type == "cpu" and up.plogp_factor is not None and not bool(up.plogp_factor.any()):
        # no upstream of the entropy: one product per logit less
        up = up._replace(plogp_factor=None)
    dtype = scale.dtype if wide else h.dtype
    if call.column.shape[0] == 0:
        return (
            h.new_zeros(h.shape if need_h else 0, dtype=dtype),
            w.new_zeros(w.shape if need_w else 0),
            scale.new_zeros(targets.shape[0] if need_scale else 0),
        )
    with torch.autocast(h.device.type, enabled=False):
        run = backends.module(backends.choose(options.backend, h, w)).gradients
        how = {"prob_cache": prob_cache} if prob_cache.numel() else {}
        dh, dw, d_scale = run(call, up, need_h, need_w, need_scale, dtype, **how)
    if at is not None and d_scale is not None:
        d_scale = scale.new_zeros(targets.shape[0]).index_copy_(0, at, d_scale)
    return (
        h.new_empty(0, dtype=dtype) if dh is None else dh,
        w.new_empty(0) if dw is None else dw,
        scale.new_empty(0) if d_scale is None else d_scale,
    )


def _fake_grads(
    h: Tensor, w: Tensor, targets: Tensor, scale: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    need_h, need_w, need_scale, wide = rest[-4:]
    return (
        h.new_empty(h.shape if need_h else 0, dtype=scale.dtype if wide else h.dtype),
        w.new_empty(w.shape if need_w else 0),
        scale.new_empty(targets.shape[0] if need_scale else 0),
    )


stats_op = operator("linear_logprob_stats", linear_logprob_stats, _fake_stats)
grads_op = operator("linear_logprob_grads", linear_logprob_grads, _fake_grads)


def _call(
    h: Tensor,
    w: Tensor,
    targets: Tensor,
    scale: Tensor,
    rows: Tensor | None,
    options: HeadOptions,
) -> tuple[Tensor | None, LinearCall]:
    """(positions that have a target, or None for all; the call for them).

    On a CPU ignored targets cost nothing: only the others are computed. On a GPU to find them out
    would wait for the device, so they are computed and masked; leave them out with `rows`.
    """
    block = None if options.block is None else (options.block[0], options.block[1])
    rows = None if rows is None else rows.to(torch.int64)
    column = targets - options.vocab_start
    at = None
    if h.device.type == "cpu" and bool((targets == IGNORE).any()):
        at = (targets != IGNORE).nonzero()[:, 0]
        column, scale, rows = column[at], scale[at], at if rows is None else rows[at]
    return at, LinearCall(h, w, column, rows, scale, options.softcap, options.deterministic, block)
