"""Is this folder a model we can train? Answered from config.json and weight-file headers, without loading weights."""

from __future__ import annotations

import json
import math
import struct
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from appo.errors import ModelError

SUPPORTED = ("LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
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
    """What a model folder holds. `params` counts a tied head once; `bytes` is the size of the weight files."""

    arch: str
    params: int
    layers: int
    hidden: int
    vocab: int
    context: int
    dtype: str
    bytes: int
    kv_dim: int  # key/value heads times head size: elements of one K (or V) row


def check_model_folder(path: Path) -> ModelInfo:
    """Read config, weight headers and tokenizer files of `path`.

    Raises ModelError for a folder without weights, an architecture that is not supported, a missing or truncated
    shard, tensors that do not fit the config, and a tokenizer without chat template.
    """
    path = Path(path)
    config = _read_json(path / "config.json")
    arch = (config.get("architectures") or ["(none)"])[0]
    if arch not in SUPPORTED:
        raise ModelError(
            f"{path}/config.json: architectures is {arch!r}; supported are {', '.join(SUPPORTED)}. "
            "Choose a text model of the Llama, Qwen2 or Qwen3 family"
        )
    try:
        layers, hidden, vocab = (
            int(config[k]) for k in ("num_hidden_layers", "hidden_size", "vocab_size")
        )
        context = int(config["max_position_embeddings"])
        heads = int(config["num_attention_heads"])
        kv_heads = int(config.get("num_key_value_heads") or heads)
        head_dim = int(config.get("head_dim") or hidden // heads)
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise ModelError(f"{path}/config.json: missing or malformed field {error}") from error

    tensors = _weight_headers(path)
    _check_shapes(path, config, tensors, layers, hidden, vocab)
    _check_tokenizer(path)
    sizes = Counter[str]()
    for dtype, shape in tensors.values():
        sizes[dtype] += math.prod(shape)
    main = sizes.most_common(1)[0][0]
    return ModelInfo(
        arch=arch,
        params=sum(sizes.values()),
        layers=layers,
        hidden=hidden,
        vocab=vocab,
        context=context,
        dtype=_DTYPES.get(main, main.lower()),
        bytes=sum(f.stat().st_size for f in path.glob("*.safetensors")),
        kv_dim=kv_heads * head_dim,
    )


def read_header(path: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Name → (dtype, shape) of one safetensors file; ModelError when it is damaged or shorter than it says."""
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
        weight_map: dict[str, str] = _read_json(index).get("weight_map") or {}
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
    path: Path,
    config: dict[str, Any],
    tensors: dict[str, tuple[str, tuple[int, ...]]],
    layers: int,
    hidden: int,
    vocab: int,
) -> None:
    """The embedding and the first projection of every layer tell a wrong or partial set of weights."""
    expected: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden)}
    if not config.get("tie_word_embeddings"):
        expected["lm_head.weight"] = (vocab, hidden)
    for layer in range(layers):
        expected[f"model.layers.{layer}.input_layernorm.weight"] = (hidden,)
    expected["model.norm.weight"] = (hidden,)
    for name, shape in expected.items():
        if name not in tensors:
            raise ModelError(f"{path}: weights have no tensor {name}, which config.json promises")
        if tensors[name][1] != shape:
            raise ModelError(
                f"{path}: tensor {name} is {tensors[name][1]}, config.json says {shape}"
            )


def _check_tokenizer(path: Path) -> None:
    kinds = (["tokenizer.json"], ["vocab.json", "merges.txt"], ["tokenizer.model"])
    if not any(all((path / f).is_file() for f in kind) for kind in kinds):
        raise ModelError(
            f"{path}: has no tokenizer (tokenizer.json); copy it from the original model"
        )
    in_file = any((path / f).is_file() for f in ("chat_template.jinja", "chat_template.json"))
    config = path / "tokenizer_config.json"
    if not in_file and not (config.is_file() and _read_json(config).get("chat_template")):
        raise ModelError(
            f"{path}: tokenizer has no chat template; use the instruct version of the model"
        )


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ModelError(
            f"{path.parent}: has no {path.name}, so it is not a Hugging Face model folder"
        )
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: cannot be read as JSON ({error})") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path}: must hold a JSON object, not {type(value).__name__}")
    return value
