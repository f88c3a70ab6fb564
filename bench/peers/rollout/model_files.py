"""The weights that all engines read.

A Hugging Face folder and, for llama.cpp, the same numbers as a GGUF file.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from appo.models.resolve import default_cache

sys.path.append(str(Path(__file__).resolve().parents[3]))  # the checkout, for `bench`

from bench.peers.rollout.gguf_file import write_gguf

SMOLLM2 = "HuggingFaceTB--SmolLM2-135M-Instruct"


def prepare(scratch: Path, quick: bool, context: int) -> tuple[Path, Path]:
    """(folder, GGUF file) below `scratch`, both for sequences of up to `context` tokens.

    APPO_BENCH_MODEL names a folder of the Llama family; without it the model cache's SmolLM2-135M,
    if it is there, and else random weights in its shape. --quick without the variable: random
    weights, six layers.
    """
    asked = os.environ.get("APPO_BENCH_MODEL")
    cached = default_cache() / "models" / SMOLLM2
    if asked:
        source = Path(asked).expanduser()
    elif not quick and (cached / "model.safetensors").is_file():
        source = cached
    else:
        source = scratch / "random"
        random_model(source, 6 if quick else 30)
    folder = scratch / "model"
    with_context(source, folder, context)
    gguf = scratch / "model.gguf"
    write_gguf(folder, gguf, context)
    return folder, gguf


def random_model(folder: Path, layers: int) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=576, intermediate_size=1536, num_hidden_layers=layers, num_attention_heads=9,
        num_key_value_heads=3, vocab_size=49152, tie_word_embeddings=True, max_position_embeddings=8192,
    )  # fmt: skip
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)


def with_context(source: Path, folder: Path, context: int) -> None:
    """The same weights with at least `context` positions.

    What is drawn beyond the model's own is for timing only.
    """
    folder.mkdir()
    for path in source.glob("*.safetensors*"):
        (folder / path.name).symlink_to(path.resolve())
    config = json.loads((source / "config.json").read_text())
    config["max_position_embeddings"] = max(config["max_position_embeddings"], context)
    (folder / "config.json").write_text(json.dumps(config))


def vocab_of(folder: Path) -> int:
    return int(json.loads((folder / "config.json").read_text())["vocab_size"])
