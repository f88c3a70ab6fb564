"""Requests in flight.

From sampling parameters to drawn tokens with their log-probs and entropies.
"""

from __future__ import annotations

import itertools
import uuid
from collections.abc import Callable
from typing import Any

from appo.errors import EngineError, StaleWeightsError
from appo.rollout.engine import SamplingParams, SequenceStopped
from appo.rollout.seeds import derive_seed
from appo.rollout.submission import Reason
from appo.rollout.vllm.reports import at_temperature, flat_row, logprob_of, top_entropy
from appo.rollout.vllm.sequences import DecodeRequest
from appo.rollout.vllm.start import TOP, Api, Statistics
from appo.rollout.vllm.worker_statistics import KEY

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
        self.requests: dict[str, DecodeRequest] = {}  # that vLLM decodes, by request id
        self.by_seq: dict[
            int, DecodeRequest
        ] = {}  # these, and those that stopped and were not handed out
        self.count = dict.fromkeys(COUNTERS, 0)
        if statistics == "exact":
            llm.collective_rpc("appo_attach")

    def key(self) -> str:
        """A request id that no other engine in the worker's process has."""
        return f"{self.name}-{next(self._ids)}"

    def relabel(self, salt: str) -> None:
        """From now on requests belong to these weights.

        vLLM versions that can note it in their outputs.
        """
        self.salt = salt
        label = getattr(self.core, "set_weight_version", None)
        if label is not None:
            label(salt)

    def send(self, key: str, tokens: list[int], sampling: Any, salt: str | None = None) -> None:
        """Hand a prompt to vLLM. Its prefix cache is shared only within one `salt`."""
        prompt = self.api.TokensPrompt(prompt_token_ids=list(tokens), cache_salt=salt or self.salt)
        self.core.add_request(key, prompt, sampling)

    def submit(self, request: DecodeRequest, seed: int) -> None:
        """Start decoding."""
        self.send(request.key, request.seq.tokens, self._sampling(request, request.params, seed))
        self.requests[request.key] = self.by_seq[request.seq.handle] = request

    def _sampling(self, request: DecodeRequest, params: SamplingParams, seed: int) -> Any:
        report = {
            "exact": dict(logprobs=0),
            "top": dict(logprobs=TOP),
            "full": dict(logprobs=-1, flat_logprobs=True),
        }
        return self.api.SamplingParams(
            max_tokens=request.end - request.start,
            temperature=params.temperature,
            top_p=params.top_p,
            top_k=params.top_k,
            # One seed per submit: with the line's own, the draws after a tool call would repeat
            # those before it.
            seed=derive_seed(seed, request.start),
            stop_token_ids=sorted(params.stop_token_ids),
            ignore_eos=True,  # only the ids asked for stop it
            detokenize=False,
            output_kind=self.api.DELTA,
            extra_args={KEY: request.key},
            **report[self.statistics],
        )

    def cancel(self, request: DecodeRequest) -> None:
        """End it without an event; what it drew stays in the sequence."""
        if self.requests.pop(request.key, None) is not None and not request.finished:
            self.core.abort_request([request.key])
        del self.by_seq[request.seq.handle]
        if self.statistics == "exact":
            self.call("appo_take_sampled", [request.key])

    def step(self, other: Callable[[Any], None]) -> None:
        """One step of vLLM; outputs that belong to no `DecodeRequest` go to `other`.

        vLLM gives an output once, so all are taken before the first thing that went wrong with one
        of them is raised.
        """
        outputs = [(self.requests.get(output.request_id), output) for output in self._advance()]
        self.count["steps"] += 1
        for request, output in outputs:
            if request is not None:
                request.finished = output.finished
        failed: BaseException | None = None
        for request, output in outputs:
            try:
                if request is None:
                    other(output)
                elif request.key in self.requests:  # otherwise a callback of this step cancelled it
                    self._take(request, output)
            except BaseException as e:  # raised again below
                failed = failed or e
        if failed is not None:
            raise failed

    def hand_out(self) -> list[SequenceStopped]:
        """Events of what has stopped. If it raises, the others come with the next call."""
        ended = [request for request in self.by_seq.values() if request.reason is not None]
        if self.statistics == "exact":
            self._entropies([request for request in ended if not request.entropy])
        events = []
        for request in ended:
            assert request.reason is not None
            del self.by_seq[request.seq.handle]
            events.append(
                SequenceStopped(
                    request.seq.handle,
                    request.tokens,
                    request.logprobs,
                    request.entropy,
                    request.reason,
                    request.version,
                )
            )
        return events

    def _advance(self) -> list[Any]:
        try:
            return self.core.step()
        except (
            Exception
        ) as e:  # whatever it was: vLLM's core is gone, what was drawn is still in the sequences
            raise EngineError(
                f"vLLM failed with {len(self.requests)} sequences decoding: {type(e).__name__}: {e}"
            ) from e

    def _take(self, request: DecodeRequest, output: Any) -> None:
        """What a step gave one request."""
        if not request.counted:
            request.counted, hits = True, int(output.num_cached_tokens or 0)
            self.count["prefix_hits_tokens"] += hits
            self.count["prefill_tokens"] += request.start - hits
        new, reason, failed = output.outputs[0], None, None
        for i, token in enumerate(map(int, new.token_ids)):
            self.count["decode_tokens"] += bool(request.tokens)
            request.take(token, *self._statistics(new.logprobs, i, token))
            try:
                reason = request.reason_to_stop(token)
            except BaseException as e:  # raised again below
                failed, reason = failed or e, request.at_end(token)
            if reason is not None or request.key not in self.requests:
                break  # a token beyond the stop was never part of the sequence
        if request.key in self.requests:  # otherwise its callback cancelled it
            self._after(request, reason, new)
        if isinstance(failed, Exception):
            raise EngineError(
                f"the stop callback of sequence {request.seq.handle} raised {failed!r}; the token it saw was kept. Go on with "
                "step(), or cancel the sequence"
            ) from failed
        if failed is not None:
            raise failed

    def _after(self, request: DecodeRequest, reason: Reason | None, new: Any) -> None:
        """Let a run go that has stopped.

        Raises if vLLM ended it otherwise, or drew it from other weights.
        """
        if reason is not None:
            self._check_version(request, new)
            if not request.finished:
                self.core.abort_request([request.key])
            del self.requests[request.key]
            request.reason = reason
        elif request.finished:
            self.cancel(request)
            raise EngineError(
                f"vLLM ended sequence {request.seq.handle} by itself (finish_reason={new.finish_reason!r}, "
                f"stop_reason={new.stop_reason!r}); see its log. It has what was drawn, and no event will come"
            )

    def _statistics(self, report: Any, i: int, token: int) -> tuple[float, float | None]:
        """(log-prob, entropy) of a drawn token.

        The report is at the sampling temperature already.
        """
        if self.statistics == "full":
            return at_temperature(flat_row(report, i)[1], token, 1.0)
        logprob = logprob_of(report[i], token)
        if self.statistics == "top":
            return logprob, top_entropy([x.logprob for x in report[i].values()], self.vocab)
        return logprob, None  # comes from the worker when the run stops

    def _entropies(self, requests: list[DecodeRequest]) -> None:
        """Exact entropies of these requests, out of the worker, which forgets them."""
        if not requests:
            return
        found = self.call("appo_take_sampled", [request.key for request in requests])
        lost = []
        for request in requests:
            mine = found.get(request.key, {})
            missing = [i for i in range(len(request.tokens)) if i not in mine]
            if missing:
                lost.append((request, missing[0]))
            else:
                request.entropy = [mine[i] for i in range(len(request.tokens))]
        for request, _ in lost:
            self.cancel(request)
        if lost:
            raise EngineError(
                f"vLLM's worker saw no distribution for token {lost[0][1]} of sequence {lost[0][0].seq.handle}; use "
                "statistics='full' or 'top'"
            )

    def call(self, method: str, keys: list[str]) -> dict[str, Any]:
        """A worker's answer.

        With several the first that has one (a tensor-parallel group sees the same logits).
        """
        answers = self.llm.collective_rpc(method, args=(keys,))
        return next((a for a in answers if a), {})

    def _check_version(self, request: DecodeRequest, new: Any) -> None:
        """vLLM's own record of the weights that drew the tokens, where there is one."""
        spans = getattr(new, "weight_versions", None) or ()
        if any(span.version != self.salt for span in spans):
            self.cancel(request)
            raise StaleWeightsError(
                f"sequence {request.seq.handle} was drawn by weights that are not those of policy version {request.version}: "
                "someone else has relabelled the weights of this vLLM"
            )
