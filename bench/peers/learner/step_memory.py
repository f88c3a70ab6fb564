"""Resident memory of one forward and backward, for vocabularies and stream lengths."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from appo.algo.objective import make_objective
from appo.algo.resolve import resolve
from appo.config import AlgoConfig
from appo.learner.policy import Policy, load_model

sys.path.append(str(Path(__file__).resolve().parents[3]))  # the checkout, for `bench`

from bench.common import resident_bytes
from bench.peers.learner.trees import Work, batches

MIB = 2**20


def peak(vocab: int, response: int, layers: int = 4) -> tuple[int, float] | None:
    """(tokens, MiB) beyond weights and gradients of a random model in the shape of SmolLM2-135M.

    In a fresh process.

    The embedding, which is the head too, is frozen: its gradient is V × H however the rest is
    computed.
    """
    torch.set_num_threads(1)
    config = LlamaConfig(
        hidden_size=576, intermediate_size=1536, num_hidden_layers=layers, num_attention_heads=9,
        num_key_value_heads=3, vocab_size=vocab, tie_word_embeddings=True, max_position_embeddings=16384,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        LlamaForCausalLM(config).bfloat16().save_pretrained(folder)
        policy = Policy(load_model(folder, torch.bfloat16))
    policy.lm.lm_head.weight.requires_grad_(False)
    (stream,), counts = batches(Work("", 128, response, roots=2, vocab=vocab), 1 << 20)
    objective = make_objective(resolve(AlgoConfig()), version=lambda: 0)

    def step() -> None:
        objective(policy(stream), stream, counts)[0].backward()

    step()  # gradients are there from now on
    found = resident_bytes(step)
    return None if found is None else (stream.unique_tokens, found.peak / MIB)
