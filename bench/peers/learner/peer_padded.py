"""Padded rows as verl-style trainers run them.

[prompt | response] right-padded to the longest, forward and backward over all of it in
micro-batches of rows, a log-softmax over the whole vocabulary of every response token, branches
included.

Hugging Face's model with SDPA. dtype "bfloat16": bfloat16 weights, float32 master copies, one fused
AdamW; "float32": all in float32. Tokens with advantage 0 are masked out of the loss after they were
computed, as there.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

sys.path.append(str(Path(__file__).resolve().parents[3]))  # the checkout, for `bench`

from bench.peers.learner.answer import Clock, answer
from bench.peers.learner.trees import Row, Work


class Padded:
    def __init__(self, settings: dict[str, Any]):
        torch.set_num_threads(settings["threads"])
        dtype = getattr(torch, settings["dtype"])
        self.model = AutoModelForCausalLM.from_pretrained(
            settings["model"], dtype=dtype, attn_implementation="sdpa", local_files_only=True
        ).train()
        self.weights = list(self.model.parameters())
        self.masters = [p.detach().float().clone() if dtype != torch.float32 else p for p in self.weights]  # fmt: skip
        self.optimizer = torch.optim.AdamW(self.masters, lr=1e-6, weight_decay=0.0, fused=True)
        self.micro = settings["micro"]

    def step(self, work: dict[str, Any], rows: list[int]) -> dict[str, Any]:
        w, clock = Work.of(work), Clock()
        chosen = [w.rows()[i] for i in rows]
        tokens = w.trained_tokens()
        for i in range(0, len(chosen), self.micro):
            self.backward(chosen[i : i + self.micro], tokens)
        wall, cpu = clock()
        self.update()
        update = clock()
        return {
            "wall": wall, "cpu": cpu, "update_wall": update[0], "update_cpu": update[1],
            "tokens": sum(len(r.prompt) + len(r.response) for r in chosen),
        }  # fmt: skip

    def backward(self, rows: list[Row], tokens: int) -> None:
        longest = max(len(r.response) for r in rows)
        ids = torch.tensor(
            [r.prompt + r.response + [0] * (longest - len(r.response)) for r in rows]
        )
        mask = torch.tensor([[1.0] * len(r.response) + [0.0] * (longest - len(r.response)) for r in rows])  # fmt: skip
        advantage = torch.tensor([[r.advantage] for r in rows])
        first = ids.shape[1] - longest
        # Right padding behind a causal mask is never seen: no attention mask, SDPA's fast path.
        logits = self.model(ids, use_cache=False, logits_to_keep=longest + 1).logits[:, :-1]
        logp = logits.float().log_softmax(-1).gather(2, ids[:, first:, None])[..., 0]
        ratio = (logp - logp.detach()).exp()
        loss = -torch.min(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
        ((loss * mask).sum() / tokens).backward()

    def update(self) -> None:
        for master, p in zip(self.masters, self.weights):
            master.grad = p.grad.float() if p.grad is not None else None
        torch.nn.utils.clip_grad_norm_(self.masters, 1.0)
        self.optimizer.step()
        with torch.no_grad():
            for master, p in zip(self.masters, self.weights):
                p.copy_(master)
                p.grad = None


def make(settings: dict[str, Any]):
    peer = Padded(settings)
    return lambda do, work, rows, **_: peer.step(work, rows)


if __name__ == "__main__":
    answer(make)
