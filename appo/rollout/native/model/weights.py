"""What the runner takes from a model folder: a shape that it can compute, rotations, tensors."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from appo.errors import ModelError
from appo.models.shape import ModelFamily, ModelShape, read_shape

ROPE_TYPES = ("default", "linear", "llama3")


def read_config(model_dir: Path, family: ModelFamily | None = None) -> ModelShape:
    """The shape of a model that the runner can compute.

    Raises ModelError for a family or feature that it lacks.
    """
    path, shape = Path(model_dir) / "config.json", read_shape(model_dir, family)
    if shape.activation != "silu":
        raise ModelError(
            f"{path}: hidden_act={shape.activation!r} is not supported; only 'silu' is"
        )
    if shape.sliding:
        raise ModelError(
            f"{path}: sliding-window attention is not supported; set use_sliding_window to false"
        )
    if (kind := shape.rope["rope_type"]) not in ROPE_TYPES:
        raise ModelError(
            f"{path}: rope_type={kind!r} is not supported; use one of {', '.join(ROPE_TYPES)}"
        )
    return shape


def inverse_frequencies(config: ModelShape) -> Tensor:
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
            for name in tensors.keys():  # noqa: SIM118 — not a dict
                yield name, tensors.get_tensor(name)
