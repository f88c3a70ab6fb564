"""Which code runs a linear_logprob_entropy call.

A name, a module with two functions, and the rule behind "auto".

torch     the definition, every device
cpu       C++ (csrc/linear_logprob), float32 and 16-bit inputs on x86-64
triton    fused matrix product and statistics, no logits in memory
cublas32  float32 logit blocks by the vendor's matrix product, one Triton row kernel over them
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from appo._kernels.common.backends import native_isa, triton_runs

BACKENDS = ("torch", "cpu", "triton", "cublas32")


def module(name: str) -> Any:
    """The module of a backend."""
    return import_module(f"appo._kernels.linear_logprob.backend_{name.removesuffix('32')}")


def check_name(name: str) -> None:
    """Raise ValueError unless `name` is "auto" or a backend."""
    if name not in ("auto", *BACKENDS):
        expected = ", ".join(repr(b) for b in ("auto", *BACKENDS))
        raise ValueError(f"backend is {name!r}, expected one of {expected}")


def choose(name: str, h: Tensor, w: Tensor) -> str:
    """The backend that `name` means for these inputs.

    A named one that cannot run them says so itself.

    auto: float64 → torch; CUDA → triton where it runs (`triton_runs`), else torch; CPU → cpu when
    the native library runs here.
    """
    check_name(name)
    if name != "auto":
        return name
    if torch.float64 in (h.dtype, w.dtype):
        return "torch"
    if h.device.type == "cuda":
        return "triton" if triton_runs(h.device) else "torch"
    if h.device.type == "cpu" and native_isa() is not None:
        return "cpu"
    return "torch"
