"""The statistics algebra of kernels/common/stats.py in Triton, line by line.

Before it stands what a tile of raw logits needs.

A NaN or +inf logit makes s NaN, and so every statistic of its row. The maximum may drop a NaN; s
does not.
"""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

from appo._kernels.common import stats

EMPTY = tl.constexpr(stats.EMPTY)
ABSENT = tl.constexpr(
    2 * stats.EMPTY
)  # a column that does not exist: weight 0 even in a row of EMPTY
LOG2E = tl.constexpr(stats.LOG2E)


@triton.jit
def target_column(column_ptr, token, v0, V):
    """Column of each token's target inside v0 … v0+V-1, counted from v0 (int32).

    -1 where the target is elsewhere.
    """
    column = tl.load(column_ptr + token) - v0
    return tl.where((column >= 0) & (column < V), column, -1).to(tl.int32)


@triton.jit
def tanh_over(x, cap):
    """tanh(x / cap) within 1e-7; cap is a scalar.

    Written out because the interpreter has no device library.
    """
    e = tl.exp2(tl.abs(x) * (-2 * LOG2E / cap))
    t = (1 - e) / (1 + e)
    return tl.where(x < 0, -t, t)


@triton.jit
def scaled(x, scale2, exists):
    """x2 of capped logits.

    -inf becomes EMPTY (NaN and +inf stay), columns that do not exist ABSENT.
    """
    x2 = x * scale2
    x2 = tl.where(x2 < EMPTY, EMPTY, x2)
    return tl.where(exists, x2, ABSENT)


@triton.jit
def update(m, s, u, z, x2, hit):
    """Statistics [R] of some columns, joined by the columns of x2[R, C].

    hit[R, C] marks the target.
    """
    top = tl.maximum(m, tl.max(x2, axis=1))
    shift = m - top
    weight = tl.exp2(shift)
    z += tl.sum(tl.where(hit, x2, 0.0), axis=1)
    x2 -= top[:, None]
    e = tl.exp2(x2)
    u = weight * (u + shift * s) + tl.sum(e * x2, axis=1)
    s = weight * s + tl.sum(e, axis=1)
    return top, s, u, z


@triton.jit
def merge_slots(m, s, u, z):
    """Statistics [K, R] of K disjoint sets of columns → [R]."""
    top = tl.max(m, axis=0)
    shift = m - top[None, :]
    weight = tl.exp2(shift)
    u = tl.sum(weight * (u + shift * s), axis=0)
    s = tl.sum(weight * s, axis=0)
    return top, s, u, tl.sum(z, axis=0)


@triton.jit
def merge(m_a, s_a, u_a, z_a, m_b, s_b, u_b, z_b):
    """Statistics of the union of two disjoint sets of columns."""
    m = tl.maximum(m_a, m_b)
    d_a = m_a - m
    d_b = m_b - m
    w_a = tl.exp2(d_a)
    w_b = tl.exp2(d_b)
    s = w_a * s_a + w_b * s_b
    u = w_a * (u_a + d_a * s_a) + w_b * (u_b + d_b * s_b)
    return m, s, u, z_a + z_b


@triton.jit
def load_upstream(
    token, scale_ptr, m_ptr, log2s_ptr, p_factor_ptr, plogp_factor_ptr, d_logp_ptr, cap_ptr
):
    """What `gradient` takes of its tokens.

    (scale, m, log2s, p_factor, plogp_factor, d_logp) [R] and the cap.

    Where plogp_factor_ptr or cap_ptr is None their values mean nothing: `gradient` is told so.
    """
    scale = tl.load(scale_ptr + token)
    m = tl.load(m_ptr + token)
    log2s = tl.load(log2s_ptr + token)
    p_factor = tl.load(p_factor_ptr + token)
    d_logp = tl.load(d_logp_ptr + token)
    plogp_factor = d_logp if plogp_factor_ptr is None else tl.load(plogp_factor_ptr + token)
    cap = 0.0 if cap_ptr is None else tl.load(cap_ptr)
    return scale, m, log2s, p_factor, plogp_factor, d_logp, cap


@triton.jit
def no_columns(ROWS: tl.constexpr):
    """(m, s, u, z) [ROWS] of no column at all."""
    m = tl.full((ROWS,), EMPTY, dtype=tl.float32)
    zero = tl.zeros((ROWS,), dtype=tl.float32)
    return m, zero, zero, zero


@triton.jit
def store_stats(at, step, m, s, u, z, inside):
    """Write the four statistics of the tokens at `at`, `step` numbers apart."""
    tl.store(at, m, mask=inside)
    tl.store(at + step, s, mask=inside)
    tl.store(at + 2 * step, u, mask=inside)
    tl.store(at + 3 * step, z, mask=inside)


@triton.jit
def gradient(
    x, scale, m, log2s, p_factor, plogp_factor, d_logp, cap, exists, hit,
    CAP: tl.constexpr, PLOGP: tl.constexpr,
):  # fmt: skip
    """(G[R, C], Σ_j g_j log2 p_j [R]) from raw logits x[R, C].

    Per token [R]: scale … d_logp, as in kernels/linear_logprob/blocks.py.

    g = p · (p_factor - plogp_factor · log2 p) + d_logp · hit, the target term added in float32. G =
    scale · g · slope of the cap. Two subtractions for log2 p: x2 - m is exact where p matters, x2 -
    (m + log2 s) rounds by the size of m.
    """
    if CAP:
        t = tanh_over(x, cap)
        x = cap * t
    logp2 = (scaled(x, (scale * LOG2E)[:, None], exists) - m[:, None]) - log2s[:, None]
    p = tl.exp2(logp2)
    if PLOGP:
        g = p * (p_factor[:, None] - plogp_factor[:, None] * logp2)
        # where p is 0, log2 p may be -1e30 and its product with plogp_factor infinite
        g = tl.where(p == 0.0, 0.0, g)
    else:
        g = p * p_factor[:, None]
    g += tl.where(hit, d_logp[:, None], 0.0)
    weighted = tl.sum(g * logp2, axis=1)
    g *= scale[:, None]
    if CAP:
        g *= 1 - t * t
    return g, weighted
