"""Log-probability and entropy of sampled tokens straight from hidden states: logits exist only block by block.

This is the definition that every faster kernel is tested against, and the CPU path. The outer loop runs over blocks of
the vocabulary, so that a bf16 head is widened to float32 once per pass; the inner one over blocks of tokens. Statistics
are float32 for bf16 inputs as well: a bf16 matrix product would round every logit to 8 bits (an error of 6e-2 in logp,
which the discounted sums of the branching score then add up).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from appo.kernels.blocks import (
    IGNORE,
    Blocks,
    add_at,
    check_inputs,
    check_targets,
    inverse_temperature,
)
from appo.kernels.stats import EMPTY, LN2, LOG2E, Stats, column_stats, empty, finish, merge
from appo.kernels.vocab_parallel import merge_ranks, sum_ranks


class LogProbEntropy(NamedTuple):
    """logp, entropy (nats, ≥ 0) and log-sum-exp of the scaled logits; each [N], float32 (float64 for float64 inputs)."""

    logp: Tensor
    entropy: Tensor
    lse: Tensor


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
    block: tuple[int, int] | None = None,
) -> LogProbEntropy:
    """Statistics of softmax(inv_temp · cap(h @ w.T)) at `targets`, without a [T, V] tensor, forward or backward.

    h[T, H], w[V, H]  hidden states and output head: float32, bfloat16, float16 (statistics in float32) or float64
    targets[N]        integer ids in vocab_start … vocab_start+V-1, or IGNORE
    rows[N]           which rows of h belong to the targets (repeats allowed); None: all, N = T
    inv_temp          1/temperature > 0: a number, or a tensor [] or [N] (differentiable)
    softcap           logits become softcap · tanh(logits / softcap) before the temperature
    vocab_start, group  w is this rank's contiguous slice of the vocabulary; statistics are merged over the process group
                      in rank order, h and the upstream gradients must be the same on all its ranks, and the gradient of
                      h comes back summed
    backend           "auto" | "torch"
    block             (tokens, columns) per block; default BLOCK[device]

    Gradients flow from logp, entropy and lse to h, w and inv_temp; what needs none is not computed (a frozen head costs
    no dW). They are summed in float32 and rounded once. Same bits on every run on a CPU.
    Workspace: about 3 logit blocks + one widened block of w + for backward an [N, H] float32 sum.
    Raises ValueError or TypeError for shapes, dtypes and ids that do not fit.
    """
    if backend not in ("auto", "torch"):
        raise ValueError(f"backend is {backend!r}, expected 'auto' or 'torch'")
    n = targets.shape[0]
    check_inputs(h, w, targets, rows, softcap)
    scale = inverse_temperature(inv_temp, n, h, w)
    targets = targets.to(torch.int64)
    keep = targets != IGNORE
    check_targets(targets[keep], w.shape[0], vocab_start, group)
    if bool(keep.all()):
        out = _Fused.apply(h, w, targets, rows, scale, softcap, vocab_start, group, block)
        return LogProbEntropy(*out)
    # Ignored targets cost nothing: only the rows that count are computed, the others are zero.
    at = keep.nonzero()[:, 0]
    some = at if rows is None else rows[at]
    out = _Fused.apply(h, w, targets[at], some, scale[at], softcap, vocab_start, group, block)
    return LogProbEntropy(*(x.new_zeros(n).index_copy(0, at, x) for x in out))


@torch.no_grad()
def logprob_entropy(
    logits: Tensor, targets: Tensor, *, inv_temp: float | Tensor = 1.0
) -> LogProbEntropy:
    """The same statistics for logits[N, V] that exist anyway (a sampler's). -inf logits are outside the support
    (as a target they get a logp near -7e29, never NaN).

    targets[N] integer ids; inv_temp a number, [] or [N]. No gradient; logits are not changed. Works in row blocks.
    """
    n, vocab = logits.shape
    scale = inverse_temperature(inv_temp, n, logits, logits) * LOG2E
    targets = targets.to(torch.int64)
    check_targets(targets, vocab, 0, None)
    step = max(1, (1 << 20) // max(vocab, 1))
    parts = []
    for i in range(0, n, step):
        x2 = logits[i : i + step].to(scale.dtype) * scale[i : i + step, None]
        parts.append(column_stats(x2.clamp_(min=EMPTY), targets[i : i + step]))
    if not parts:
        return LogProbEntropy(*(scale.new_zeros(0) for _ in range(3)))
    return LogProbEntropy(*finish(Stats(*(torch.cat(x) for x in zip(*parts)))))


class _Fused(torch.autograd.Function):
    """Forward keeps h, w and three numbers per token; backward recomputes each logit block.

    With upstream ga, he, le for logp, entropy, lse and p the softmax, the gradient of a capped logit is
    G = inv_temp · (p · (le - ga - he·(H + log p)) + ga · [column = target]); then dh = G w and dw = Gᵀ h.
    """

    @staticmethod
    def forward(
        ctx: Any,
        h: Tensor,
        w: Tensor,
        targets: Tensor,
        rows: Tensor | None,
        scale: Tensor,
        softcap: float | None,
        vocab_start: int,
        group: Any,
        block: tuple[int, int] | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        run = Blocks(h, w, rows, scale, softcap, block)
        column = targets - vocab_start
        total = [empty(t1 - t0, scale) for t0, t1 in run.tokens()]
        with torch.autocast(h.device.type, enabled=False):
            for v0, v1 in run.columns():
                w_vh = run.head(v0, v1)
                for i, (t0, t1) in enumerate(run.tokens()):
                    x2 = run.scaled_logits(t0, t1, run.hidden(t0, t1), w_vh)
                    total[i] = merge(total[i], column_stats(x2, column[t0:t1] - v0))
            stats = Stats(*(torch.cat(x) for x in zip(*total))) if total else empty(0, scale)
            if group is not None:
                stats = merge_ranks(stats, group)
            logp, entropy, lse = finish(stats)
        ctx.save_for_backward(h, w, column, rows, scale, stats.m, torch.log2(stats.s), entropy, lse)
        ctx.softcap, ctx.group, ctx.block = softcap, group, block
        ctx.set_materialize_grads(False)
        return logp, entropy, lse

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, d_logp: Tensor | None, d_entropy: Tensor | None, d_lse: Tensor | None
    ) -> tuple[Any, ...]:
        h, w, column, rows, scale, m, log2s, entropy, lse = ctx.saved_tensors
        need_h, need_w, _, _, need_scale = ctx.needs_input_grad[:5]
        ga, he, le = (torch.zeros_like(lse) if g is None else g for g in (d_logp, d_entropy, d_lse))
        bent = None if d_entropy is None else he * LN2  # the part of G that bends with log2 p
        run = Blocks(h, w, rows, scale, ctx.softcap, ctx.block)
        constant = le - ga - he * entropy
        dh = scale.new_zeros(scale.shape[0], h.shape[1]) if need_h else None
        dw = torch.empty_like(w) if need_w else None
        d_scale = torch.zeros_like(scale)
        with torch.autocast(h.device.type, enabled=False):
            for v0, v1 in run.columns():
                w_vh = run.head(v0, v1)
                dw_vh = scale.new_zeros(w_vh.shape) if need_w else None
                for t0, t1 in run.tokens():
                    t = slice(t0, t1)
                    h_th = run.hidden(t0, t1)
                    x2 = run.scaled_logits(t0, t1, h_th, w_vh)
                    slope = run.cap_slope(t0, t1, x2)
                    # Two steps: x2 - m is exact where p matters, x2 - (m + log2 s) rounds by the size of m.
                    logp2 = x2.sub_(m[t, None]).sub_(log2s[t, None])
                    p = torch.exp2(logp2)
                    if bent is None:
                        g = p.mul_(constant[t, None])
                    else:
                        g = p.mul_(torch.addcmul(constant[t, None], bent[t, None], logp2, value=-1))
                    add_at(g, column[t] - v0, ga[t])
                    if need_scale:
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
            if ctx.group is not None:
                dh = sum_ranks(dh, ctx.group)
                d_scale = sum_ranks(d_scale, ctx.group)
        # Σ_j G_j x_j with x_j = log p_j + lse and Σ_j G_j = le: the large common part of x never enters a sum.
        d_inv_temp = (LN2 * d_scale + le * lse) / scale if need_scale else None
        return _back_to_rows(dh, h, rows), dw, None, None, d_inv_temp, None, None, None, None


def _back_to_rows(dh: Tensor | None, h: Tensor, rows: Tensor | None) -> Tensor | None:
    if dh is None:
        return None
    if rows is None:
        return dh.to(h.dtype)
    return dh.new_zeros(h.shape).index_add_(0, rows, dh).to(h.dtype)
