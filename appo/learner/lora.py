"""Low-rank adapters: where they go, and what the model is worth with them merged in.

Adapters are made by peft and trained in the model's dtype; under bfloat16 DeepSpeed keeps float32
master copies, so small steps are not lost while training. Merging happens in float32 and is cast
once, into a new tensor, in a way that does not lose them either: the base weights are never
touched, so merging ten thousand times changes nothing.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn

from appo.config.learner import LORA_TARGETS
from appo.errors import ConfigError

Gather = Callable[[list[nn.Parameter]], AbstractContextManager]
# A model of transformers or a layer of peft: their attributes are set at run time, no checker sees
# them.
HFModel = Any


def add_lora(
    lm: HFModel,
    *,
    r: int,
    alpha: float,
    targets: Sequence[str] = LORA_TARGETS,
    layers: int | None = None,
) -> PeftModel:
    """Put adapters on the linear layers named `targets` in the last `layers` blocks (None: all).

    Freeze the rest.

    `lm` is changed in place; the PeftModel is only needed to save the adapter. Raises ConfigError
    for a target that the model does not have and for a number of layers it does not have.
    """
    name, stack = next((n, m) for n, m in lm.named_modules() if isinstance(m, nn.ModuleList))
    depth = len(stack)
    if layers is not None and not 1 <= layers <= depth:
        raise ConfigError(
            f"lora.layers is {layers}, but the model has {depth} layers; use 1 … {depth} or null"
        )
    if r < 1:
        raise ConfigError(f"lora.r is {r}; use a rank of 1 or more, or learner.mode: full")
    block = {n.rpartition(".")[2] for n, m in stack[0].named_modules() if isinstance(m, nn.Linear)}
    unknown = sorted(set(targets) - block)
    if unknown or not targets:
        raise ConfigError(
            f"lora.targets has {unknown or 'no entry'}; this model offers {sorted(block)}"
        )
    config = LoraConfig(
        r=r,
        lora_alpha=alpha,  # type: ignore[arg-type]  # peft multiplies with it, a float does
        lora_dropout=0.0,
        bias="none",
        task_type="CAUSAL_LM",
        target_modules=list(targets),
        layers_to_transform=None if layers is None else list(range(depth - layers, depth)),
        layers_pattern=None if layers is None else name.rpartition(".")[2],
    )
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", FutureWarning
        )  # a name that transformers renames and peft still reads
        model = get_peft_model(lm, config, autocast_adapter_dtype=False)
    for module in lm.modules():
        if isinstance(module, LoraLinear):
            module.__class__ = _Adapted
    return model


class _Adapted(LoraLinear):
    """peft's layer with the scaling applied to [T, r] instead of [T, out], forward and backward."""

    def forward(self, x: Tensor) -> Tensor:
        (adapter,) = self.active_adapters  # we add one
        layer: HFModel = self
        low = layer.lora_A[adapter](x) * layer.scaling[adapter]
        out: Tensor = layer.base_layer(x) + layer.lora_B[adapter](low)
        return out


@dataclass
class CastRetention:
    """How much of the adapters survives the cast to the weight dtype.

    <merged - W, delta> / <delta, delta>.

    1 when all of it arrives, 0 when rounding swallowed it.
    """

    along: float = 0.0
    delta: float = 0.0

    @property
    def value(self) -> float:
        """The share, about 0 to 1; 1 when the adapters change nothing."""
        return self.along / self.delta if self.delta else 1.0


def merged_tensors(
    lm: nn.Module,
    *,
    changed_only: bool = True,
    gather: Gather | None = None,
    retention: CastRetention | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """(Hugging Face name, tensor) of the model with its adapters merged, one at a time.

    With adapters and `changed_only`, only the adapted weights; else every weight, tied heads once
    under the name of the embedding. Tensors share memory with the model where nothing was merged:
    copy what you keep. `gather` opens partitioned parameters (ZeRO-3), in which case tensors are
    copies.
    """
    adapted = {n: m for n, m in lm.named_modules() if isinstance(m, LoraLinear)}
    inside = tuple(n + "." for n in adapted)
    if adapted and changed_only:
        names = [n + ".base_layer.weight" for n in adapted]
        own = dict(lm.named_parameters())
        listed = [(n, own[n]) for n in names]
    else:
        listed = [(n, p) for n, p in lm.named_parameters() if ".lora_" not in n]
    for name, p in listed:
        owner = name.removesuffix(".base_layer.weight")
        if name.startswith(inside) and owner in adapted:
            module = adapted[owner]
            with gather(list(module.parameters())) if gather else nullcontext():
                yield owner + ".weight", _merge(module, retention)
        else:
            with gather([p]) if gather else nullcontext():
                yield (
                    name.replace(".base_layer.", "."),
                    p.detach().clone() if gather else p.detach(),
                )


def adapter_tensors(lm: nn.Module, *, gather: Gather | None = None) -> Iterator[tuple[str, Tensor]]:
    """`<module>.lora_A` [r, in] and `<module>.lora_B` [out, r] with the scaling folded in.

    For an engine that applies adapters itself: nothing is rounded into the weights. Names are those
    of the Hugging Face modules.
    """
    adapted: list[tuple[str, HFModel]]
    adapted = [(n, m) for n, m in lm.named_modules() if isinstance(m, LoraLinear)]
    for name, module in adapted:
        (adapter,) = module.active_adapters  # we add one
        a, b = module.lora_A[adapter].weight, module.lora_B[adapter].weight
        with gather([a, b]) if gather else nullcontext():
            yield name + ".lora_A", a.detach().clone()
            yield name + ".lora_B", b.detach().float() * module.scaling[adapter]


@torch.no_grad()
def _merge(module: HFModel, retention: CastRetention | None) -> Tensor:
    """W + scaling · B A, computed in float32 and cast to W's dtype. [out, in]."""
    base: Tensor = module.base_layer.weight
    delta = torch.zeros_like(base, dtype=torch.float32)
    for adapter in module.active_adapters:
        a, b = module.lora_A[adapter].weight.float(), module.lora_B[adapter].weight.float()
        delta.addmm_(b, a, alpha=module.scaling[adapter])
    exact = base.float() + delta
    merged = dithered_bfloat16(exact) if base.dtype == torch.bfloat16 else exact.to(base.dtype)
    if retention is not None:
        retention.along += float(((merged.float() - base.float()) * delta).sum(dtype=torch.float64))
        retention.delta += float(delta.square().sum(dtype=torch.float64))
    return merged


def dithered_bfloat16(x: Tensor) -> Tensor:
    """float32[out, in] → bfloat16, rounded up or down.

    How often is in proportion to where x lies between its two neighbours.

    W is itself a bfloat16 number, so rounding W + delta to the nearest one gives W back wherever
    delta is below half a step: of a fresh adapter (learning rate 1e-5, SmolLM2-135M) 1 % of the
    change in log-probs would reach the engine. Here the threshold of each entry comes from a
    golden-ratio sequence instead of 1/2: errors cancel along a row, the change arrives whole (0.97
    … 1.04 in the same measurement), numbers that are bfloat16 already stay as they are, and the
    same x always gives the same bits.
    """
    rows, columns = (torch.arange(n, dtype=torch.int32, device=x.device) for n in x.shape)
    threshold = (
        columns * 40503 + rows[:, None] * 25717
    ) & 0xFFFF  # 2^16 / φ, and a step that shares no factor
    bits = x.contiguous().view(torch.int32)  # bfloat16 is the upper half of float32
    return ((bits + threshold) & ~0xFFFF).view(torch.float32).to(torch.bfloat16)
