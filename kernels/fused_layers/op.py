"""What lies between the matrix products of a layer.

RMSNorm, SwiGLU and rotary positions, forward and backward.

On a CPU each is one pass over memory in native code (csrc/fused_layers); everywhere else, and in
float64, the definitions below run. Both compute in float32 (float64 for float64) and round once.
The inputs are saved for backward, and a float32 per row by RMSNorm.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from appo._kernels.common import backends, native
from appo._kernels.common.operators import operator

NATIVE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, backend: str = "auto") -> Tensor:
    """x / √(mean x² + eps) · weight along the last dimension, in the dtype of x.

    weight[H] of x's dtype or another.

    backend  "auto" | "torch" | "cpu" (float32, bfloat16 and float16 on a CPU; RuntimeError without
             the native library)
    Gradients flow to x and weight. Same bits for any number of threads. Raises ValueError for
    shapes that do not fit.
    """
    if weight.ndim != 1 or not x.ndim or x.shape[-1:] != weight.shape:
        raise ValueError(
            f"x is {tuple(x.shape)} and weight {tuple(weight.shape)}; expected [..., H] and [H]"
        )
    if choose(backend, x) == "torch":
        return rms_norm_torch(x, weight, eps)
    flat = x.reshape(-1, x.shape[-1])
    return _RMSNorm.apply(flat, weight.contiguous(), float(eps)).view(x.shape)


def swiglu(gate: Tensor, up: Tensor, *, backend: str = "auto") -> Tensor:
    """gate · sigmoid(gate) · up, in the dtype of both. The rest is as in `rms_norm`."""
    if gate.shape != up.shape or gate.dtype != up.dtype:
        raise ValueError(
            f"gate is {gate.dtype} {tuple(gate.shape)} and up {up.dtype} {tuple(up.shape)}; expected two alike"
        )
    if choose(backend, gate) == "torch":
        return swiglu_torch(gate, up)
    return _SwiGLU.apply(gate.contiguous(), up.contiguous())


def rotary(x: Tensor, cos: Tensor, sin: Tensor, *, backend: str = "auto") -> Tensor:
    """Every head of x[T, heads, D] turned by its position's angles.

    With x1 and x2 the halves of a head, (x1 · cos - x2 · sin, x2 · cos + x1 · sin). cos,
    sin[T, D/2] of one dtype; no gradient flows to them.

    The rest is as in `rms_norm`.
    """
    if x.ndim != 3 or x.shape[2] % 2 or not cos.shape == sin.shape == (x.shape[0], x.shape[2] // 2):
        raise ValueError(
            f"x is {tuple(x.shape)}, cos {tuple(cos.shape)} and sin {tuple(sin.shape)}; expected [T, heads, D] with an "
            "even D and twice [T, D/2]"
        )
    if choose(backend, x) == "torch":
        return rotary_torch(x, cos, sin)
    return _Rotary.apply(x.contiguous(), cos, sin)


def choose(backend: str, x: Tensor) -> str:
    """The backend that a name means for these numbers."""
    if backend not in ("auto", "torch", "cpu"):
        raise ValueError(f"backend is {backend!r}, expected 'auto', 'torch' or 'cpu'")
    runs = x.device.type == "cpu" and x.dtype in NATIVE_DTYPES
    if backend == "cpu" and not runs:
        raise TypeError(
            f"backend='cpu' takes float32, bfloat16 and float16 on a CPU, not {x.dtype} on {x.device}; use backend='auto'"
        )
    if backend == "auto":
        return "cpu" if runs and backends.native_isa() is not None else "torch"
    return backend


# -- definitions


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def rms_norm_torch(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Definition of `rms_norm`, in float32 or wider, rounded to x's dtype once."""
    wide = _wide(x)
    factor = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * factor * weight.to(wide.dtype)).to(x.dtype)


def swiglu_torch(gate: Tensor, up: Tensor) -> Tensor:
    """Definition of `swiglu`: silu(gate) · up, rounded to gate's dtype once."""
    return (torch.nn.functional.silu(_wide(gate)) * _wide(up)).to(gate.dtype)


