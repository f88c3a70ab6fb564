"""The parts that a model is made of.

Fused linears, layers of them, and where checkpoint tensors lie inside.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


class Linear:
    """y = x Wᵀ + b, computed in `compute`, from a copy packed once for oneDNN where that exists.

    1.1-2x at 1-32 rows.

    `weight` is the tensor that is loaded into; `pack` must follow every change of it. `adapter` =
    (down [Σr, in], up [out, Σr]) adds x downᵀ upᵀ: low-rank updates are applied, not merged,
    because a bfloat16 weight rounds most of a small update away (SmolLM2-135M after the first
    optimiser step: 79 % of it, by norm).
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, compute: torch.dtype):
        self.weight, self.bias, self.compute = weight, bias, compute
        self.ready, self.packed = weight, False
        self.adapter: tuple[Tensor, Tensor] | None = None
        self.adapted: frozenset[str] = frozenset()  # modules in `adapter`

    def pack(self) -> None:
        """Make the weight ready for calls: in the compute dtype, packed for oneDNN if it can be."""
        self.packed = can_pack(self.weight, self.compute)
        self.ready = self.weight.to(self.compute)
        if self.packed:
            self.ready = torch.ops.mkldnn._reorder_linear_weight(self.ready, 32)

    def __call__(self, x: Tensor) -> Tensor:
        """x Wᵀ + bias, and the adapter's part where there is one. [n, in] → [n, out]."""
        if self.packed:
            y = torch.ops.mkldnn._linear_pointwise(x, self.ready, self.bias, "none", [], "")
        else:
            y = F.linear(x, self.ready, self.bias)
        if self.adapter is None:
            return y
        down, up = self.adapter
        return torch.addmm(y, x @ down.T, up.T)


def can_pack(weight: Tensor, compute: torch.dtype) -> bool:
    """Whether this build of torch, on this CPU, has oneDNN's packed linear for such a weight."""
    ops = torch.ops.mkldnn
    have = hasattr(ops, "_reorder_linear_weight") and hasattr(ops, "_linear_pointwise")
    if not (have and weight.device.type == "cpu" and torch.backends.mkldnn.is_available()):
        return False
    # In bfloat16 oneDNN refuses CPUs without AVX-512 or AVX-NE-CONVERT, with an exception.
    return compute != torch.bfloat16 or bool(ops._is_mkldnn_bf16_supported())


@dataclass
class Layer:
    """Weights of one layer of the decoder: Hq query and Hkv key heads of size D, width d."""

    norm1: Tensor  # [d] float32
    qkv: Linear  # [(Hq + 2 Hkv) D, d]
    qk_norm: Tensor | None  # [Hq + Hkv, D] float32, Qwen3 only
    o: Linear
    norm2: Tensor
    gate_up: Linear  # [2 ff, d]
    down: Linear


@dataclass
class Slice:
    """Output rows a … b-1 of a fused linear belong to one module of the checkpoint.

    `heads` as in Target.
    """

    linear: Linear
    a: int
    b: int
    heads: int


@dataclass
class Target:
    """Where one checkpoint tensor lives inside a fused one.

    `heads` > 0: make rotary pairs neighbours on the way in.
    """

    into: Tensor
    shape: tuple[int, ...]
    heads: int = 0

    def write(self, tensor: Tensor) -> None:
        """Copy a checkpoint tensor to its place, in the order that the engine computes in."""
        if self.heads:
            pairs = tensor.reshape(self.heads, 2, -1, *tensor.shape[1:])  # [H, 2, D/2, …]
            tensor = pairs.transpose(1, 2).reshape(tensor.shape)
        self.into.copy_(tensor.expand_as(self.into))


class Weights(Protocol):
    """What the C++ layers read of a model, V tokens and width d."""

    embed: Tensor  # [V, d]
    layers: list[Layer]
    norm: Tensor  # [d] float32, before the head
    head: Linear  # [V, d]
    turn: Tensor  # [context, 1, D/2] complex, the rotary embedding
    targets: dict[str, Target]  # by Hugging Face name
