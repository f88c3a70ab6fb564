"""What the kernels over packed tokens share.

Which code runs a call, checks of the layout, segment numbers.

Tokens are *packed*: vectors of N tokens and offsets[B+1] that cut them into B segments, one per
rollout (or tree node).

torch   the definition, every device        cpu     C++ (csrc/), float32 and float64
triton  kernels/gpu, CUDA tensors, or CPU tensors in Triton's interpreter
"""

from __future__ import annotations

import importlib.util
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from appo._kernels.common import backends, native

BACKENDS = ("torch", "cpu", "triton")


def choose(backend: str, x: Tensor) -> str:
    """The backend that `backend` means for tensors on the device of x.

    auto: CPU → cpu when the native library is built; CUDA → triton when it is installed; else
    torch. ValueError for a name that does not exist and for backend "cpu" with a tensor elsewhere.
    """
    if backend not in ("auto", *BACKENDS):
        expected = ", ".join(repr(b) for b in ("auto", *BACKENDS))
        raise ValueError(f"backend is {backend!r}, expected one of {expected}")
    device = x.device.type
    if backend == "cpu" and device != "cpu":
        raise ValueError(f"backend='cpu' with a tensor on {x.device}")
    if backend != "auto":
        return backend
    if device == "cpu" and native.load()[0] is not None:
        return "cpu"
    if device == "cuda" and backends.triton_runs(x.device):
        return "triton"
    return "torch"


def gpu(module: str) -> Any:
    """A module of Triton kernels by its place below kernels/.

    RuntimeError where Triton is missing.
    """
    if importlib.util.find_spec("triton") is None:
        raise RuntimeError("backend='triton' needs Triton: pip install 'triton>=3.7'")
    return import_module(f"appo._kernels.{module}")


def check_vectors(offsets: Tensor, **vectors: Tensor) -> None:
    """ValueError unless all vectors are [N] on one device and offsets is [B+1]."""
    shapes = {tuple(x.shape) for x in vectors.values()}
    if len(shapes) != 1 or len(next(iter(shapes))) != 1 or offsets.ndim != 1 or not len(offsets):
        found = ", ".join(f"{name} {tuple(x.shape)}" for name, x in vectors.items())
        raise ValueError(f"{found}, offsets {tuple(offsets.shape)}; expected [N] each and [B+1]")
    if len({x.device for x in vectors.values()}) != 1:
        found = ", ".join(f"{name} on {x.device}" for name, x in vectors.items())
        raise ValueError(f"{found}; expected one device")


def check_floating(**vectors: Tensor) -> None:
    """TypeError for integers: results take the dtype of the inputs and would be truncated."""
    for name, x in vectors.items():
        if not x.is_floating_point():
            raise TypeError(f"{name} is {x.dtype}, expected a floating-point type")


def check_gamma(gamma: float) -> None:
    """Raise ValueError unless the discount is in 0 … 1."""
    if not 0.0 <= gamma <= 1.0:
        raise ValueError(f"gamma is {gamma}, expected 0 … 1")


def widened(*vectors: Tensor) -> tuple[Tensor, ...]:
    """The vectors contiguous and in one dtype: float64 if one of them is, else float32."""
    wide = torch.float64 if any(x.dtype == torch.float64 for x in vectors) else torch.float32
    return tuple(x.detach().to(wide).contiguous() for x in vectors)


def as_bytes(mask: Tensor) -> Tensor:
    """Contiguous uint8 of 0 and 1."""
    return mask.to(torch.bool).contiguous().view(torch.uint8)


def on_host(offsets: Tensor) -> Tensor:
    """Contiguous int64 on the CPU, as the native code takes it."""
    return offsets.to(device="cpu", dtype=torch.int64).contiguous()


def on_device(offsets: Tensor, n: int, device: torch.device) -> Tensor:
    """Contiguous int64 on a GPU.

    Offsets that come from the CPU are checked; to look at others would wait for the GPU.
    """
    if offsets.device.type == "cpu":
        segment_lengths(offsets, n)
    elif n and offsets.shape[0] < 2:
        raise ValueError(f"offsets has {offsets.shape[0]} items for {n} tokens")
    return offsets.to(device=device, dtype=torch.int64).contiguous()


def segment_lengths(offsets: Tensor, n: int) -> Tensor:
    """Segment lengths [B]; ValueError unless the offsets run from 0 to n without going back.

    Waits for the device.
    """
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


def segment_ids(offsets: Tensor, like: Tensor) -> Tensor:
    """Number of the segment that each token of like[N] lies in, [N] int64 on its device."""
    lengths = segment_lengths(offsets, like.shape[0]).to(like.device)
    return torch.repeat_interleave(torch.arange(lengths.shape[0], device=like.device), lengths)
