"""VLLMEngine: the rollout protocol over vLLM's engine loop, driven step by step.

    engine = VLLMEngine(Path("model"), dtype="bfloat16")      # then as NativeEngine

A fork is a new request with the inherited tokens; vLLM's prefix cache spares what is a whole block
of them. The cache is salted by the weights, so that a prefix computed under other weights can never
be hit. What differs from the native
engine: up to a block is recomputed at a fork and after every tool call, the noise of a token
depends on its seed and on where its `submit` began (not on the position alone), and there is no
deterministic mode.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from appo.errors import EngineError
from appo.models.shape import read_shape
from appo.rollout.engine import SamplingParams, Scored, SequenceStopped
from appo.rollout.submission import ReentrancyGuard, checked_ids
from appo.rollout.vllm.decoding import Decoder
from appo.rollout.vllm.scoring import ScorePass
from appo.rollout.vllm.sequences import DecodeRequest, Sequences, check_fresh, check_params
from appo.rollout.vllm.start import (
    STATISTICS,
    Api,
    Statistics,
    block_size,
    llm_arguments,
    load_api,
    prepare_environment,
    undisturbed,
)
from appo.rollout.vllm.weights import Checkpoint, WeightLoader


class VLLMEngine:
    """See `appo.rollout.engine.RolloutEngine` for the contract of each method."""

    def __init__(
        self,
        model_dir: Path,
        *,
        dtype: str = "bfloat16",
        max_batch: int = 32,
        prefill_chunk: int = 2048,
        max_context: int | None = None,
        statistics: Statistics = "exact",
        block: int | None = None,
        kv_bytes: int | None = None,
        in_process: bool = True,
        policy_version: int = 0,
        api: Api | None = None,
        **llm: Any,
    ):
        """Start vLLM on a Hugging Face folder.

        statistics: "exact" (entropies computed in the worker) · "full" (exact from the public API,
        whole-vocabulary log-probs of every token: small vocabularies only) · "top" (entropy
        approximate, see `entropy_exact`; scores at temperature 1 only) · block: tokens per KV block
        · kv_bytes: size of the KV cache · in_process: no process of its own · llm: further
        arguments of vllm.LLM, such as tensor_parallel_size.
        """
        if statistics not in STATISTICS:
            raise EngineError(f"statistics={statistics!r}: use one of {', '.join(STATISTICS)}")
        for name, value in (("max_batch", max_batch), ("prefill_chunk", prefill_chunk)):
            if value < 1:
                raise EngineError(f"{name}={value}: must be at least 1")
        start = time.perf_counter()
        shape = read_shape(model_dir)
        self.max_context = max_context or shape.max_positions - 1
        if not 2 <= self.max_context < shape.max_positions:
            raise EngineError(
                f"max_context={max_context}: the model has {shape.max_positions} positions and vLLM needs one beyond the "
                f"longest sequence; use 2 … {shape.max_positions - 1}"
            )
        self.weights = WeightLoader(Checkpoint(model_dir), in_process)
        prepare_environment(in_process)
        with undisturbed():
            api = api or load_api()
            arguments = llm_arguments(
                model_dir, dtype=dtype, max_batch=max_batch, prefill_chunk=prefill_chunk, max_context=self.max_context,
                statistics=statistics, cpu=api.cpu, block=block_size(api.cpu, block), kv_bytes=kv_bytes,
            )  # fmt: skip
            self.llm = api.LLM(**(arguments | llm))
        self.vocab, self.statistics, self.policy_version = shape.vocab, statistics, policy_version
        self.decoder = Decoder(api, self.llm, statistics, shape.vocab)
        self.sequences = Sequences()
        self._guard = ReentrancyGuard()
        self._loads = 0
        self._broken: str | None = None
        self._relabel()
        self._load_seconds = time.perf_counter() - start

    # -- facts -------------------------------------------------------------------------------------

    @property
    def entropy_exact(self) -> bool:
        """False: `entropy` is an upper bound from the 20 likeliest tokens.

        Branching by entropy must refuse it.
        """
        return self.statistics != "top"

    @property
    def loaded(self) -> set[str]:
        """Names that the last load_weights is known to have written."""
        return self.weights.loaded

    def length(self, seq: int) -> int:
        """Tokens of the sequence, inherited ones included."""
        return len(self.sequences.get(seq).tokens)

    def tokens(self, seq: int) -> list[int]:
        """All token ids of the sequence."""
        return list(self.sequences.get(seq).tokens)

    def stats(self) -> dict[str, float]:
        """Counters since construction.

        prefix_hits_tokens: prompt tokens that vLLM found in its cache.
        """
        return {
            **self.decoder.count,
            "live_sequences": len(self.sequences.by_handle),
            "running": len(self.decoder.requests),
            "load_seconds": self._load_seconds,
            "entropy_exact": float(self.entropy_exact),
        }

    # -- the tree ----------------------------------------------------------------------------------

    def add_prompt(self, token_ids: Sequence[int]) -> int:
        """New sequence; vLLM finds common prefixes by itself."""
        ids = checked_ids(token_ids, self.vocab)
        if not ids:
            raise EngineError("add_prompt: token_ids is empty; a prompt needs at least one token")
        if len(ids) > self.max_context:
            raise EngineError(
                f"prompt of {len(ids)} tokens is longer than max_context={self.max_context}"
            )
        return self.sequences.add(None, 0, ids).handle

    def fork(self, seq: int, at: int) -> int:
        """New handle inheriting tokens < at.

        Their KV is found in the prefix cache, whole blocks of it.
        """
        child = self.sequences.fork(seq, at, self.policy_version)
        self.decoder.count["forks"] += 1
        return child.handle

    def append(self, seq: int, token_ids: Sequence[int]) -> None:
        """Add given tokens; they are prefilled at the next submit."""
        s = self.sequences.get(seq)
        self._not_decoding(seq, "append")
        ids = checked_ids(token_ids, self.vocab)
        if len(s.tokens) + len(ids) > self.max_context:
            raise EngineError(
                f"append(seq={seq}): {len(s.tokens)} + {len(ids)} tokens do not fit max_context={self.max_context}"
            )
        s.tokens += ids

    def release(self, seq: int) -> None:
        """Give the handle back (a running sequence is cancelled)."""
        self.cancel(seq)
        self.sequences.release(seq)

    # -- running -----------------------------------------------------------------------------------

    def submit(self, seq: int, params: SamplingParams, seed: int) -> None:
        """Start decoding."""
        self._usable()
        s = self.sequences.get(seq)
        self._not_decoding(seq, "submit")
        check_params(params, cut_allowed=self.statistics == "exact")
        length = len(s.tokens)
        check_fresh(s, length, self.policy_version, "submit")
        if length >= self.max_context:
            raise EngineError(
                f"submit(seq={seq}): {length} tokens leave no room in max_context={self.max_context}"
            )
        end = min(length + params.max_new_tokens, self.max_context)
        request = DecodeRequest(self.decoder.key(), s, params, self.policy_version, length, end)
        self.decoder.submit(request, seed)

    def cancel(self, seq: int) -> None:
        """Stop decoding and drop what was sampled since submit.

        No effect on a sequence that is not decoding.
        """
        self.sequences.get(seq)  # known and live
        request = self.decoder.by_seq.get(seq)  # also one that stopped, but nobody knows yet
        if request is not None:
            self.decoder.cancel(request)
            self.sequences.truncate(seq, request.start)

    def has_work(self) -> bool:
        """Whether a submitted sequence has still to stop."""
        return bool(self.decoder.by_seq)

    def step(self) -> list[SequenceStopped]:
        """One step of vLLM. Returns the sequences that stopped in it.

        A stop callback that raises is reported when all tokens of the step are in: its sequence
        goes on, events come with the next step.
        """
        self._usable()
        with self._guard("step"):
            if self.decoder.requests:
                self.decoder.step(other=lambda output: None)  # of requests cancelled since
            return self.decoder.hand_out()

    # -- weights and scores ------------------------------------------------------------------------

    def load_weights(self, named_tensors: Iterable[tuple[str, object]], version: int) -> None:
        """Replace weights in place.

        Names as in the folder, adapters merged; a part of them is enough.
        """
        self._usable()
        if self.decoder.requests:
            raise EngineError(
                f"load_weights: {len(self.decoder.requests)} sequences are decoding; let them stop or cancel them first"
            )
        start = time.perf_counter()
        tensors, asked = self.weights.collect(named_tensors)
        self._broken = "a weight update failed half-way; start a new engine"
        self.weights.send(self.llm, tensors, asked)
        self.policy_version, self._loads = version, self._loads + 1
        self.sequences.new_weights()
        # The salt alone keeps old KV from being hit; the reset gives its memory back and shows that
        # nothing runs.
        if not self.llm.reset_prefix_cache():
            raise EngineError(
                "load_weights: vLLM kept its prefix cache, so a request still runs in it"
            )
        self._relabel()
        self._broken = None
        self._load_seconds = time.perf_counter() - start

    def score(self, seqs: Sequence[int], temperature: float = 1.0) -> list[Scored]:
        """Statistics of every token under the weights as they are.

        What lines share is run once with "exact".
        """
        self._usable()
        if not temperature > 0:
            raise EngineError(f"score: temperature={temperature}; must be above 0")
        if self.statistics == "top" and temperature != 1:
            raise EngineError(
                f"score: temperature={temperature} with statistics='top': vLLM scores prompts at temperature 1 only; use "
                "statistics='exact'"
            )
        with self._guard("score"):
            lines = [self.sequences.get(seq) for seq in seqs]
            for seq in seqs:
                self._not_decoding(seq, "score")
            work = ScorePass(self.decoder, lines, temperature, self.policy_version)
            # Lines that decode go on meanwhile; those that stop are handed out by the next step().
            work.run(lambda: self.decoder.step(work.take))
            self.decoder.count["scored_tokens"] += work.computed
            for line, ids in zip(lines, work.tokens):
                line.computed(len(ids) - 1)
            return work.results()

    # -- helpers -----------------------------------------------------------------------------------

    def _relabel(self) -> None:
        """A name for the weights.

        The version alone would not tell two loads of one version apart.
        """
        self.decoder.relabel(f"{self.decoder.name}.{self.policy_version}.{self._loads}")

    def _usable(self) -> None:
        if self._broken:
            raise EngineError(f"this vLLM engine cannot be used any more: {self._broken}")

    def _not_decoding(self, seq: int, operation: str) -> None:
        if seq in self.decoder.by_seq:
            raise EngineError(
                f"{operation}(seq={seq}): it is decoding; wait for its SequenceStopped event or cancel it"
            )
