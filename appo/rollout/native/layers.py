"""The model runner's layers and output head in C++ (csrc/layer*): two calls per layer, weights packed once.

    x[M, d] → qkv → q, k, v → attention (the caller's) → mlp → x[M, d]

The PyTorch code of `Model` is the definition: rounding happens where it rounds, only sums are taken in another order.
A row's bits depend on that row and the weights: not on the batch it stands in, not on the number of threads. Threads
sleep between calls. float32 needs AVX2, bfloat16 AVX512-BF16; elsewhere `unavailable` says why not.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from appo.errors import EngineError
from appo.kernels import linear_cpu, native
from appo.rollout.native.weights import ModelConfig

if TYPE_CHECKING:
    from appo.rollout.native.model import Attention, Linear, Model

RUNNERS = ("auto", "torch", "native")
PARTS = ("qkv", "o", "gate_up", "down")


def choose(
    runner: str, config: ModelConfig, dtype: torch.dtype, device: torch.device
) -> NativeLayers | None:
    """What runs the layers: None is PyTorch. "auto" takes C++ where it can run; "native" raises EngineError if not."""
    if runner not in RUNNERS:
        raise EngineError(f"runner={runner!r}: use one of {', '.join(RUNNERS)}")
    if runner == "torch":
        return None
    reason = unavailable(config, dtype, device)
    if reason is None:
        return NativeLayers(config, dtype)
    if runner == "native":
        raise EngineError(f"runner='native': {reason}; use runner='torch'")
    return None


def unavailable(config: ModelConfig, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why the C++ layers cannot run such a model here; None if they can."""
    if device.type != "cpu":
        return f"the model is on {device}, the C++ layers run on the CPU"
    isa = linear_cpu.isa()
    if isa is None:
        return native.load()[1] or "this processor has no AVX2"
    if dtype not in (torch.float32, torch.bfloat16):
        return f"the C++ layers run in float32 and bfloat16, not in {dtype}"
    if dtype == torch.bfloat16 and isa != "avx512_bf16":
        return f"bfloat16 layers need AVX512-BF16, this processor has {isa}"
    if config.hidden % 2 or config.ff % 2 or config.head_dim % 2:
        return "hidden_size, intermediate_size and head_dim must be even"
    return None


class NativeLayers:
    """Packed copies of one model's layers and head: as many bytes as the weights they were made of.

    isa      "avx512_bf16", "avx512", "avx2"; "" is the best for the dtype
    threads  upper bound; None: torch's
    Attributes: packed_bytes, pack_seconds (of the last `pack`).
    """

    def __init__(
        self, config: ModelConfig, dtype: torch.dtype, isa: str = "", threads: int | None = None
    ):
        c = self.config = config
        self.dtype, self.threads = dtype, threads
        low = dtype == torch.bfloat16
        self._qkv, self._mlp = _function("layer_qkv"), _function("layer_mlp")
        self._logits = _function("layer_head_logits")
        self._stack = _function("layer_stack")(
            c.layers, c.hidden, c.ff, c.heads, c.kv_heads, c.head_dim, c.eps, low, isa
        )
        self._head = _function("layer_head")(c.vocab, c.hidden, low, isa)
        self._adapters: dict[tuple[int, str], tuple[Tensor, Tensor] | None] = {}
        self.packed_bytes: int = _function("layer_stack_bytes")(self._stack)
        self.packed_bytes += _function("layer_head_bytes")(self._head)
        self.pack_seconds = 0.0

    def pack(self, model: Model) -> None:
        """Copy all weights of the model; to be called after every change of them."""
        start = time.perf_counter()
        threads = self._threads()
        norms, pack = _function("layer_stack_norms"), _function("layer_stack_pack")
        for i, layer in enumerate(model.layers):
            norms(self._stack, i, layer.norm1, layer.norm2, layer.qk_norm)
            for part in PARTS:
                linear: Linear = getattr(layer, part)
                bias = None if linear.bias is None else linear.bias.float()
                pack(self._stack, i, part, linear.weight, bias, threads)
        _function("layer_head_pack")(self._head, model.head.weight, threads)
        self.pack_seconds = time.perf_counter() - start

    def adapt(self, model: Model) -> None:
        """Take over the adapters that changed since the last call."""
        for i, layer in enumerate(model.layers):
            for part in PARTS:
                adapter = getattr(layer, part).adapter
                if adapter is not self._adapters.get((i, part)):
                    _function("layer_stack_adapt")(self._stack, i, part, *(adapter or (None, None)))
                    self._adapters[i, part] = adapter

    def forward(self, x: Tensor, turn: Tensor, positions: Tensor, attention: Attention) -> None:
        """All layers, x[M, d] float32 in place. turn: complex [context, …, D/2] · positions int64[M]."""
        c, rows, threads = self.config, x.shape[0], self._threads()
        q = torch.empty(rows, c.heads, c.head_dim, dtype=self.dtype)
        k = torch.empty(rows, c.kv_heads, c.head_dim, dtype=self.dtype)
        v = torch.empty_like(k)  # the same three for every layer: attention keeps none of them
        table = torch.view_as_real(turn)
        for i in range(c.layers):
            self._qkv(self._stack, i, x, table, positions, q, k, v, threads)
            attended = attention(i, q, k, v).contiguous()
            self._mlp(self._stack, i, attended, x, threads)

    def logits(self, hidden: Tensor) -> Tensor:
        """[R, V] float32 of hidden[R, d], which may be float32 beside bfloat16 weights: nothing is rounded then."""
        out = torch.empty(hidden.shape[0], self.config.vocab)
        self._logits(self._head, hidden, out, self._threads())
        return out

    def _threads(self) -> int:
        return torch.get_num_threads() if self.threads is None else self.threads


def _function(name: str) -> Any:
    return native.function(name, "cpu")
