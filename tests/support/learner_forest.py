"""A tiny model, a few hand-made rollout trees and a loss with everything in it.

For tests of the learner.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from appo.packing.pack import PackedBatch
from appo.types import Counts, Credit, Leaf, Node, RolloutTree, Task

VOCAB = 97


def write_model(path: Path, family: str = "qwen3", tied: bool = True, vocab: int = VOCAB) -> Path:
    torch.manual_seed(1)
    sizes = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    sizes |= {
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": vocab,
        "max_position_embeddings": 256,
    }
    config, cls = {
        "qwen3": (Qwen3Config, Qwen3ForCausalLM),
        "llama": (LlamaConfig, LlamaForCausalLM),
    }[family]
    lm = cls(config(**sizes, tie_word_embeddings=tied, initializer_range=0.1))
    lm.save_pretrained(path)
    (path / "tokenizer.json").write_text("{}")
    return path


def model_node(parent: int, fork_at: int, count: int, seed: int) -> Node:
    rng = np.random.default_rng(seed)
    logp = (-3 - rng.random(count)).tolist()
    return Node(parent, "model", fork_at, rng.integers(0, VOCAB, count).tolist(), logp, logp, 0)


def forest() -> tuple[list[RolloutTree], list[list[Credit]]]:
    """Two prompts with a few rollouts.

    Roots with a tool call, a fork in the middle of a root, a fork of that fork, a second root.
    """
    trees, credits = [], []
    for seed in (0, 100):
        nodes = [Node(None, "prompt", 0, [3 + seed % 7, 5, 7]), model_node(0, 3, 8, seed + 1)]
        nodes += [
            Node(1, "tool", 8, [1, 2, 3]),
            model_node(2, 3, 4, seed + 2),
            model_node(1, 4, 5, seed + 3),
        ]
        nodes += [model_node(4, 2, 4, seed + 4), model_node(0, 3, 9, seed + 5)]
        leaves = [Leaf(3, 0), Leaf(4, 0, 0), Leaf(5, 0, 1), Leaf(6, 1)]
        tree = RolloutTree(Task(f"t{seed}", [], None), nodes, leaves)
        rows = []
        for i in range(4):
            view = tree.trajectory(i)
            advantage = np.random.default_rng(seed + i).normal(size=len(view))
            rows.append(Credit(i, advantage, view.mask.copy(), weight=1.0 + i))
        trees.append(tree)
        credits.append(rows)
    return trees, credits


def counts_of(credits: list[list[Credit]]) -> Counts:
    rows = [c for cs in credits for c in cs]
    return Counts(float(sum(c.loss_mask.sum() for c in rows)), float(len(rows)), float(len(rows)))


def objective(stats, batch: PackedBatch, counts: Counts):
    """A nonlinear loss with everything in it: ratio, advantage, row weight, entropy."""
    row = torch.repeat_interleave(torch.arange(len(batch.rows)), batch.offsets.diff())
    ratio = (stats.logp - batch.behavior_logp).exp()
    loss = (-ratio * batch.advantage - 0.1 * stats.entropy) * batch.weight[row]
    return loss[batch.mask].sum() / counts.tokens, {
        "entropy": (stats.entropy.sum(), batch.mask.sum())
    }


def relative(mine: dict[str, Tensor], reference: dict[str, Tensor]) -> float:
    assert mine.keys() == reference.keys()
    error = sum(float((mine[n].double() - g.double()).square().sum()) for n, g in reference.items())
    return (error / sum(float(g.double().square().sum()) for g in reference.values())) ** 0.5


PROBES = [[1, 2, 3, 4, 5, 6, 7], [11, 12, 13, 14]]


class PlainEngine:
    """A rollout engine of the simplest kind: the plain model.

    `skip` loses the tensor whose name contains it.
    """

    def __init__(self, path: Path, skip: str = "", version_lag: int = 0, stop_early: bool = False):
        self.lm = AutoModelForCausalLM.from_pretrained(path).eval()
        self.own = dict(self.lm.named_parameters())
        self.skip, self.version_lag, self.stop_early = skip, version_lag, stop_early
        self.policy_version = 0
        self.sequences: dict[int, list[int]] = {}

    def load_weights(self, named_tensors, version: int) -> None:
        for name, tensor in named_tensors:
            if self.stop_early:
                return
            if not self.skip or self.skip not in name:
                self.own[name].data.copy_(tensor)
        self.policy_version = version - self.version_lag

    def add_prompt(self, token_ids) -> int:
        self.sequences[len(self.sequences)] = token_ids
        return len(self.sequences) - 1

    def release(self, seq: int) -> None:
        self.sequences[seq] = []

    @torch.no_grad()
    def score(self, seqs, temperature: float = 1.0) -> list:
        out = []
        for seq in seqs:
            ids = torch.tensor([self.sequences[seq]])
            logp = torch.log_softmax(self.lm(ids).logits[0, :-1] / temperature, -1)
            out.append(
                type("Scored", (), {"logprobs": logp.gather(1, ids[0, 1:, None])[:, 0].numpy()})
            )
        return out


class AdapterEngine(PlainEngine):
    """One that applies adapters beside its weights (here: adds them up itself)."""

    accepts_adapters = True

    def load_weights(self, named_tensors, version: int) -> None:
        given = {n: t for n, t in named_tensors if not self.skip or self.skip not in n}
        for name in given:
            if name.endswith(".lora_A") and name[:-1] + "B" in given:
                delta = given[name[:-1] + "B"] @ given[name].float()
                self.own[name.removesuffix("lora_A") + "weight"].data += delta
        self.policy_version = version
