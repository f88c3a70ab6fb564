"""Hugging Face `generate` in turns, as tree training is commonly written.

Draw a batch until all its rows have stopped, run the tools of those that called one, submit these
again with the longer context; then the branches in the same way.

    "cache": false   every submission prefills its whole context again (what the authors' own code
                     does)
    "cache": true    the KV cache of each row is cropped and copied into the batch of its next turn
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)

sys.path.append(str(Path(__file__).resolve().parents[3]))  # the checkout, for `bench`

from bench.peers.rollout.grow import Drawn, Fork
from bench.peers.rollout.serve import serve
from bench.peers.rollout.workload import Workload


class LastScores(LogitsProcessor):
    """Keeps the scores [B, V] of the step that is being drawn."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.scores = scores
        return scores


class DrawnEnough(StoppingCriteria):
    """Row i stops at `lengths[i]` columns.

    `generate` runs it on as padding until the last row stops.

    Asked after every step, it takes down the log-probs of what was drawn, so that no step's logits
    are kept.
    """

    def __init__(self, lengths: Sequence[int], last: LastScores):
        self.lengths, self.last = torch.tensor(lengths), last
        self.logprobs: list[Tensor] = []  # [B, 1] a step

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        logits = self.last.scores
        drawn = logits.gather(1, input_ids[:, -1:])
        self.logprobs.append(drawn - logits.logsumexp(1, keepdim=True))
        return input_ids.shape[1] >= self.lengths


@dataclass
class Kept:
    """Where the KV of a sequence lies.

    Columns first … first + count - 1 of a row of a batch's cache.
    """

    cache: DynamicCache
    row: int
    first: int
    count: int


def gathered(parts: Sequence[Kept]) -> DynamicCache:
    """A batch in which the KV of each part ends at the last column (a copy)."""
    width = max(part.count for part in parts)
    cache = DynamicCache()
    for layer in range(len(parts[0].cache.layers)):
        columns = []
        for name in ("keys", "values"):
            old = [getattr(part.cache.layers[layer], name) for part in parts]
            new = old[0].new_zeros(len(parts), old[0].shape[1], width, old[0].shape[3])
            for i, (part, tensor) in enumerate(zip(parts, old)):
                rows = tensor[part.row, :, part.first : part.first + part.count]
                new[i, :, width - part.count :] = rows
            columns.append(new)
        cache.update(*columns, layer)
    return cache


class Turns:
    """A peer of `serve`.

    rows: rows of the model run, padding included, counted at the embedding.
    """

    computes = "log-prob of every drawn token"
    version = f"transformers {transformers.__version__}"

    def __init__(self, model: Any, keep_cache: bool):
        self.model, self.keep_cache, self.rows = model, keep_cache, 0
        self.drawn: list[Drawn] = []  # by rollout
        self.tokens: dict[int | None, list[int]] = {}  # by rollout, None: the prompt
        self.kept: dict[int | None, Kept] = {}
        model.get_input_embeddings().register_forward_pre_hook(self._count)

    def _count(self, module: Any, args: tuple[Tensor, ...]) -> None:
        self.rows += args[0].numel()

    # -- the tree ----------------------------------------------------------------------------------

    @torch.inference_mode()
    def grow(self, work: Workload) -> list[Drawn]:
        lines = work.rollouts()
        self.drawn = [Drawn() for _ in lines]
        self.tokens, self.kept = {None: work.prompt_ids()}, {}
        if self.keep_cache:
            self._prefill(None)
        for level in (
            [i for i, line in enumerate(lines) if line.parent is None],
            [i for i, line in enumerate(lines) if line.parent is not None],
        ):
            for i in level:
                self._fork(i, lines[i].parent, lines[i].at)
            self._turn({i: lines[i].parts[0] for i in level})
            callers = [i for i in level if lines[i].cut]
            if callers:
                time.sleep(work.wait_s)  # the tools of a turn run side by side
                for i in callers:
                    self.tokens[i] += lines[i].result
                self._turn({i: lines[i].parts[1] for i in callers})
        return self.drawn

    def _fork(self, child: int, parent: int | None, at: int) -> None:
        self.tokens[child] = self.tokens[parent][:at]
        if self.keep_cache:
            k = self.kept[parent]
            self.kept[child] = Kept(k.cache, k.row, k.first, at - 1)

    def _prefill(self, index: int | None) -> None:
        """Compute all but the last token of a sequence."""
        ids = torch.tensor([self.tokens[index][:-1]])
        cache = DynamicCache()
        self.model(ids, past_key_values=cache, logits_to_keep=1)
        self.kept[index] = Kept(cache, 0, 0, ids.shape[1])

    def _turn(self, counts: dict[int, int]) -> None:
        """Draw counts[i] tokens on sequence i, all in one batch."""
        batch = list(counts)
        lengths = [len(self.tokens[i]) for i in batch]
        width = max(lengths)
        ids = torch.zeros(len(batch), width, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, (i, length) in enumerate(zip(batch, lengths)):
            ids[row, width - length :] = torch.tensor(self.tokens[i])
            mask[row, width - length :] = 1
        cache = gathered([self.kept[i] for i in batch]) if self.keep_cache else None
        last = LastScores()
        enough = DrawnEnough([width + counts[i] for i in batch], last)
        out = self.model.generate(
            ids,
            attention_mask=mask,
            past_key_values=cache,
            max_new_tokens=max(counts.values()),
            logits_processor=LogitsProcessorList([last]),
            stopping_criteria=StoppingCriteriaList([enough]),
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            return_dict_in_generate=True,
        )
        logprobs = torch.cat(enough.logprobs, 1)  # [B, steps]
        for row, (i, count) in enumerate(counts.items()):
            new = out.sequences[row, width : width + count].tolist()
            self.tokens[i] += new
            self.drawn[i].tokens += new
            self.drawn[i].logprobs += logprobs[row, :count].tolist()
            if self.keep_cache:
                # The last drawn token has not been run.
                first = width - lengths[row]
                self.kept[i] = Kept(out.past_key_values, row, first, lengths[row] + count - 1)

    # -- a single fork -----------------------------------------------------------------------------

    @torch.inference_mode()
    def trunk(self, ids: Sequence[int]) -> float:
        self.tokens, self.kept = {None: list(ids)}, {}
        begin = time.perf_counter()
        self._prefill(None)
        return (time.perf_counter() - begin) * 1e3

    @torch.inference_mode()
    def fork(self) -> Fork:
        """A copy of the cache and a step on it; without the cache everything again."""
        rows, begin = self.rows, time.perf_counter()
        if self.keep_cache:
            cache, ids = gathered([self.kept[None]]), self.tokens[None][-1:]
        else:
            cache, ids = DynamicCache(), self.tokens[None]
        call = time.perf_counter() - begin
        out = self.model(torch.tensor([ids]), past_key_values=cache, logits_to_keep=1)
        torch.multinomial(out.logits[:, -1].float().softmax(-1), 1)
        first = time.perf_counter() - begin
        return Fork(call * 1e6 if self.keep_cache else None, first * 1e3, self.rows - rows)


def make(settings: dict[str, Any]) -> Turns:
    torch.set_num_threads(settings["threads"])
    model = AutoModelForCausalLM.from_pretrained(settings["model"], dtype=torch.bfloat16).eval()
    model.generation_config.eos_token_id = None  # every token is drawn
    model.generation_config.pad_token_id = 0
    return Turns(model, settings["cache"])


if __name__ == "__main__":
    serve(make)
