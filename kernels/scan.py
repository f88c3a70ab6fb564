"""The segmented reverse discounted scan: what lies ahead of each token, in O(N) and without a T × T matrix.

Tokens are *packed*: vectors of N tokens and offsets[B+1] that cut them into B segments, one per rollout. The native
code (csrc/scan.cpp) and the PyTorch definition below compute the same sums in float64 and are tested against each other.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from appo.kernels import native


def half_life_to_gamma(tau: float) -> float:
    """γ = 2^(-1/τ): a log-ratio τ tokens ahead counts half.

    >>> half_life_to_gamma(1)
    0.5
    """
    if not tau > 0:
        raise ValueError(f"half-life is {tau}, expected > 0 tokens")
    return 2.0 ** (-1.0 / tau)


@torch.no_grad()
def future_value(
    log_ratio: Tensor,
    mask: Tensor,
    offsets: Tensor,
    gamma: float,
    *,
    backend: str = "auto",
    threads: int | None = None,
) -> Tensor:
    """S_i = Σ_{k≥i} γ^(k-i) · mask_k · log_ratio_k over the raw positions of each segment. O(N), float64 inside.

    log_ratio[N] floating point; mask[N]; offsets[B+1] from 0 to N, not decreasing; 0 ≤ gamma ≤ 1
    backend  "cpu": native library, RuntimeError if there is none · "torch" · "auto": native for CPU tensors if built
    threads  upper bound for the native code (default torch's); it uses one per 65,536 tokens at most
    Returns [N] in the dtype of log_ratio. No gradient. NaN spreads to the earlier tokens of its segment, unless masked.
    Raises ValueError for shapes, offsets or a gamma that do not fit.
    """
    if backend not in ("auto", "cpu", "torch"):
        raise ValueError(f"backend is {backend!r}, expected 'auto', 'cpu' or 'torch'")
    if not 0.0 <= gamma <= 1.0:
        raise ValueError(f"gamma is {gamma}, expected 0 … 1")
    if log_ratio.ndim != 1 or mask.shape != log_ratio.shape or offsets.ndim != 1:
        raise ValueError(
            f"log_ratio {tuple(log_ratio.shape)}, mask {tuple(mask.shape)}, offsets {tuple(offsets.shape)}; "
            "expected [N], [N] and [B+1]"
        )
    on_cpu = log_ratio.device.type == "cpu"
    if backend == "cpu" and not on_cpu:
        raise ValueError(f"backend='cpu' with a tensor on {log_ratio.device}")
    run = native.function("future_value", backend) if on_cpu and backend != "torch" else None
    if run is not None:
        return _future_value_native(run, log_ratio, mask, offsets, gamma, threads)
    return future_value_torch(log_ratio, mask, offsets, gamma)


def _future_value_native(
    run: Any, log_ratio: Tensor, mask: Tensor, offsets: Tensor, gamma: float, threads: int | None
) -> Tensor:
    wide = log_ratio if log_ratio.dtype in (torch.float32, torch.float64) else log_ratio.float()
    x = wide.detach().contiguous()
    out = torch.empty_like(x)
    m = mask.to(torch.bool).contiguous().view(torch.uint8)
    cuts = offsets.to(device="cpu", dtype=torch.int64).contiguous()
    run(x, m, cuts, float(gamma), out, torch.get_num_threads() if threads is None else threads)
    return out.to(log_ratio.dtype)


def future_value_torch(log_ratio: Tensor, mask: Tensor, offsets: Tensor, gamma: float) -> Tensor:
    """The definition, by doubling: after step j every token holds the sum of its next 2^j terms. O(N log L)."""
    lengths = segment_lengths(offsets, log_ratio.shape[0])
    total = torch.where(mask.to(torch.bool), log_ratio.double(), 0.0)
    if total.numel() == 0 or gamma == 0.0:
        return total.to(log_ratio.dtype)
    end = torch.repeat_interleave(offsets[1:], lengths)  # [N] one past each token's own segment
    position = torch.arange(total.shape[0], device=total.device)
    longest, reach = int(lengths.max()), 1
    while reach < longest:
        inside = position[:-reach] + reach < end[:-reach]
        ahead = torch.where(inside, total[reach:], 0.0)
        total = torch.cat([total[:-reach] + gamma**reach * ahead, total[-reach:]])
        reach *= 2
    return total.to(log_ratio.dtype)


def segment_lengths(offsets: Tensor, n: int) -> Tensor:
    """Segment lengths [B]; ValueError unless the offsets run from 0 to n without going back."""
    lengths = offsets[1:] - offsets[:-1]
    if (
        offsets.shape[0] < 1
        or int(offsets[0]) != 0
        or int(offsets[-1]) != n
        or bool((lengths < 0).any())
    ):
        raise ValueError(
            f"offsets must run from 0 to the number of tokens, {n}, without decreasing"
        )
    return lengths


def segment_ids(offsets: Tensor, n: int) -> Tensor:
    """Number of the segment that each of the n tokens lies in, [N] int64."""
    lengths = segment_lengths(offsets, n)
    return torch.repeat_interleave(torch.arange(lengths.shape[0], device=offsets.device), lengths)
