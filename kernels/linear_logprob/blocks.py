"""What the backends of linear_logprob_entropy are handed, and what input is accepted.

And how the PyTorch one is cut into blocks.

A backend is a module `linear_<name>` with two functions: `partial_stats(call) -> [4, N]` and
`gradients(call, upstream, …)`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from appo._kernels.common.stats import EMPTY, LOG2E

IGNORE = -100  # a target with this id gets logp = entropy = lse = 0 and no gradient


class LinearCall(NamedTuple):
    """One call as the backends see it: checked, N ≥ 1, no ignored targets.

    h[T, H], w[V, H]   hidden states and this rank's slice of the head, any strides
    column[N]          int64, target id minus vocab_start; outside 0 … V-1: the target is in another
                       slice
    rows[N]            int64, row of h for each target (repeats allowed); None: N = T
    scale[N]           inverse temperature > 0; float32 (float64 when h or w is float64), the dtype
                       of all statistics
    softcap            logits are softcap · tanh(logits / softcap) before the temperature; None: as
                       they are
    deterministic      the bits of a token depend on that token and w alone, not on the batch around
                       it
    block              (tokens, columns) per block of the PyTorch backend
    """

    h: Tensor
    w: Tensor
    column: Tensor
    rows: Tensor | None
    scale: Tensor
    softcap: float | None = None
    deterministic: bool = True
    block: tuple[int, int] | None = None


class Upstream(NamedTuple):
    """What backward needs per token, each [N] in the dtype of `scale`.

    m, log2s      statistics merged over all columns and ranks
    p_factor      d_lse - d_logp - d_entropy · entropy
    plogp_factor  d_entropy · ln 2; None when the entropy has no gradient
    d_logp        upstream gradient of logp

    The gradient of the scaled logit of column j:
    g_j = p_j · (p_factor - plogp_factor · log2 p_j) + d_logp · [j is the target]
    """

    m: Tensor
    log2s: Tensor
    p_factor: Tensor
    plogp_factor: Tensor | None
    d_logp: Tensor

    def map(self, change: Callable[[Tensor], Tensor]) -> Upstream:
        """`change` of every vector that is there."""
        m, log2s, p_factor = change(self.m), change(self.log2s), change(self.p_factor)
        plogp_factor = None if self.plogp_factor is None else change(self.plogp_factor)
        return Upstream(m, log2s, p_factor, plogp_factor, change(self.d_logp))


# Tokens and vocabulary columns per block. The logit block (2 MiB on a CPU) stays in cache between
# the matrix product and the statistics; see bench/kernels/linear_logprob.py.
BLOCK = {"cpu": (256, 2048), "cuda": (4096, 4096)}
_HEAD_BYTES = 16 << 20  # bound for the widened block of the head


class Blocks:
    """The tiling of one call, and how a tile of scaled logits is made."""

    def __init__(self, call: LinearCall):
        self.h, self.w, self.rows = call.h, call.w, call.rows
        self.scale, self.softcap = call.scale, call.softcap
        self.dtype = call.scale.dtype
        tokens, columns = call.block or BLOCK.get(call.h.device.type, BLOCK["cuda"])
        widest = max(64, _HEAD_BYTES // (max(call.h.shape[1], 1) * self.dtype.itemsize))
        self.block_t, self.block_v = tokens, columns if call.block else min(columns, widest)

    def tokens(self) -> Iterator[tuple[int, int]]:
        """(first, end) of every block of tokens."""
        n = self.scale.shape[0]
        return ((i, min(i + self.block_t, n)) for i in range(0, n, self.block_t))

    def columns(self) -> Iterator[tuple[int, int]]:
        """(first, end) of every block of the vocabulary."""
        n = self.w.shape[0]
        return ((i, min(i + self.block_v, n)) for i in range(0, n, self.block_v))

    def head(self, v0: int, v1: int) -> Tensor:
        """Rows v0 … v1 - 1 of the head in the dtype of the computation. [v, H]."""
        return self.w[v0:v1].to(self.dtype)

    def hidden(self, t0: int, t1: int) -> Tensor:
        """Hidden states of tokens t0 … t1 - 1 in the dtype of the computation. [t, H]."""
        h_th = self.h[t0:t1] if self.rows is None else self.h.index_select(0, self.rows[t0:t1])
        return h_th.to(self.dtype)

    def scaled_logits(self, t0: int, t1: int, h_th: Tensor, w_vh: Tensor) -> Tensor:
        """A tile of capped logits, times scale and log2 e. [t, v]."""
        x = h_th @ w_vh.T  # [t, v]
        if self.softcap is not None:
            x.div_(self.softcap).tanh_().mul_(self.softcap)
        x.mul_(self.scale[t0:t1, None] * LOG2E)
        return x.masked_fill_(x < EMPTY, EMPTY)  # -inf: outside the support. NaN and +inf stay

    def cap_slope(self, t0: int, t1: int, x2: Tensor) -> Tensor | None:
        """d capped / d logit = 1 - tanh², from the scaled logits; None without a cap."""
        if self.softcap is None:
            return None
        tanh = x2 / (self.scale[t0:t1, None] * (LOG2E * self.softcap))
        return tanh.square_().neg_().add_(1.0)


def add_at(g: Tensor, column: Tensor, value: Tensor) -> None:
    """g[i, column[i]] += value[i] where the column lies in this block."""
    here = (column >= 0) & (column < g.shape[1])
    g.scatter_add_(
        1, column.clamp(0, g.shape[1] - 1)[:, None], torch.where(here, value, 0.0)[:, None]
    )


def inverse_temperature(inv_temp: float | Tensor, n: int, h: Tensor, w: Tensor) -> Tensor:
    """inv_temp as [N] in the dtype of the statistics."""
    wide = torch.float64 in (h.dtype, w.dtype)
    dtype = torch.float64 if wide else torch.float32
    if isinstance(inv_temp, Tensor):
        scale = inv_temp.to(device=h.device, dtype=dtype)
    else:  # filled on the device: copying a number there would wait for it
        scale = torch.full((), inv_temp, dtype=dtype, device=h.device)
    if scale.shape not in ((), (n,)):
        raise ValueError(f"inv_temp has shape {tuple(scale.shape)}, expected a number or [{n}]")
    return scale.expand(n)


def check_inputs(
    h: Tensor, w: Tensor, targets: Tensor, rows: Tensor | None, cap: float | None
) -> None:
    """Shapes, dtypes and devices; nothing that has to look at a value."""
    if h.ndim != 2 or w.ndim != 2 or h.shape[1] != w.shape[1]:
        raise ValueError(
            f"h is {tuple(h.shape)} and w is {tuple(w.shape)}; expected [T, H] and [V, H]"
        )
    if not (h.is_floating_point() and w.is_floating_point()):
        raise TypeError(f"h and w must be floating point, not {h.dtype} and {w.dtype}")
    if w.shape[0] == 0 or w.shape[1] == 0:
        raise ValueError(f"w is {tuple(w.shape)}: the vocabulary or the hidden size is empty")
    if not _integer(targets) or targets.ndim != 1:
        raise TypeError(f"targets must be integer [N], not {targets.dtype} {tuple(targets.shape)}")
    if rows is not None and (not _integer(rows) or rows.ndim != 1):
        raise TypeError(f"rows must be integer [N], not {rows.dtype} {tuple(rows.shape)}")
    for name, x in (("w", w), ("targets", targets), ("rows", rows)):
        if x is not None and x.device != h.device:
            raise ValueError(f"{name} is on {x.device}, h on {h.device}; move it there first")
    expected = h.shape[0] if rows is None else rows.shape[0]
    if targets.shape[0] != expected:
        raise ValueError(f"{targets.shape[0]} targets for {expected} rows of h")
    if cap is not None and not 1e-30 < cap < 1e30:  # a normal float32, and so are its multiples
        raise ValueError(f"softcap is {cap}, expected a number > 0 (1e-30 … 1e30) or None")


def _integer(x: Tensor) -> bool:
    """True for integers; a mask is none: read as numbers it would silently mean rows 0 and 1."""
    return not x.is_floating_point() and not x.is_complex() and x.dtype != torch.bool


def check_values(
    targets: Tensor, rows: Tensor | None, scale: Tensor, tokens: int, vocabulary: tuple[int, int]
) -> None:
    """A wrong id is an error here, not a wrong number later.

    Free on a CPU; a synchronisation on a GPU.
    """
    low, high = vocabulary
    wrong = ((targets != IGNORE) & ((targets < low) | (targets >= high))).nonzero()
    if wrong.numel():
        i = int(wrong[0, 0])
        raise ValueError(
            f"targets[{i}] is {int(targets[i])}, outside the vocabulary {low} … {high - 1}; "
            f"use {IGNORE} for positions without a target"
        )
    if rows is not None and bool(((rows < 0) | (rows >= tokens)).any()):
        i = int(((rows < 0) | (rows >= tokens)).nonzero()[0, 0])
        raise ValueError(f"rows[{i}] is {int(rows[i])}, but h has rows 0 … {tokens - 1}")
    if not bool(((scale > 0) & (scale < torch.inf)).all()):
        raise ValueError(
            "inv_temp must be > 0 and finite (a greedy policy has no finite inverse temperature)"
        )


def softcap_tensor(call: LinearCall) -> Tensor | None:
    """The soft cap as a tensor [1]: a Python float would make one Triton binary per value.

    Filled on the device.
    """
    return None if call.softcap is None else call.scale.new_full((1,), call.softcap)
