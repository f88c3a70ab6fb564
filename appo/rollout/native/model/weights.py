"""What a Hugging Face folder says about a model: its shape, its rotary frequencies, its tensors.

Only config.json and safetensors files are read; nothing here knows how the model is run.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from appo.errors import ModelError

FAMILIES = ("llama", "qwen2", "qwen3")
ROPE_TYPES = ("default", "linear", "llama3")


@dataclass(frozen=True)
class DecoderConfig:
    """The numbers the runner needs; names follow the field, not the file."""

    family: str
    layers: int
    hidden: int
    ff: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    eps: float
    tied: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    max_positions: int
    rope: dict[str, Any] = field(default_factory=dict)

    @property
    def group(self) -> int:
        """Query heads that share one key/value head."""
        return self.heads // self.kv_heads


def read_config(model_dir: Path) -> DecoderConfig:
    """Parse `model_dir`/config.json. Raises ModelError for a family or feature the runner lacks."""
    path = Path(model_dir) / "config.json"
    if not path.is_file():
        raise ModelError(
            f"model_dir={str(model_dir)!r}: no config.json there; give a local model folder"
        )
    raw = json.loads(path.read_text())
    family = raw.get("model_type", "?")
    _check_supported(raw, family, path)
    heads = raw["num_attention_heads"]
    bias = bool(raw.get("attention_bias", False))
    return DecoderConfig(
        family=family,
        layers=raw["num_hidden_layers"],
        hidden=raw["hidden_size"],
        ff=raw["intermediate_size"],
        heads=heads,
        kv_heads=raw.get("num_key_value_heads") or heads,
        head_dim=raw.get("head_dim") or raw["hidden_size"] // heads,
        vocab=raw["vocab_size"],
        eps=raw["rms_norm_eps"],
        tied=bool(raw.get("tie_word_embeddings", False)),
        qkv_bias=bias or family == "qwen2",
        o_bias=bias and family != "qwen2",
        mlp_bias=bool(raw.get("mlp_bias", False)) and family == "llama",
        qk_norm=family == "qwen3",
        max_positions=raw["max_position_embeddings"],
        rope=_rope(raw),
    )


def _check_supported(raw: dict[str, Any], family: str, path: Path) -> None:
    if family not in FAMILIES:
        raise ModelError(
            f"{path}: model_type={family!r} is not supported; use one of {', '.join(FAMILIES)}"
        )
    if raw.get("hidden_act", "silu") != "silu":
        raise ModelError(
            f"{path}: hidden_act={raw['hidden_act']!r} is not supported; only 'silu' is"
        )
    sliding = "sliding_attention" in (raw.get("layer_types") or ())
    if sliding or (raw.get("use_sliding_window") and raw.get("sliding_window")):
        raise ModelError(
            f"{path}: sliding-window attention is not supported; set use_sliding_window to false"
        )
    if _rope(raw)["rope_type"] not in ROPE_TYPES:
        kind = _rope(raw)["rope_type"]
        raise ModelError(
            f"{path}: rope_type={kind!r} is not supported; use one of {', '.join(ROPE_TYPES)}"
        )


def _rope(raw: dict[str, Any]) -> dict[str, Any]:
    """Rotary parameters in one form.

    transformers 5 writes rope_parameters, older files rope_scaling + rope_theta.
    """
    rope = dict(raw.get("rope_parameters") or raw.get("rope_scaling") or {})
    rope["rope_type"] = rope.get("rope_type") or rope.get("type") or "default"
    rope["rope_theta"] = rope.get("rope_theta") or raw.get("rope_theta") or 10000.0
    return rope


def inverse_frequencies(config: DecoderConfig) -> Tensor:
    """Rotary inverse frequencies [head_dim / 2], float32.

    llama3 scaling as in the Llama 3.1 report's release.
    """
    rope, dim = config.rope, config.head_dim
    inv = 1.0 / (rope["rope_theta"] ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim))
    if rope["rope_type"] == "linear":
        return inv / rope["factor"]
    if rope["rope_type"] == "llama3":
        old = rope.get("original_max_position_embeddings") or config.max_positions
        low, high, factor = rope["low_freq_factor"], rope["high_freq_factor"], rope["factor"]
        wavelength = 2 * math.pi / inv
        # 0 where a full turn takes longer than the old context, 1 where it is short, linear between
        keep = ((old / wavelength - low) / (high - low)).clamp(0.0, 1.0)
        return (1 - keep) * inv / factor + keep * inv
    return inv


def read_tensors(model_dir: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield (Hugging Face name, tensor) from every safetensors file of the folder, one at a time."""
    files = sorted(Path(model_dir).glob("*.safetensors"))
    if not files:
        raise ModelError(
            f"model_dir={str(model_dir)!r}: no *.safetensors there; convert the weights first"
        )
    for path in files:
        with safe_open(path, framework="pt") as tensors:
            for name in tensors.keys():
                yield name, tensors.get_tensor(name)
