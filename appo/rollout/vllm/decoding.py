"""Requests in flight: from sampling parameters to drawn tokens with their log-probs and entropies."""

from __future__ import annotations

import itertools
import uuid
from collections.abc import Callable
from typing import Any

from appo.errors import EngineError, StaleWeightsError
from appo.rollout.engine import SamplingParams, Stopped
from appo.rollout.seeds import derive_seed
from appo.rollout.vllm.reports import at_temperature, flat_row, logprob_of, top_entropy
from appo.rollout.vllm.sequences import Reason, Run
from appo.rollout.vllm.start import TOP, Api, Statistics
from appo.rollout.vllm.tap import KEY

COUNTERS = (
    "prefill_tokens", "decode_tokens", "scored_tokens", "forks", "prefix_hits_tokens", "steps",
)  # fmt: skip


class Decoder:
    """Drives vLLM's loop. `salt` names the weights: KV computed under another salt is never hit."""

    def __init__(self, api: Api, llm: Any, statistics: Statistics, vocab: int):
        self.api, self.llm, self.core = api, llm, llm.llm_engine
        self.statistics, self.vocab = statistics, vocab
        self.name, self._ids = uuid.uuid4().hex[:8], itertools.count()
        self.salt = ""
        self.runs: dict[str, Run] = {}  # by request id
        self.by_seq: dict[int, Run] = {}
        self.count = dict.fromkeys(COUNTERS, 0)
        if statistics == "exact":
            llm.collective_rpc("appo_attach")

    def key(self) -> str:
        """A request id that no other engine in the worker's process has."""
        return f"{self.name}-{next(self._ids)}"

    def relabel(self, salt: str) -> None:
        """From now on requests belong to these weights. vLLM versions that can note it in their outputs."""
        self.salt = salt
        label = getattr(self.core, "set_weight_version", None)
        if label is not None:
            label(salt)

    def request(self, key: str, tokens: list[int], sampling: Any, salt: str | None = None) -> None:
        prompt = self.api.TokensPrompt(prompt_token_ids=list(tokens), cache_salt=salt or self.salt)
        self.core.add_request(key, prompt, sampling)

    def submit(self, run: Run, seed: int) -> None:
        """Start decoding."""
        self.request(run.key, run.seq.tokens, self._sampling(run, run.params, seed))
        self.runs[run.key] = self.by_seq[run.seq.handle] = run

    def _sampling(self, run: Run, params: SamplingParams, seed: int) -> Any:
        report = {
            "exact": dict(logprobs=0),
            "top": dict(logprobs=TOP),
            "full": dict(logprobs=-1, flat_logprobs=True),
        }
        return self.api.SamplingParams(
            max_tokens=run.end - run.start,
            temperature=params.temperature,
            top_p=params.top_p,
            top_k=params.top_k,
            # One seed per submit: with the line's own, the draws after a tool call would repeat those before it.
            seed=derive_seed(seed, run.start),
            stop_token_ids=sorted(params.stop_token_ids),
            ignore_eos=True,  # only the ids asked for stop it
            detokenize=False,
            output_kind=self.api.DELTA,
            extra_args={KEY: run.key},
            **report[self.statistics],
        )

    def cancel(self, run: Run) -> None:
        """End it without an event and drop what it drew."""
        self.core.abort_request([run.key])
        self._forget(run)
        if self.statistics == "exact":
            self.call("appo_take_drawn", [run.key])
        del run.seq.tokens[run.start :]

    def step(self, other: Callable[[Any], None]) -> list[Stopped]:
        """One step of vLLM; outputs of requests that are no runs go to `other`."""
        stopped: list[tuple[Run, Reason, Any]] = []
        for output in self._advance():
            run = self.runs.get(output.request_id)
            if run is None:
                other(output)
                continue
            reason = self._take(run, output)
            if reason is not None:
                stopped.append((run, reason, output.outputs[0]))
        self.count["steps"] += 1
        self._entropies([run for run, _, _ in stopped])
        for run, _, new in stopped:
            self._check_version(run, new)
        return [
            Stopped(run.seq.handle, run.tokens, run.logprobs, run.entropy, reason, run.version)
            for run, reason, _ in stopped
        ]

    def _advance(self) -> list[Any]:
        try:
            return self.core.step()
        except (
            Exception
        ) as e:  # whatever it was: vLLM's core is gone, what was drawn is still in the sequences
            raise EngineError(
                f"vLLM failed with {len(self.runs)} sequences decoding: {type(e).__name__}: {e}"
            ) from e

    def _take(self, run: Run, output: Any) -> Reason | None:
        """What a step gave one request; → why it stopped, if it did."""
        if not run.counted:
            run.counted, hits = True, int(output.num_cached_tokens or 0)
            self.count["prefix_hits_tokens"] += hits
            self.count["prefill_tokens"] += run.start - hits
        new, reason = output.outputs[0], None
        for i, token in enumerate(new.token_ids):
            self.count["decode_tokens"] += bool(run.tokens)
            reason = run.take(int(token), *self._statistics(new.logprobs, i, int(token)))
            if reason is not None:
                break  # a token beyond the stop was never part of the sequence
        if reason is None:
            if output.finished:
                raise EngineError(
                    f"vLLM ended sequence {run.seq.handle} by itself (finish_reason={new.finish_reason!r}, "
                    f"stop_reason={new.stop_reason!r}); see its log"
                )
            return None
        if not output.finished:
            self.core.abort_request([run.key])
        self._forget(run)
        return reason

    def _statistics(self, report: Any, i: int, token: int) -> tuple[float, float | None]:
        """(log-prob, entropy) of a drawn token; the report is at the sampling temperature already."""
        if self.statistics == "full":
            return at_temperature(flat_row(report, i)[1], token, 1.0)
        logprob = logprob_of(report[i], token)
        if self.statistics == "top":
            return logprob, top_entropy([x.logprob for x in report[i].values()], self.vocab)
        return logprob, None  # comes from the worker when the run stops

    def _entropies(self, runs: list[Run]) -> None:
        """Exact entropies of these runs, out of the worker, which forgets them."""
        if self.statistics != "exact" or not runs:
            return
        found = self.call("appo_take_drawn", [run.key for run in runs])
        for run in runs:
            mine = found.get(run.key, {})
            lost = [i for i in range(len(run.tokens)) if i not in mine]
            if lost:
                raise EngineError(
                    f"vLLM's worker saw no distribution for token {lost[0]} of sequence {run.seq.handle}; use "
                    "statistics='full' or 'top'"
                )
            run.entropy = [mine[i] for i in range(len(run.tokens))]

    def call(self, method: str, keys: list[str]) -> dict[str, Any]:
        """A worker's answer; with several the first that has one (a tensor-parallel group sees the same logits)."""
        answers = self.llm.collective_rpc(method, args=(keys,))
        return next((a for a in answers if a), {})

    def _check_version(self, run: Run, new: Any) -> None:
        """vLLM's own record of the weights that drew the tokens, where there is one."""
        spans = getattr(new, "weight_versions", None) or ()
        if any(span.version != self.salt for span in spans):
            raise StaleWeightsError(
                f"sequence {run.seq.handle} was drawn by weights that are not those of policy version {run.version}: "
                "someone else has relabelled the weights of this vLLM"
            )

    def _forget(self, run: Run) -> None:
        del self.runs[run.key], self.by_seq[run.seq.handle]
