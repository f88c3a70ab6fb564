"""The causal part of long chunks by flash-attn, where it is installed.

The prefix stays with our kernels.

A chunk's own keys and values are at hand, contiguous, in the order of its rows, so
`flash_attn_varlen_func` takes them as they are and no block table is involved (its paged kernels
want pages of 256 positions, ours have 16). What it returns, the output and its log-sum-exp, is one
more partial result of these rows.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from appo.errors import EngineError
from appo.rollout.native.tree.layout import Layout

CHUNK = 128  # rows of a chunk from which it is worth its launches and the copies of q, k and v


def unavailable(dtype: torch.dtype, head_dim: int, device: torch.device) -> str | None:
    """Why flash-attn cannot be used; None if it can."""
    if importlib.util.find_spec("flash_attn") is None:
        return "flash_attn is not installed: pip install 'appo[flash-attn]'"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"flash-attn runs in bfloat16 and float16, not in {dtype}"
    if head_dim > 256 or head_dim % 8:
        return f"head_dim is {head_dim}; flash-attn takes multiples of 8 up to 256"
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 0):
        return f"flash-attn needs a CUDA device of compute capability 8.0 or newer, not {device}"
    return None


def find(
    asked: bool | None, dtype: torch.dtype, head_dim: int, device: torch.device
) -> Callable[..., Any] | None:
    """flash_attn_varlen_func, or None.

    asked: False never, None where it runs, True or EngineError.
    """
    if asked is False:
        return None
    if (reason := unavailable(dtype, head_dim, device)) is not None:
        if asked:
            raise EngineError(f"flash=True: {reason}; or pass flash=None to do without")
        return None
    function: Callable[..., Any] = importlib.import_module("flash_attn").flash_attn_varlen_func
    return function


@dataclass(frozen=True)
class Chunks:
    """Rows of a pass whose causal part flash-attn takes. rows[n], counted from the pass's first.

    cuts[c + 1].
    """

    rows: Tensor
    cuts: Tensor
    limits: Tensor  # the layout's, without these parts

    def on(self, device: torch.device) -> Causal:
        """The same on a device, in the types that flash-attn takes."""
        cuts = self.cuts.to(torch.int32)
        return Causal(self.rows.to(device), cuts.to(device), int(cuts.diff().max()))


@dataclass(frozen=True)
class Causal:
    """`Chunks` on a device; `longest` is the number of rows of the longest chunk."""

    rows: Tensor  # [n] int64
    cuts: Tensor  # [c + 1] int32
    longest: int

    def attend(
        self, function: Callable[..., Any], q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor
    ) -> None:
        """Fill the last n of the partials o[P, Hq, D], lse[P, Hq] (in units of log 2)."""
        n = len(self.rows)
        parts = (x.index_select(0, self.rows) for x in (q, k, v))
        out, natural, *_ = function(
            *parts, self.cuts, self.cuts, self.longest, self.longest,
            causal=True, return_attn_probs=True,
        )  # fmt: skip
        o[-n:] = out
        lse[-n:] = natural.T / math.log(2)  # [Hq, n]


def chunks(layout: Layout, first: int, last: int) -> Chunks | None:
    """The long chunks among rows first … last-1; None if there are none."""
    reads, limits = layout.reads, layout.limits
    rows: list[Tensor] = []
    cuts = [0]
    for row, start, count in layout.rows_of.values():
        a, b = max(row, first), min(row + count, last)
        if b - a < CHUNK:
            continue
        own = reads[(reads[:, 1] <= a) & (a < reads[:, 2])][-1]  # in path order the own one is last
        at = int(own[3] - own[1]) + a
        if not rows:
            limits = limits.clone()
        limits[at : at + b - a] = start + a - row
        rows.append(torch.arange(a - first, b - first))
        cuts.append(cuts[-1] + b - a)
    return Chunks(torch.cat(rows), torch.tensor(cuts), limits) if rows else None
