"""A Hugging Face model with what lies between its matrix products done in one pass each.

`appo._kernels.fused_layers.op`.

Modules keep their names, parameters and hooks; only the classes of norms, attentions and MLPs are
exchanged for subclasses with another forward. Worth an eighth of a layer's training step on a CPU;
rounding happens once where the original rounds after every step, so results are closer to float64,
not the same bits. Where there is no native code (a GPU) the original forward runs; float64, for
tests, takes the definitions.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.activations import SiLUActivation
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from appo._kernels.fused_layers.op import choose, rms_norm, rotary, swiglu

Forward = Callable[..., Any]
# A module of transformers: its attributes are set at run time, no checker sees them.
HFModule = Any


def fuse(lm: nn.Module) -> nn.Module:
    """Exchange the classes inside a Llama, Qwen2 or Qwen3, in place; returns it.

    What is of another kind stays as it is.
    """
    for module in lm.modules():
        make = _kind(module)
        if make is not None:
            module.__class__ = _fused(cast("Hashable", type(module)), make)
    return lm


def runs_here(x: Tensor) -> bool:
    """Whether these numbers take our way.

    Native code, or float64, which the originals round to float32 in their norms.
    """
    return x.dtype == torch.float64 or choose("auto", x) == "cpu"


@functools.cache
def _fused(cls: Any, make: Callable[[HFModule], Forward]) -> type:
    return type(f"Fused{cls.__name__}", (cls,), {"forward": make(cls)})


def _kind(module: nn.Module) -> Callable[[HFModule], Forward] | None:
    name = type(module).__name__
    if name.endswith("RMSNorm") and hasattr(module, "variance_epsilon"):
        return _norm
    if name.endswith("MLP") and _has(module, "gate_proj", "up_proj", "down_proj"):
        silu = isinstance(getattr(module, "act_fn", None), nn.SiLU | SiLUActivation)
        return _mlp if silu else None
    if name.endswith("Attention") and _has(module, "q_proj", "k_proj", "v_proj", "o_proj"):
        return _attention
    return None


def _has(module: nn.Module, *names: str) -> bool:
    """Whether the parts are called as in Llama.

    In a model family of the user's own they may not be.
    """
    return all(hasattr(module, name) for name in names)


def _norm(original: HFModule) -> Forward:
    def forward(self: HFModule, hidden_states: Tensor) -> Any:
        if not runs_here(hidden_states):
            return original.forward(self, hidden_states)
        return rms_norm(hidden_states, self.weight, self.variance_epsilon)

    return forward


def _mlp(original: HFModule) -> Forward:
    def forward(self: HFModule, x: Tensor) -> Any:
        if not runs_here(x):
            return original.forward(self, x)
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))

    return forward


def _attention(original: HFModule) -> Forward:
    def forward(
        self: HFModule,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: object = None,
        **kwargs: object,
    ) -> Any:
        """One stream, hidden_states[1, T, H], without a cache: what the learner runs."""
        if not runs_here(hidden_states):
            return original.forward(
                self, hidden_states, position_embeddings, attention_mask, past_key_values, **kwargs
            )
        assert past_key_values is None and hidden_states.shape[0] == 1, "one stream at once"
        tokens = hidden_states.shape[1]
        q, k, v = (
            project(hidden_states).view(tokens, -1, self.head_dim)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        if hasattr(self, "q_norm"):  # Qwen3
            q, k = self.q_norm(q), self.k_norm(k)
        cos, sin = (angle[0, :, : self.head_dim // 2] for angle in position_embeddings)
        q, k, v = (x.transpose(0, 1)[None] for x in (rotary(q, cos, sin), rotary(k, cos, sin), v))
        attend = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
        out, weights = attend(self, q, k, v, attention_mask, scaling=self.scaling, **kwargs)
        return self.o_proj(out.reshape(1, tokens, -1)), weights

    return forward
