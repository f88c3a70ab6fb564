"""Statistics of given tokens under the weights as they are now.

With statistics "exact" lines that share a prefix run it once: the first of them in full, the others
on top of its KV, taking the rows they did not run from it. vLLM's public API has no such thing:
"full" and "top" run every line in full.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from appo.errors import EngineError
from appo.rollout.engine import Scored
from appo.rollout.vllm.decoding import Decoder
from appo.rollout.vllm.reports import at_temperature, flat_row, logprob_of, top_entropy
from appo.rollout.vllm.sequences import Sequence
from appo.rollout.vllm.start import TOP
from appo.rollout.vllm.worker_statistics import KEY, SCORE

MIN_SHARED = 16  # tokens; the smallest block of vLLM


class ScorePass:
    """One score call: rounds of `start`, steps until nothing is `waiting`, `collect`.

    Then `results`.
    """

    def __init__(self, decoder: Decoder, lines: list[Sequence], temperature: float, version: int):
        self.decoder, self.temperature, self.version = decoder, temperature, version
        self.tokens = [list(line.tokens) for line in lines]
        self.logp = [np.full(len(ids) - 1, np.nan, np.float32) for ids in self.tokens]
        self.entropy = [np.full(len(ids) - 1, np.nan, np.float32) for ids in self.tokens]
        self.done = [np.zeros(len(ids) - 1, bool) for ids in self.tokens]
        self.waiting: dict[str, int] = {}  # request id → line
        self.computed = 0  # tokens that went through the model
        # KV of these weights serves later forks, so it is written under their salt, unless rollouts
        # have written there already: those blocks were run without a score, and hitting them would
        # leave rows without a value.
        nodes = (node for line in lines for node, _ in line.path(len(line.tokens)))
        fresh = all(node.seen == node.base for node in nodes)
        self.salt = decoder.salt if fresh else f"{decoder.salt}.{decoder.key()}"
        self._rounds = iter(self._plan())
        self._sent: list[str] = []

    def _plan(self) -> list[tuple[list[int], bool]]:
        """(lines, may they read the prefix cache) by round.

        The last round runs what is still missing in full.
        """
        every = [i for i, ids in enumerate(self.tokens) if len(ids) > 1]
        if self.decoder.statistics != "exact":
            return [(every, False)]
        first = [i for n, i in enumerate(every) if not any(self._share(i, j) for j in every[:n])]
        return [(first, False), ([i for i in every if i not in first], True), (every, False)]

    def _share(self, i: int, j: int) -> bool:
        return self.tokens[i][:MIN_SHARED] == self.tokens[j][:MIN_SHARED]

    def start(self) -> bool:
        """Send the next round that has something to do; False when all is done."""
        for lines, cached in self._rounds:
            todo = [i for i in lines if not self.done[i].all()]
            for i in todo:
                self._send(i, cached)
            if todo:
                return True
        if not all(done.all() for done in self.done):
            raise EngineError(
                "vLLM ran prompts without showing their logits: exact scoring does not know this version; use "
                "statistics='full' or 'top'"
            )
        return False

    def _send(self, i: int, cached: bool) -> None:
        d, key = self.decoder, self.decoder.key()
        reports: dict[str, dict[str, Any]] = {
            "exact": dict(extra_args={KEY: key, SCORE: self.temperature}),
            "top": dict(prompt_logprobs=TOP),
            "full": dict(prompt_logprobs=-1, flat_logprobs=True),
        }
        sampling = d.api.SamplingParams(
            max_tokens=1,
            temperature=0.0,
            ignore_eos=True,
            detokenize=False,
            skip_reading_prefix_cache=not cached,
            **reports[d.statistics],
        )
        d.send(key, self.tokens[i], sampling, self.salt)
        self.waiting[key] = i
        self._sent.append(key)

    def take(self, output: Any) -> None:
        """An output that belongs to no `DecodeRequest`."""
        i = self.waiting.get(output.request_id)
        if i is None or not output.finished:
            return
        del self.waiting[output.request_id]
        self.computed += len(self.tokens[i]) - int(output.num_cached_tokens or 0)
        if self.decoder.statistics == "exact":
            return
        report = output.prompt_logprobs
        if report is None or len(report) != len(self.tokens[i]):
            raise EngineError(
                f"vLLM reported log-probs of {0 if report is None else len(report)} of {len(self.tokens[i])} prompt tokens"
            )
        for row, token in enumerate(self.tokens[i][1:]):
            self._fill(i, row, *self._read(report, row + 1, token))

    def _read(self, report: Any, position: int, token: int) -> tuple[float, float]:
        """(log-prob, entropy) of a prompt token.

        The report is at temperature 1, whatever was asked.
        """
        if self.decoder.statistics == "full":
            return at_temperature(flat_row(report, position)[1], token, self.temperature)
        top = [x.logprob for x in report[position].values()]
        return logprob_of(report[position], token), top_entropy(top, self.decoder.vocab)

    def _fill(self, i: int, row: int | slice, logp: ArrayLike, entropy: ArrayLike) -> None:
        self.logp[i][row], self.entropy[i][row], self.done[i][row] = logp, entropy, True

    def collect(self, lines: dict[str, int]) -> None:
        """Take the worker's rows of a finished round, then what lines can lend each other.

        lines: request id → line
        """
        if self.decoder.statistics != "exact":
            return
        for key, pieces in self.decoder.call("appo_take_scored", list(lines)).items():
            for start, logp, entropy in pieces:
                self._fill(lines[key], slice(start, start + len(logp)), logp, entropy)
        for i in lines.values():
            self._borrow(i)

    def _borrow(self, i: int) -> None:
        """Rows before the first one that was run: row r needs the same tokens up to r + 1."""
        missing = int(np.argmax(self.done[i])) if self.done[i].any() else len(self.done[i])
        for j, ids in enumerate(self.tokens):
            same = ids[: missing + 1] == self.tokens[i][: missing + 1]
            if missing and j != i and same and self.done[j][:missing].all():
                rows = slice(0, missing)
                self._fill(i, rows, self.logp[j][rows], self.entropy[j][rows])
                return

    def run(self, step: Callable[[], object]) -> None:
        """All rounds; `step` moves vLLM on by one.

        Leaves nothing behind in vLLM, whatever happens.
        """
        try:
            while self.start():
                lines = dict(self.waiting)
                while self.waiting:
                    step()
                self.collect(lines)
        finally:
            if self.waiting:
                self.decoder.core.abort_request(list(self.waiting))
            if self.decoder.statistics == "exact":
                self.decoder.call("appo_take_scored", self._sent)

    def results(self) -> list[Scored]:
        """What was collected, in the order of the sequences asked for."""
        return [
            Scored(logp, entropy, self.version) for logp, entropy in zip(self.logp, self.entropy)
        ]
