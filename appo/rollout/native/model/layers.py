"""The model runner in C++ (csrc/decoder/): one call per forward pass, weights packed once.

    ids[M] → embedding → all layers, attention over the block pool included → norm of the chosen rows → hidden[R, d]

The PyTorch code of `Model` is the definition: rounding happens where it rounds, only sums are taken
in another order. A row's bits depend on that row, the weights and the KV it reads: not on the batch
it stands in, not on the number of threads, not on how a prompt was cut into chunks. So
deterministic mode has nothing to add here (in PyTorch it pads). Threads sleep between calls.
float32 needs AVX2, bfloat16 AVX512-BF16; elsewhere `unavailable` says why not.
"""

from __future__ import annotations

import time
from collections.abc import Iterable

import torch
from torch import Tensor

from appo._kernels.common import native
from appo._kernels.linear_logprob import backend_cpu as linear_cpu
from appo.errors import EngineError
from appo.models.shape import ModelShape
from appo.rollout.native.attention.pool import MAX_HEAD_DIM, KVPool, available
from appo.rollout.native.model.head import NativeHead
from appo.rollout.native.model.linear import Layer, Linear, Weights
from appo.rollout.native.tree.layout import Layout

RUNNERS = ("auto", "torch", "native")
PARTS = ("qkv", "o", "gate_up", "down")


def choose(
    runner: str, config: ModelShape, dtype: torch.dtype, device: torch.device
) -> NativeLayers | None:
    """What runs the layers: None is PyTorch. "auto" takes C++ where it can run.

    "native" raises EngineError if not.
    """
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


def unavailable(config: ModelShape, dtype: torch.dtype, device: torch.device) -> str | None:
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
    if not available(dtype, config.head_dim, device):
        return f"native attention takes head_dim up to {MAX_HEAD_DIM}, not {config.head_dim}"
    return None


class NativeLayers:
    """Packed copies of one model's layers and head: as many bytes as the weights they were made of.

    isa      "avx512_bf16", "avx512", "avx2"; "" is the best for the dtype
    threads  upper bound; None: torch's
    Attributes: packed_bytes, pack_seconds (of the last `pack`).
    """

    def __init__(
        self, config: ModelShape, dtype: torch.dtype, isa: str = "", threads: int | None = None
    ):
        c = self.config = config
        self.dtype, self.threads = dtype, threads
        low = dtype == torch.bfloat16
        self._step = native.require("decoder_step")
        self._stack = native.require("decoder_stack")(
            c.layers, c.hidden, c.ff, c.heads, c.kv_heads, c.head_dim, c.eps, low, isa
        )
        self.head = NativeHead(c.vocab, c.hidden, dtype, isa, threads)
        self._adapters: dict[tuple[int, str], tuple[Tensor, Tensor] | None] = {}
        self.packed_bytes: int = native.require("decoder_stack_bytes")(self._stack)
        self.packed_bytes += self.head.packed_bytes
        self.pack_seconds = 0.0
        self._packed = False

    def pack(self, model: Weights, changed: Iterable[str]) -> None:
        """Copy the layers, and the head, that have a tensor among `changed`.

        Names as in its `targets`.

        To be called after every change of weights; the first call copies everything.
        """
        start = time.perf_counter()
        names = model.targets if not self._packed else changed
        tensor = self.config.tensor
        at = tensor("model.layers") + "."
        parts = {n.removeprefix(at).split(".")[0] if n.startswith(at) else n for n in names}
        for i, layer in enumerate(model.layers):
            if str(i) in parts:
                self._pack_layer(i, layer)
        if parts & {tensor("lm_head.weight"), tensor("model.embed_tokens.weight")}:
            self.head.pack(model.head.weight)
        self._packed = True
        self.pack_seconds = time.perf_counter() - start

    def _pack_layer(self, index: int, layer: Layer) -> None:
        native.require("decoder_stack_norms")(
            self._stack, index, layer.norm1, layer.norm2, layer.qk_norm
        )
        for part in PARTS:
            linear: Linear = getattr(layer, part)
            bias = None if linear.bias is None else linear.bias.float()
            native.require("decoder_stack_pack")(
                self._stack, index, part, linear.weight, bias, self._threads()
            )

    def adapt(self, model: Weights) -> None:
        """Take over the adapters that changed since the last call."""
        for i, layer in enumerate(model.layers):
            for part in PARTS:
                adapter = getattr(layer, part).adapter
                if adapter is not self._adapters.get((i, part)):
                    native.require("decoder_stack_adapt")(
                        self._stack, i, part, *(adapter or (None, None))
                    )
                    self._adapters[i, part] = adapter

    def forward(
        self, model: Weights, layout: Layout, pool: KVPool, rows: Tensor | None = None
    ) -> Tensor:
        """Run a layout.

        → final hidden states, normed, of `rows` (int64, any order; None: all), [R, d] as the head
        wants them. KV goes into the pool, which must have the layout's blocks.

        Raises EngineError for a pool of another shape, ValueError for tables that do not fit.
        """
        c = self.config
        want = ("packed", c.layers, c.kv_heads, c.head_dim, self.dtype)
        found = (pool.layout, pool.layers, pool.kv_heads, pool.head_dim, pool.dtype)
        if found != want:
            raise EngineError(
                f"the KV pool is {found} in (layout, layers, heads, head dimension, dtype); the model needs {want}"
            )
        count = len(layout.ids) if rows is None else len(rows)
        out = torch.empty(count, c.hidden, dtype=model.head.compute)
        self._step(
            self._stack, model.embed, torch.view_as_real(model.turn), model.norm, layout.ids, layout.positions,
            layout.slots, layout.segments, layout.blocks, layout.reads, layout.limits, pool.addresses, rows, out,
            self._threads(),
        )  # fmt: skip
        return out

    def logits(self, hidden: Tensor) -> Tensor:
        """[R, V] float32 of hidden[R, d], which may be float32 beside bfloat16 weights.

        Nothing is rounded then.
        """
        return self.head.logits(hidden)

    def _threads(self) -> int:
        return torch.get_num_threads() if self.threads is None else self.threads
