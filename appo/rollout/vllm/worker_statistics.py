"""Exact statistics out of vLLM's worker.

What each token was drawn from, and what given tokens would have cost.

vLLM reports the log-prob of a token, not the entropy of its distribution, and scores prompts at
temperature 1 only. Both are one pass over logits that its worker has in hand. Nothing here imports
vLLM: `worker` plugs it in.

A request takes part if its SamplingParams carry extra_args={"appo": key} (and "appo_score":
temperature to be scored).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from appo.errors import EngineError

KEY, SCORE = "appo", "appo_score"
ROWS = 32  # rows of logits at a time: two float32 copies of a 150k vocabulary are 38 MB

Piece = tuple[int, list[float], list[float]]  # first row, log-probs, entropies

# By key; in the worker's process. A request that is cancelled is taken too, so nothing stays
# behind.
_sampled: dict[str, dict[int, float]] = {}
_scored: dict[str, list[Piece]] = {}


def entropy(logits: Tensor, inv_temp: Tensor) -> Tensor:
    """Entropy in nats of softmax(logits[n, V] · inv_temp[n, 1]), float32 [n]."""
    log_p = torch.log_softmax(logits.float() * inv_temp, dim=-1)
    # A token outside the support has log p = -inf and p·log p = 0, not NaN.
    return -(log_p.exp() * log_p.clamp(min=-1e30)).sum(-1)


class SampledEntropies:
    """The batch as a logits processor sees it.

    Which row is which request, and at which temperature it draws.

    Entropies are filed under the number of tokens already drawn. A prefill in several parts, or one
    that is done again after a preemption, shows rows whose draw is thrown away; the row that counts
    comes last and overwrites them.
    """

    def __init__(self) -> None:
        self.rows: dict[int, tuple[str, float, Sequence[int]]] = {}

    def update(
        self, removed: Iterable[int], added: Iterable[Any], moved: Iterable[tuple[int, int, bool]]
    ) -> None:
        """Follow the rows of the batch.

        removed   rows
        added     (row, SamplingParams, prompt ids, live list of sampled ids)
        moved     (a, b, swap)
        """
        for row in removed:
            self.rows.pop(row, None)
        for row, params, _, sampled in added:
            self.rows.pop(row, None)
            key = (params.extra_args or {}).get(KEY)
            if key is not None and SCORE not in params.extra_args:
                self.rows[row] = (key, params.temperature or 1.0, sampled)
        for a, b, swap in moved:
            first, second = self.rows.pop(a, None), self.rows.pop(b, None)
            if first is not None:
                self.rows[b] = first
            if swap and second is not None:
                self.rows[a] = second

    def see(self, logits: Tensor) -> None:
        """File the entropy of every row that takes part; logits[batch, V] are not changed."""
        rows = sorted(self.rows)
        for i in range(0, len(rows), ROWS):
            part = rows[i : i + ROWS]
            temp = torch.tensor([[self.rows[r][1]] for r in part], dtype=torch.float32)
            values = entropy(logits[part], (1.0 / temp).to(logits.device)).tolist()
            for row, value in zip(part, values):
                key, _, sampled = self.rows[row]
                _sampled.setdefault(key, {})[len(sampled)] = value


def see_prompts(runner: Any, hidden: Tensor, scheduled: dict[str, int]) -> None:
    """File statistics of the prompt rows that this forward has run, of requests to be scored.

    runner: vLLM's model runner · hidden[rows, H]: the last hidden states of the whole batch ·
    scheduled: rows by request.
    """
    for req_id, count in scheduled.items():
        request = runner.requests[req_id]
        extra = getattr(request.sampling_params, "extra_args", None) or {}
        if SCORE not in extra:
            continue
        ids, first = request.prompt_token_ids, request.num_computed_tokens
        count = min(count, len(ids) - 1 - first)  # the last token predicts nothing that is given
        offset = int(runner.query_start_loc.np[runner.input_batch.req_id_to_index[req_id]])
        for i in range(0, count, ROWS):
            n = min(ROWS, count - i)
            logits = runner.model.compute_logits(hidden[offset + i : offset + i + n]).float()
            inv_temp = logits.new_full((n, 1), 1.0 / extra[SCORE])
            start = first + i
            wanted = torch.tensor(ids[start + 1 : start + 1 + n], device=logits.device)
            logp = torch.log_softmax(logits * inv_temp, dim=-1).gather(1, wanted[:, None])[:, 0]
            piece = (start, logp.tolist(), entropy(logits, inv_temp).tolist())
            _scored.setdefault(extra[KEY], []).append(piece)


def take_sampled(keys: Iterable[str]) -> dict[str, dict[int, float]]:
    """Entropies by number of tokens drawn before, of these requests; they are forgotten here."""
    return {key: _sampled.pop(key) for key in keys if key in _sampled}


def take_scored(keys: Iterable[str]) -> dict[str, list[Piece]]:
    """(first row, log-probs, entropies) pieces of these requests; they are forgotten here."""
    return {key: _scored.pop(key) for key in keys if key in _scored}


def attach(runner: Any) -> None:
    """Have `see_prompts` called with the hidden states of every forward.

    Raises EngineError on an unknown runner.
    """
    hook = "_get_prompt_logprobs_dict"
    lacks = [
        name
        for name in (hook, "requests", "query_start_loc", "input_batch", "model")
        if not hasattr(runner, name)
    ]
    if lacks:
        raise EngineError(
            f"vLLM's {type(runner).__name__} has no {', '.join(lacks)}: exact scoring does not know this version; set "
            "VLLM_USE_V2_MODEL_RUNNER=0, use a tested vLLM, or statistics='full' (slow) or 'top' (approximate entropy)"
        )
    original = getattr(runner, hook)

    def with_statistics(hidden_states: Tensor, num_scheduled_tokens: dict[str, int]) -> Any:
        see_prompts(runner, hidden_states, num_scheduled_tokens)
        return original(hidden_states, num_scheduled_tokens)

    setattr(runner, hook, with_statistics)
