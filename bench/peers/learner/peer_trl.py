"""TRL: `GRPOTrainer.training_step` on given completions, then its optimiser.

Generation and rewards are left out: `_prepare_inputs` hands over rows, token ids and advantages
that are ready. Timed is training_step (its forward with the fused, chunked head, loss, metrics,
accelerate's backward) per micro-batch, and clipping and AdamW at the end. Gradient checkpointing,
on by default in TRL, is off: it would only cost. dtype "bfloat16": the model is loaded in bfloat16;
"autocast": float32 weights under TRL's default, bfloat16 autocast; "float32": neither.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from trl import GRPOConfig, GRPOTrainer

sys.path.append(str(Path(__file__).resolve().parents[3]))  # the checkout, for `bench`

from bench.peers.learner.answer import Clock, answer
from bench.peers.learner.trees import Row, Work


class Given(GRPOTrainer):
    """Takes its completions from the caller."""

    def _prepare_inputs(self, generation_batch: Any) -> Any:
        return generation_batch


class Peer:
    def __init__(self, settings: dict[str, Any]):
        torch.set_num_threads(settings["threads"])
        self.micro, how = settings["micro"], settings["dtype"]
        args = GRPOConfig(
            output_dir=tempfile.mkdtemp(), use_cpu=True, bf16=how == "autocast", report_to="none",
            per_device_train_batch_size=self.micro, num_generations=2, generation_batch_size=2 * self.micro,
            gradient_checkpointing=False, learning_rate=1e-6, beta=0.0, temperature=1.0, loss_type="dapo",
        )  # fmt: skip
        model = AutoModelForCausalLM.from_pretrained(
            settings["model"], dtype=torch.bfloat16 if how == "bfloat16" else torch.float32
        )
        words = Tokenizer(
            WordLevel({"a": 0, "<pad>": 1}, unk_token="a")
        )  # the constructor asks for one
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=words, pad_token="<pad>", eos_token="<pad>"
        )
        self.trainer = Given(
            model=model, reward_funcs=lambda completions, **_: [0.0] * len(completions), args=args,
            train_dataset=Dataset.from_dict({"prompt": ["a"] * 8}), processing_class=tokenizer,
        )  # fmt: skip
        self.optimizer = torch.optim.AdamW(
            model.parameters(), lr=1e-6, weight_decay=0.0, fused=True
        )
        model.train()

    def step(self, work: dict[str, Any], rows: list[int]) -> dict[str, Any]:
        w, clock = Work.of(work), Clock()
        chosen = [w.rows()[i] for i in rows]
        parts = [chosen[i : i + self.micro] for i in range(0, len(chosen), self.micro)]
        trainer = self.trainer
        trainer.current_gradient_accumulation_steps = len(parts)
        for part in parts:
            trainer.training_step(trainer.model, self.inputs(part, w.trained_tokens()), None)
        wall, cpu = clock()
        torch.nn.utils.clip_grad_norm_(trainer.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        update = clock()
        return {
            "wall": wall, "cpu": cpu, "update_wall": update[0], "update_cpu": update[1],
            "tokens": sum(len(r.prompt) + len(r.response) for r in chosen),
        }  # fmt: skip

    def inputs(self, rows: list[Row], tokens: int) -> dict[str, torch.Tensor]:
        prompt, response = (torch.tensor([r[i] for r in rows]) for i in (0, 1))
        return {
            "prompt_ids": prompt, "prompt_mask": torch.ones_like(prompt),
            "completion_ids": response, "completion_mask": torch.ones_like(response),
            "advantages": torch.tensor([r.advantage for r in rows]), "num_items_in_batch": torch.tensor(tokens),
        }  # fmt: skip


def make(settings: dict[str, Any]):
    peer = Peer(settings)
    return lambda do, work, rows, **_: peer.step(work, rows)


if __name__ == "__main__":
    answer(make)
