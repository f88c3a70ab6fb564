"""Cold start: teach the tiny policy its protocol from synthetic traces (`appo sft tiny`).

Plain supervised learning.
"""

from __future__ import annotations

import itertools
import math
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from appo.data.prompts import PromptBuilder
from appo.data.tasks import build_tasks
from appo.models import tiny
from appo.types import Task


@dataclass(frozen=True)
class SftSettings:
    """steps × batch traces; about 40 tokens a trace."""

    steps: int = 800
    batch: int = 64
    lr: float = 3e-3
    warmup: int = 50
    seed: int = 0
    right: float = tiny.TraceMix.right
    wrong: float = tiny.TraceMix.wrong


def traces(
    settings: SftSettings, params: dict[str, Any]
) -> Iterator[tuple[Task, list[tuple[str, bool]]]]:
    """Endless (task, spans) of the arithmetic task's training split."""
    rng = np.random.Generator(np.random.Philox(settings.seed))
    mix = tiny.TraceMix(settings.right, settings.wrong)
    tasks = build_tasks(
        "arithmetic", split="train", seed=settings.seed, size=None, params=params, tools=("python",)
    )
    for i in itertools.count():
        task = tasks[i]
        question = task.messages[-1]["content"]
        found = re.search(r"\d[\d+*\-]*", question)
        assert found is not None, question
        yield task, tiny.trace(found.group(), int(task.answer), rng, mix)


def run_sft(
    output: Path,
    settings: SftSettings,
    params: dict[str, Any],
    *,
    report: Callable[[int, float, float], None] = lambda step, loss, tokens_per_s: None,
) -> dict[str, float]:
    """Train tokenizer and model, write a Hugging Face folder to `output`.

    → final loss, tokens, seconds.
    """
    sample = [f"{t.messages[-1]['content']} {''.join(s for s, _ in spans)}"
              for t, spans in itertools.islice(traces(settings, params), 4000)]  # fmt: skip
    tokenizer = tiny.train_tokenizer(iter(sample))
    model = tiny.new_model(settings.seed, len(tokenizer))
    builder = PromptBuilder(tokenizer, system="", example=False)
    optimiser = torch.optim.AdamW(model.parameters(), lr=settings.lr, weight_decay=0.01)
    source, begin, seen, loss_mean = traces(settings, params), time.perf_counter(), 0, math.nan
    for step in range(settings.steps):
        rows = [tiny.encode_trace(tokenizer, builder.ids(t), spans)
                for t, spans in itertools.islice(source, settings.batch)]  # fmt: skip
        ids, labels = _collate(rows, tokenizer.pad_token_id)
        for group in optimiser.param_groups:
            group["lr"] = settings.lr * _schedule(step, settings)
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        value = float(loss.detach())
        loss_mean = value if math.isnan(loss_mean) else 0.95 * loss_mean + 0.05 * value
        seen += int((labels != -100).sum())
        report(step + 1, loss_mean, ids.numel() * (step + 1) / (time.perf_counter() - begin))
    tiny.save(model, tokenizer, output)
    return {"loss": loss_mean, "tokens": seen, "seconds": time.perf_counter() - begin}


def _schedule(step: int, s: SftSettings) -> float:
    """Linear warm-up, then cosine to a tenth."""
    if step < s.warmup:
        return (step + 1) / s.warmup
    done = (step - s.warmup) / max(1, s.steps - s.warmup)
    return 0.1 + 0.45 * (1 + math.cos(math.pi * done))


def _collate(rows: list[tuple[list[int], list[bool]]], pad: int) -> tuple[Tensor, Tensor]:
    """Right-padded ids[B,L] and labels[B,L] (-100 where not learned)."""
    length = max(len(ids) for ids, _ in rows)
    ids = torch.full((len(rows), length), pad)
    labels = torch.full((len(rows), length), -100)
    for i, (row, learned) in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
        labels[i, : len(row)] = torch.where(torch.tensor(learned), torch.tensor(row), -100)
    return ids, labels
