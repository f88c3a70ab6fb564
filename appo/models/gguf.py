"""One llama-family GGUF file → one Hugging Face model folder.

Quantised GGUF files are sometimes the only copy of a model that a machine without a model hub can
get. The conversion undoes what the GGUF writer did: blocks are dequantised, the rotary permutation
of the q and k rows is reversed, and the byte-level BPE tokenizer is rebuilt from the vocabulary and
the merges in the file's metadata. Only what was verified is supported: architecture `llama`,
tokenizer `gpt2` with the `smollm` pre-tokenizer.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from appo.errors import ModelError

LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
TOP_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
CONTROL = 3  # GGUF token type of special tokens


def convert_llama_gguf(source: Path, folder: Path) -> None:
    """Write the model in `source` into the existing `folder`.

    Written are config, weights (bf16 safetensors), tokenizer and chat template.

    Raises ModelError when the file cannot be read or is of a kind that was never verified.
    """
    from gguf import GGUFReader  # the PyPI package; absolute imports keep it apart from this module

    try:
        reader = GGUFReader(str(source))
        meta = {key: field.contents() for key, field in reader.fields.items()}
    except (ValueError, OSError, IndexError, KeyError) as error:
        raise ModelError(
            f"{source}: not a readable GGUF file ({error}); download it again"
        ) from error

    kind = (
        meta.get("general.architecture"),
        meta.get("tokenizer.ggml.model"),
        meta.get("tokenizer.ggml.pre"),
    )
    if kind != ("llama", "gpt2", "smollm"):
        raise ModelError(
            f"{source}: architecture/tokenizer/pre-tokenizer {kind} cannot be converted; only "
            "('llama', 'gpt2', 'smollm') was verified. Use a Hugging Face folder of the model instead"
        )

    config = _config(meta, tied=all(t.name != "output.weight" for t in reader.tensors))
    _write_weights(reader.tensors, config, folder / "model.safetensors")
    _write_json(folder / "config.json", config)
    special = {k: config[k] for k in ("bos_token_id", "eos_token_id", "pad_token_id")}
    _write_json(folder / "generation_config.json", {**special, "_from_model_config": True})
    _write_tokenizer(meta, folder)


def _config(meta: dict[str, Any], *, tied: bool) -> dict[str, Any]:
    heads = int(meta["llama.attention.head_count"])
    hidden = int(meta["llama.embedding_length"])
    theta = float(meta["llama.rope.freq_base"])
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": int(meta["llama.vocab_size"]),
        "hidden_size": hidden,
        "intermediate_size": int(meta["llama.feed_forward_length"]),
        "num_hidden_layers": int(meta["llama.block_count"]),
        "num_attention_heads": heads,
        "num_key_value_heads": int(meta["llama.attention.head_count_kv"]),
        "head_dim": hidden // heads,
        "max_position_embeddings": int(meta["llama.context_length"]),
        # float32 in the file: 9.99999975e-06 was 1e-05 before
        "rms_norm_eps": float(f"{meta['llama.attention.layer_norm_rms_epsilon']:.6g}"),
        # both spellings: transformers 4 reads `rope_theta`, transformers 5 `rope_parameters`
        "rope_theta": theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": theta},
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": tied,
        "bos_token_id": int(meta["tokenizer.ggml.bos_token_id"]),
        "eos_token_id": int(meta["tokenizer.ggml.eos_token_id"]),
        "pad_token_id": int(meta["tokenizer.ggml.padding_token_id"]),
        "dtype": "bfloat16",
        "torch_dtype": "bfloat16",
    }


def _write_weights(tensors: Any, config: dict[str, Any], path: Path) -> None:
    import torch
    from gguf.quants import dequantize
    from safetensors.torch import save_file

    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    state: dict[str, torch.Tensor] = {}
    for tensor in tensors:
        value = dequantize(tensor.data, tensor.tensor_type)  # [rows, columns] float32
        name = TOP_NAMES.get(tensor.name)
        if name is None:
            _, layer, part, _ = tensor.name.split(".")
            name = f"model.layers.{layer}.{LAYER_NAMES[part]}.weight"
            if part in heads:
                value = unpermute_rotary(value, heads[part])
        state[name] = torch.from_numpy(np.array(value, np.float32)).to(torch.bfloat16)
    save_file(state, str(path), metadata={"format": "pt"})


def unpermute_rotary(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a q or k projection from GGUF order (pairs interleaved) to Hugging Face order.

    halves. [H*D, in]
    """
    rows, columns = weight.shape
    pairs = weight.reshape(heads, rows // heads // 2, 2, columns)  # [H, D/2, 2, in]
    return pairs.swapaxes(1, 2).reshape(rows, columns)


def _write_tokenizer(meta: dict[str, Any], folder: Path) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens: list[str] = meta["tokenizer.ggml.tokens"]
    merges = [tuple(line.split(" ")) for line in meta["tokenizer.ggml.merges"]]
    bpe = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=merges))
    # The order matters: digits are split one by one before the byte-level regex sees them.
    digits = pre_tokenizers.Digits(individual_digits=True)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    bpe.decoder = decoders.ByteLevel()
    types = meta["tokenizer.ggml.token_type"]
    control = [t for t, kind in zip(tokens, types, strict=True) if kind == CONTROL]
    bpe.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in control])
    bpe.save(str(folder / "tokenizer.json"))

    def named(key: str) -> str:
        return tokens[int(meta[f"tokenizer.ggml.{key}_token_id"])]

    _write_json(
        folder / "tokenizer_config.json",
        {
            # Not GPT2Tokenizer: transformers 5 would rebuild that class without the digit splitter.
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": named("bos"),
            "eos_token": named("eos"),
            "pad_token": named("padding"),
            "unk_token": named("unknown"),
            "model_max_length": int(meta["llama.context_length"]),
            "clean_up_tokenization_spaces": False,
            "chat_template": meta["tokenizer.chat_template"],
        },
    )


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