def rotary_torch(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Definition of `rotary`: halves (x1, x2) of each head turned by the row's angles."""
    wide = _wide(x)
    c, s = (angle.to(wide.dtype)[:, None] for angle in (cos, sin))
    x1, x2 = wide.chunk(2, dim=-1)
    return torch.cat([x1 * c - x2 * s, x2 * c + x1 * s], dim=-1).to(x.dtype)


# -- native code, as operators that are opaque to torch.compile


def _run(name: str, *args: Any) -> None:
    native.require(name)(*(a.detach() if isinstance(a, Tensor) else a for a in args), "", torch.get_num_threads())  # fmt: skip


def _norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    y, factor = _fake_norm(x, weight, eps)
    _run("rms_norm_forward", x, weight, eps, y, factor)
    return y, factor


def _fake_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty(x.shape[:1], dtype=torch.float32)


def _norm_grad(
    x: Tensor, weight: Tensor, factor: Tensor, dy: Tensor, want_x: bool, want_weight: bool
) -> tuple[Tensor, Tensor]:
    """(dx, dweight float32); one that is not wanted is empty."""
    dx, dweight = _fake_norm_grad(x, weight, factor, dy, want_x, want_weight)
    into = (dx if want_x else None, dweight if want_weight else None)
    _run("rms_norm_backward", x, weight, factor, dy, *into)
    return dx, dweight


def _fake_norm_grad(
    x: Tensor, weight: Tensor, factor: Tensor, dy: Tensor, want_x: bool, want_weight: bool
) -> tuple[Tensor, Tensor]:
    dx = torch.empty_like(x) if want_x else x.new_empty(0)
    return dx, x.new_empty(weight.numel() if want_weight else 0, dtype=torch.float32)


def _swiglu(gate: Tensor, up: Tensor) -> Tensor:
    out = torch.empty_like(gate)
    _run("swiglu_forward", gate, up, out)
    return out


def _fake_swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return torch.empty_like(gate)


def _swiglu_grad(gate: Tensor, up: Tensor, d_out: Tensor) -> tuple[Tensor, Tensor]:
    d_gate, d_up = torch.empty_like(gate), torch.empty_like(up)
    _run("swiglu_backward", gate, up, d_out, d_gate, d_up)
    return d_gate, d_up


def _fake_swiglu_grad(gate: Tensor, up: Tensor, d_out: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(gate), torch.empty_like(up)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, back: bool) -> Tensor:
    out = torch.empty_like(x)
    _run("rotary", x, cos, sin, back, out)
    return out


def _fake_rotate(x: Tensor, cos: Tensor, sin: Tensor, back: bool) -> Tensor:
    return torch.empty_like(x)


norm_op = operator("rms_norm_forward", _norm, _fake_norm)
norm_grad_op = operator("rms_norm_backward", _norm_grad, _fake_norm_grad)
swiglu_op = operator("swiglu_forward", _swiglu, _fake_swiglu)
swiglu_grad_op = operator("swiglu_backward", _swiglu_grad, _fake_swiglu_grad)
rotate_op = operator("rotary", _rotate, _fake_rotate)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        x = x.contiguous()
        y, factor = norm_op(x, weight, eps)
        ctx.save_for_backward(x, weight, factor)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, factor = ctx.saved_tensors
        want_x, want_weight, _ = ctx.needs_input_grad
        dx, dweight = norm_grad_op(x, weight, factor, dy.contiguous(), want_x, want_weight)
        return dx if want_x else None, dweight.to(weight.dtype) if want_weight else None, None


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return swiglu_op(gate, up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor, Tensor]:
        return swiglu_grad_op(*ctx.saved_tensors, d_out.contiguous())


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return rotate_op(x, cos, sin, False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor, None, None]:
        return rotate_op(d_out.contiguous(), *ctx.saved_tensors, True), None, None
