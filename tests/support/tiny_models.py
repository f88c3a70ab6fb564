"""Random models of a few thousand weights, and a dense reference forward.

They are saved as Hugging Face folders.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3Config

VOCAB = 97
PROMPT = np.random.default_rng(5).integers(0, VOCAB, 40).tolist()
SHAPE = dict(
    hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
    vocab_size=VOCAB, max_position_embeddings=256, initializer_range=0.3, bos_token_id=0, eos_token_id=1,
)  # fmt: skip
LLAMA3 = dict(
    rope_type="llama3", rope_theta=1e4, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
    original_max_position_embeddings=64,
)  # fmt: skip
CONFIGS = {
    "llama": (LlamaConfig, dict(tie_word_embeddings=False)),
    "llama-tied-mqa": (LlamaConfig, dict(tie_word_embeddings=True, num_key_value_heads=1)),
    "llama-biased": (LlamaConfig, dict(attention_bias=True, mlp_bias=True)),
    "llama-llama3": (LlamaConfig, dict(rope_parameters=LLAMA3)),
    "llama-linear": (LlamaConfig, dict(rope_parameters=dict(rope_type="linear", rope_theta=1e4, factor=4.0))),
    "qwen2": (Qwen2Config, dict(tie_word_embeddings=True)),
    "qwen2-untied-mha": (Qwen2Config, dict(tie_word_embeddings=False, num_key_value_heads=4)),
    "qwen3": (Qwen3Config, dict(head_dim=16, tie_word_embeddings=True)),
    "qwen3-untied": (Qwen3Config, dict(head_dim=8, tie_word_embeddings=False)),
}  # fmt: skip


def build(name: str, folder: Path, seed: int = 0, **shape):
    """The transformers model called `name`, float32, also saved in `folder`.

    shape: overrides of its config.
    """
    config, extra = CONFIGS[name]
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config(**{**SHAPE, **extra, **shape})).float().eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 1:  # norms and biases away from 1 and 0, so that a swap would show
                weight.add_(0.2 * torch.randn_like(weight))
    model.save_pretrained(folder)
    return model


@torch.no_grad()
def dense(model, ids: list[int], temperature: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Logprob of tokens 1 … and entropy of the distributions they come from.

    One flat forward, float64 statistics.
    """
    logp = torch.log_softmax(
        model(torch.tensor([ids])).logits[0, :-1].double() / temperature, dim=-1
    )
    drawn = logp.gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
    return drawn.numpy(), -(logp.exp() * logp).sum(-1).numpy()


def finish(engine) -> dict:
    """Step until nothing runs: {handle: SequenceStopped}."""
    events = {}
    while engine.has_work():
        events.update({event.seq: event for event in engine.step()})
    return events
