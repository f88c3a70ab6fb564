"""How linear_logprob_entropy is cut into blocks, how one block of scaled logits is made, and what inputs are accepted."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from appo.kernels.stats import LOG2E
from appo.kernels.vocab_parallel import check_shards

IGNORE = -100  # a target with this id gets logp = entropy = lse = 0 and no gradient
# Tokens and vocabulary columns per block. The logit block (2 MiB on a CPU) stays in cache between the matrix product
# and the statistics; see bench/logprob.py.
BLOCK = {"cpu": (256, 2048), "cuda": (4096, 4096)}
_HEAD_BYTES = 16 << 20  # bound for the widened block of the head


class Blocks:
    """The tiling of one call, and how a tile of scaled logits is made."""

    def __init__(
        self,
        h: Tensor,
        w: Tensor,
        rows: Tensor | None,
        scale: Tensor,
        softcap: float | None,
        block: tuple[int, int] | None,
    ):
        self.h, self.w, self.rows, self.scale, self.softcap = h, w, rows, scale, softcap
        self.dtype = scale.dtype
        tokens, columns = block or BLOCK.get(h.device.type, BLOCK["cuda"])
        widest = max(64, _HEAD_BYTES // (max(h.shape[1], 1) * self.dtype.itemsize))
        self.block_t, self.block_v = tokens, columns if block else min(columns, widest)

    def tokens(self) -> Iterator[tuple[int, int]]:
        n = self.scale.shape[0]
        return ((i, min(i + self.block_t, n)) for i in range(0, n, self.block_t))

    def columns(self) -> Iterator[tuple[int, int]]:
        n = self.w.shape[0]
        return ((i, min(i + self.block_v, n)) for i in range(0, n, self.block_v))

    def head(self, v0: int, v1: int) -> Tensor:
        return self.w[v0:v1].to(self.dtype)

    def hidden(self, t0: int, t1: int) -> Tensor:
        h_th = self.h[t0:t1] if self.rows is None else self.h.index_select(0, self.rows[t0:t1])
        return h_th.to(self.dtype)

    def scaled_logits(self, t0: int, t1: int, h_th: Tensor, w_vh: Tensor) -> Tensor:
        x = h_th @ w_vh.T  # [t, v]
        if self.softcap is not None:
            x.div_(self.softcap).tanh_().mul_(self.softcap)
        return x.mul_(self.scale[t0:t1, None] * LOG2E)

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
    scale = torch.as_tensor(inv_temp, dtype=dtype, device=h.device)
    if scale.shape not in ((), (n,)):
        raise ValueError(f"inv_temp has shape {tuple(scale.shape)}, expected a number or [{n}]")
    if scale.device.type == "cpu" and not bool((scale > 0).all()):
        raise ValueError("inv_temp must be > 0 (a greedy policy has no finite inverse temperature)")
    return scale.expand(n)


def check_inputs(
    h: Tensor, w: Tensor, targets: Tensor, rows: Tensor | None, cap: float | None
) -> None:
    if h.ndim != 2 or w.ndim != 2 or h.shape[1] != w.shape[1]:
        raise ValueError(
            f"h is {tuple(h.shape)} and w is {tuple(w.shape)}; expected [T, H] and [V, H]"
        )
    if not (h.is_floating_point() and w.is_floating_point()):
        raise TypeError(f"h and w must be floating point, not {h.dtype} and {w.dtype}")
    if w.shape[0] == 0:
        raise ValueError("w has no rows: the vocabulary is empty")
    if targets.is_floating_point() or targets.ndim != 1:
        raise TypeError(f"targets must be integer [N], not {targets.dtype} {tuple(targets.shape)}")
    expected = h.shape[0] if rows is None else rows.shape[0]
    if targets.shape[0] != expected:
        raise ValueError(f"{targets.shape[0]} targets for {expected} rows of h")
    if cap is not None and not cap > 0:
        raise ValueError(f"softcap is {cap}, expected > 0 or None")


def check_targets(targets: Tensor, vocab: int, vocab_start: int, group: Any) -> None:
    """A wrong id is an error here, not a wrong number later. Free on a CPU; one synchronisation on a GPU."""
    low, high = (vocab_start, vocab_start + vocab)
    if group is not None:
        low, high = check_shards(vocab_start, vocab, targets.device, group)
    wrong = ((targets < low) | (targets >= high)).nonzero()
    if wrong.numel():
        i = int(wrong[0, 0])
        raise ValueError(
            f"target {int(targets[i])} (number {i} of those not ignored) is outside the vocabulary "
            f"{low} … {high - 1}; use {IGNORE} for positions without a target"
        )
