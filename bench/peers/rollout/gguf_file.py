"""A Llama folder as a bfloat16 GGUF file without a tokenizer: the same numbers for llama.cpp."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from gguf import MODEL_ARCH, GGMLQuantizationType, GGUFWriter, get_tensor_name_map
from safetensors.torch import load_file
from torch import Tensor


def write_gguf(folder: Path, target: Path, context: int) -> None:
    """Matrices stay bfloat16 bit by bit.

    The norms, vectors, become float32 as llama.cpp wants them.
    """
    config = json.loads((folder / "config.json").read_text())
    heads = config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads") or heads
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    layers = config["num_hidden_layers"]
    theta = (config.get("rope_parameters") or config).get("rope_theta", 10000.0)
    writer = GGUFWriter(target, "llama")
    writer.add_context_length(context)
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(layers)
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(theta)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("none")
    names = get_tensor_name_map(MODEL_ARCH.LLAMA, layers)
    for path in sorted(folder.glob("*.safetensors")):
        for name, tensor in load_file(path).items():
            renamed = names.get_name(name, try_suffixes=(".weight",))
            if renamed is None:
                raise ValueError(f"{path}: GGUF's Llama has no place for {name!r}")
            if name.endswith("q_proj.weight"):
                tensor = interleaved(tensor, heads)
            elif name.endswith("k_proj.weight"):
                tensor = interleaved(tensor, kv_heads)
            _add(writer, renamed, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def interleaved(weight: Tensor, heads: int) -> Tensor:
    """Rows of each head from halves (0 … D/2-1, D/2 … D-1) to pairs.

    Pairs are what llama.cpp's rotary code turns.
    """
    rows, columns = weight.shape
    halves = weight.view(heads, 2, rows // heads // 2, columns)
    return halves.transpose(1, 2).reshape(rows, columns)


def _add(writer: GGUFWriter, name: str, tensor: Tensor) -> None:
    if tensor.ndim == 1:
        writer.add_tensor(name, tensor.float().numpy())
        return
    data = tensor.to(torch.bfloat16).contiguous().view(torch.uint16).numpy()
    # raw_dtype reads the shape in bytes
    writer.add_tensor(name, data.view(np.uint8), raw_dtype=GGMLQuantizationType.BF16)
