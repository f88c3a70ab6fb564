"""Is this folder a model we can train?

Answered from config.json and weight-file headers, without loading weights.
"""

from __future__ import annotations

import json
import math
import struct
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from appo.errors import ModelError
from appo.models.shape import (
    FAMILIES,
    ModelFamily,
    ModelShape,
    read_config,
    read_json,
    read_shape,
)

_BYTES = {
    "F64": 8,
    "F32": 4,
    "BF16": 2,
    "F16": 2,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
}
_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
_MAX_HEADER = 100 << 20  # bytes; the limit of the safetensors format


@dataclass(frozen=True)
class ModelInfo:
    """What a model folder holds.

    `params` counts a tied head once; `bytes` is the size of the weight files.
    """

    arch: str
    params: int
    layers: int
    hidden: int
    vocab: int
    context: int
    dtype: str
    bytes: int
    kv_dim: int  # key/value heads times head size: elements of one K (or V) row


def check_model_folder(path: Path, family: ModelFamily | None = None) -> ModelInfo:
    """Read config, weight headers and tokenizer files of `path`.

    family: the user's own, beside those built in.

    Raises ModelError for a folder without weights, an architecture that is not supported, a missing
    or truncated shard, tensors that do not fit the config, and a tokenizer without chat template.
    """
    path = Path(path)
    config = read_config(path)
    arch = (config.get("architectures") or ["(none)"])[0]
    known = [f.architecture for f in (*FAMILIES.values(), *([family] if family else ()))]
    if arch not in known:
        raise ModelError(
            f"{path}/config.json: architectures is {arch!r}; supported are {', '.join(known)}. "
            "Choose a text model of the Llama, Qwen2 or Qwen3 family, or say in model.family what yours is called"
        )
    shape = read_shape(path, family)
    tensors = _weight_headers(path)
    _check_shapes(path, shape, tensors)
    _check_tokenizer(path)
    sizes = Counter[str]()
    for dtype, size in tensors.values():
        sizes[dtype] += math.prod(size)
    main = sizes.most_common(1)[0][0]
    return ModelInfo(
        arch=arch,
        params=sum(sizes.values()),
        layers=shape.layers,
        hidden=shape.hidden,
        vocab=shape.vocab,
        context=shape.max_positions,
        dtype=_DTYPES.get(main, main.lower()),
        bytes=sum(f.stat().st_size for f in path.glob("*.safetensors")),
        kv_dim=shape.key,
    )


def read_header(path: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Name → (dtype, shape) of one safetensors file.

    ModelError when it is damaged or shorter than it says.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > min(_MAX_HEADER, size - 8):
                raise ValueError(f"header of {length} bytes in a file of {size}")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        tensors = {name: (str(t["dtype"]), tuple(t["shape"])) for name, t in header.items()}
        end = max((t["data_offsets"][1] for t in header.values()), default=0)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise ModelError(
            f"{path}: damaged safetensors file ({error}); download it again"
        ) from error
    if 8 + length + end != size:
        raise ModelError(
            f"{path}: {size} bytes, but its header needs {8 + length + end}; download it again"
        )
    for name, (dtype, shape) in tensors.items():
        start, stop = header[name]["data_offsets"]
        if dtype in _BYTES and stop - start != _BYTES[dtype] * math.prod(shape):
            raise ModelError(
                f"{path}: tensor {name} has {stop - start} bytes, not those of its shape {shape}"
            )
    return tensors


def _weight_headers(path: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    index = path / "model.safetensors.index.json"
    if index.is_file():
        weight_map: dict[str, str] = read_json(index).get("weight_map") or {}
        shards = sorted(set(weight_map.values()))
        missing = [s for s in shards if not (path / s).is_file()]
        if missing or not shards:
            what = ", ".join(missing) or "no shard at all"
            raise ModelError(
                f"{index}: names {what}, which is not in the folder; download the model again"
            )
    else:
        weight_map = {}
        shards = ["model.safetensors"]
        if not (path / shards[0]).is_file():
            raise ModelError(_no_weights(path))
    tensors: dict[str, tuple[str, tuple[int, ...]]] = {}
    for shard in shards:
        tensors |= read_header(path / shard)
    lost = sorted(set(weight_map) - set(tensors))
    if lost:
        raise ModelError(
            f"{index}: tensor {lost[0]} is in none of the shards ({len(lost)} lost); download again"
        )
    return tensors


def _no_weights(path: Path) -> str:
    if (path / "adapter_config.json").is_file():
        return f"{path}: is a LoRA adapter, not a model; merge it into its base model first"
    if any(path.glob("*.bin")) or any(path.glob("*.pt*")):
        return f"{path}: has pickled weights only; convert them to safetensors (pickles are never loaded)"
    return f"{path}: has no weights (model.safetensors or model.safetensors.index.json)"


def _check_shapes(
    path: Path, shape: ModelShape, tensors: dict[str, tuple[str, tuple[int, ...]]]
) -> None:
    """The embedding and the first norm of every layer tell a wrong or partial set of weights."""
    table = (shape.vocab, shape.hidden)
    expected: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": table}
    if not shape.tied:
        expected["lm_head.weight"] = table
    for layer in range(shape.layers):
        expected[f"model.layers.{layer}.input_layernorm.weight"] = (shape.hidden,)
    expected["model.norm.weight"] = (shape.hidden,)
    for llama_name, size in expected.items():
        name = shape.tensor(llama_name)
        if name not in tensors:
            raise ModelError(f"{path}: weights have no tensor {name}, which config.json promises")
        if tensors[name][1] != size:
            raise ModelError(
                f"{path}: tensor {name} is {tensors[name][1]}, config.json says {size}"
            )


def _check_tokenizer(path: Path) -> None:
    kinds = (["tokenizer.json"], ["vocab.json", "merges.txt"], ["tokenizer.model"])
    if not any(all((path / f).is_file() for f in kind) for kind in kinds):
        raise ModelError(
            f"{path}: has no tokenizer (tokenizer.json); copy it from the original model"
        )
    in_file = any((path / f).is_file() for f in ("chat_template.jinja", "chat_template.json"))
    config = path / "tokenizer_config.json"
    if not in_file and not (config.is_file() and read_json(config).get("chat_template")):
        raise ModelError(
            f"{path}: tokenizer has no chat template; use the instruct version of the model"
        )
