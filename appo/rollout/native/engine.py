"""NativeEngine: the rollout protocol over a segment tree of KV blocks, for CPU and one device.

    engine = NativeEngine(Path("model"), dtype="bfloat16")
    prompt = engine.add_prompt(ids)
    roots = [engine.fork(prompt, at=len(ids)) for _ in range(8)]      # the prompt is prefilled once
    for i, seq in enumerate(roots):
        engine.submit(seq, SamplingParams(max_new_tokens=64), seed=i)
    while engine.has_work():
        for event in engine.step(): ...

This is the front: what may be asked, and what is refused. The tree is in segment_tree.py, who runs
when in scheduler.py, a step in loop.py, the model in runner.py.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal

import torch

from appo.errors import EngineError, ModelError
from appo.models.shape import ModelFamily
from appo.rollout.engine import SamplingParams, Scored, SequenceStopped
from appo.rollout.native.checks import (
    DTYPES,
    check_context,
    check_fits,
    check_fresh,
    check_none_decodes,
    check_params,
    check_settings,
)
from appo.rollout.native.counters import Counters
from appo.rollout.native.engine_stats import engine_stats
from appo.rollout.native.events import Event, EventLog
from appo.rollout.native.loop import Loop
from appo.rollout.native.model.loader import ModelLoader
from appo.rollout.native.model.model import Model
from appo.rollout.native.model.weights import read_config
from appo.rollout.native.prompts import Prompts
from appo.rollout.native.requests import Request, SequenceState
from appo.rollout.native.runner import make_runner
from appo.rollout.native.sampling.sampler import TokenSampler
from appo.rollout.native.scheduler import Scheduler
from appo.rollout.native.scoring import TreeScore
from appo.rollout.native.tree.block_list import BLOCK
from appo.rollout.native.tree.native_tree import make_tree
from appo.rollout.submission import ReentrancyGuard, checked_ids


class NativeEngine:
    """See `appo.rollout.engine.RolloutEngine` for the contract of each method.

    Beyond it: `state(seq)`, `tokens(seq)`, `preempt(seq)`, and `events`, the log of what was asked
    and decided.

    max_batch       sequences that decode together
    prefill_chunk   prefill tokens per step
    kv_tokens       limit on cached tokens, in whole blocks of 16. When it is reached, KV of
                    idle sequences gives way and is computed again when needed. None: nothing is
                    dropped before it is released, until memory ends
    max_context     longest sequence (default: the model's)
    deterministic   the same bits whatever runs beside a sequence, in whatever chunks, before or
                    after a preemption. (Sums follow the cuts of the path, so a `rewind` or
                    `cancel` below another sequence's fork, which leaves a cut there, changes
                    last bits of what is drawn after it.) The C++ layers do that anyway;
                    PyTorch's are given rows in fixed buckets; prompts are not shared by common
                    prefix, as that depends on which were there before
    share_prompts   a new prompt reuses the KV of a live one with a common prefix of 16 tokens
                    or more
    fp32_logits     halve the error of bfloat16 logprobs for about a tenth of the speed (see
                    `Model`)
    runner          what runs the layers: "native" (C++), "torch", "device" (Triton; for
                    device="cuda"), or "auto": C++ on a CPU that can
    record          write the event log to this file, for `replay.replay`
    family          of the model, where it is a user's own
    """

    # load_weights takes `<module>.lora_A` and `.lora_B` beside Hugging Face names
    accepts_adapters = True

    def __init__(
        self,
        model_dir: Path,
        *,
        dtype: Literal["float32", "bfloat16"] = "bfloat16",
        max_batch: int = 32,
        prefill_chunk: int = 512,
        kv_tokens: int | None = None,
        max_context: int | None = None,
        device: str = "cpu",
        deterministic: bool = False,
        policy_version: int = 0,
        share_prompts: bool = True,
        fp32_logits: bool = True,
        runner: Literal["auto", "torch", "native", "device"] = "auto",
        record: Path | str | None = None,
        family: ModelFamily | None = None,
    ):
        """Load a Hugging Face folder (config.json + safetensors)."""
        start = time.perf_counter()
        check_settings(dtype, max_batch, prefill_chunk, kv_tokens)
        self.config = config = read_config(model_dir, family)
        self.max_context = max_context or config.max_positions
        check_context(self.max_context, config.max_positions)
        self.policy_version, self.deterministic = policy_version, deterministic
        self.share_prompts = share_prompts and not deterministic
        self.log = EventLog(record)
        limit = None if kv_tokens is None else kv_tokens // BLOCK
        self.tree = make_tree(limit)
        self.prompts = Prompts(self.tree)
        self.scheduler = Scheduler(self.tree, limit, max_batch, prefill_chunk, self.log)
        with torch.inference_mode():
            where = torch.device(device)
            layers = "torch" if runner == "device" else runner
            self.model = Model(config, DTYPES[dtype], where, self.max_context, fp32_logits, layers)
            self.loader = ModelLoader(self.model)
            self.loader.load_folder(model_dir)
            self.runner = make_runner(self.model, deterministic, runner == "device", limit)
            self.sampler = TokenSampler(config.vocab, where, self.model)
        self._count = Counters()
        self.loop = Loop(self.scheduler, self.sampler, self.log, self._count)
        self._guard = ReentrancyGuard()
        self._load_seconds = time.perf_counter() - start

    # -- the tree ----------------------------------------------------------------------------------

    def add_prompt(self, token_ids: Sequence[int]) -> int:
        """New sequence; shares the KV of a live prompt's longest common prefix of 16 or more."""
        ids = checked_ids(token_ids, self.config.vocab)
        if not ids:
            raise EngineError("add_prompt: token_ids is empty; a prompt needs at least one token")
        check_fits("add_prompt", 0, len(ids), self.max_context)
        seq, shared = self.prompts.add(ids, self.share_prompts)
        self._count.prefix_hits_tokens += shared
        self.scheduler.rest(seq)
        self.log.write("prompt", seq, ids=ids)
        return seq

    def fork(self, seq: int, at: int) -> int:
        """New handle inheriting tokens < at; its first row is token at - 1, sampled or not."""
        child = self.tree.fork(seq, at)
        self._count.forks += 1
        self.scheduler.touch(seq)
        self.scheduler.rest(child)
        self.log.write("fork", child, parent=seq, at=at)
        return child

    def append(self, seq: int, token_ids: Sequence[int]) -> None:
        """Add given tokens; the next submit, or a fork that needs them, prefills them.

        After `cancel` this goes on from what was left; after `release` it is an error, so a late
        result is not taken.
        """
        length = self.tree.length(seq)
        self._check_idle(seq, "append")
        ids = checked_ids(token_ids, self.config.vocab)
        check_fits(f"append(seq={seq})", length, len(ids), self.max_context)
        self.tree.extend(seq, ids)
        self.scheduler.touch(seq)
        self.log.write("append", seq, ids=ids)

    def release(self, seq: int) -> None:
        """Give the handle back, cancelling what decodes; frees what no descendant needs."""
        self.tree.length(seq)  # known and live
        if self.loop.is_late(seq):
            self.cancel(seq)
        request = self.scheduler.by_seq.get(seq)
        if request is not None:
            self._take_out(request)
        self.scheduler.forget(seq)
        self.prompts.forget(seq)
        self.tree.release(seq)
        self._count.dropped(seq, 0)
        if not self.tree.used:
            self.runner.idle()
        self.log.write("release", seq)

    def length(self, seq: int) -> int:
        """Tokens of the sequence, inherited ones included."""
        return self.tree.length(seq)

    def tokens(self, seq: int) -> list[int]:
        """All token ids of the sequence."""
        return self.tree.tokens(seq)

    def state(self, seq: int) -> SequenceState:
        """Where the sequence stands; DONE for a handle that was given back."""
        return self.scheduler.state(seq)

    # -- running -----------------------------------------------------------------------------------

    def submit(self, seq: int, params: SamplingParams, seed: int) -> None:
        """Queue the sequence. Raises PoolTooSmallError if the pool could not hold it alone."""
        length = self.tree.length(seq)
        self.loader.check_whole(f"submit(seq={seq})")
        self._check_idle(seq, "submit")
        check_params(params)
        check_fresh(f"submit(seq={seq})", seq, self.tree.stale(seq), self.policy_version)
        check_fits(f"submit(seq={seq})", length, 1, self.max_context)
        end = min(length + params.max_new_tokens, self.max_context)
        self.scheduler.submit(seq, params, int(seed), length, end)
        self.log.submit(seq, params, int(seed))

    def cancel(self, seq: int) -> None:
        """Stop decoding and drop what was sampled since submit.

        No effect on a sequence that is not decoding.

        One whose SequenceStopped event was not returned yet (it stopped in a step whose callback
        raised, or calls this) counts as decoding: the event is dropped.
        """
        length = self.tree.length(seq)
        request = self.scheduler.by_seq.get(seq)
        if request is not None:
            self._take_out(request)
            sampled = len(request.tokens)
        elif sampled := self.loop.take_back(seq):
            self.scheduler.rest(seq, SequenceState.CANCELLED)
        else:
            return
        self._cut(seq, length - sampled)
        self.log.write("cancel", seq, sampled=sampled)

    def rewind(self, seq: int, length: int) -> None:
        """Drop tokens of an idle sequence from position `length` on; forks on them keep them."""
        self._check_idle(seq, "rewind")
        self._cut(seq, length)
        self.log.write("rewind", seq, length=length)

    def _take_out(self, request: Request) -> None:
        """The request ends without an event."""
        if request in self.scheduler.active and not request.tokens:
            self._count.gave_up(request.seq, self.tree.kv(request.seq))
        self.scheduler.remove(request, SequenceState.CANCELLED)

    def _cut(self, seq: int, length: int) -> None:
        self.tree.truncate(seq, length)
        self.prompts.truncated(seq, length)
        self._count.dropped(seq, length)

    def preempt(self, seq: int) -> None:
        """Take a running sequence out and drop its private KV; it goes on by itself, the same."""
        self.tree.length(seq)  # known and live
        request = self.scheduler.by_seq.get(seq)
        if request is None or request not in self.scheduler.active:
            raise EngineError(
                f"preempt(seq={seq}): it is {self.state(seq).value}; only a running one can be preempted"
            )
        self.scheduler.preempt(request)

    def has_work(self) -> bool:
        """Whether a submitted sequence has still to stop."""
        return self.loop.has_work()

    @torch.inference_mode()
    def step(self) -> list[SequenceStopped]:
        """One forward. Returns the sequences that stopped in it.

        If anything raises before commit, nothing has changed and the step can be tried again. A
        stop callback that raises is reported when all tokens of the step are in: its sequence goes
        on, other events come with the next step.
        """
        with self._guard("step"):
            return self.loop.step(self.runner, self.policy_version)

    # -- weights and scores ------------------------------------------------------------------------

    @torch.inference_mode()
    def load_weights(self, named_tensors: Iterable[tuple[str, object]], version: int) -> None:
        """Replace weights in place.

        All KV is dropped, and live sequences that had some are stale until scored.

        Nothing may be decoding; sequences that wait for a tool or for a fork may live on. If it
        breaks off after the first weight was written, nothing can be submitted or scored until all
        weights have been loaded again.
        """
        check_none_decodes("load_weights", self.loop.decoding)
        start = time.perf_counter()
        try:
            self.loader.load(named_tensors)
        except ModelError:
            raise  # found before anything was written
        except BaseException:
            self.tree.new_version(version)
            raise
        self.policy_version = version
        self.tree.new_version(version)
        self.runner.weights_changed()
        self.runner.idle()
        self._count.new_weights()
        self._load_seconds = time.perf_counter() - start
        self.log.write("version", version=version)

    @torch.inference_mode()
    def score(self, seqs: Sequence[int], temperature: float = 1.0) -> list[Scored]:
        """One pass over the union of the sequences' paths.

        Every stored token is run once, KV is left behind.

        A fork's own first row repeats the token before the fork (one token each); the last token of
        a sequence is not run, as nothing follows it. If the pool is full, other KV gives way,
        running sequences go on later, and in the end the KV of what has been scored goes, but for
        the path that is being run: that must fit.
        """
        with self._guard("score"):
            self.loader.check_whole("score")
            if not temperature > 0:
                raise EngineError(f"score: temperature={temperature}; must be above 0")
            lengths = {seq: self.tree.length(seq) for seq in seqs}
            for seq in seqs:
                self._check_idle(seq, "score")
            work = TreeScore(self.tree, self.scheduler, self.runner, seqs, temperature)
            self._count.scored(work.run(), lengths)
            for seq in seqs:
                self.scheduler.touch(seq)
            self.log.write("score", seqs=[*seqs], temperature=temperature)
            return [work.of(seq, self.policy_version) for seq in seqs]

    # -- facts -------------------------------------------------------------------------------------

    def stats(self) -> dict[str, float]:
        """See the protocol; beyond it packed_bytes: the C++ copy of the weights."""
        return {
            **self._count.as_dict(),
            **engine_stats(self.tree, self.scheduler, self.runner.pool, self.model.native),
            "load_seconds": self._load_seconds,
        }

    @property
    def loaded(self) -> set[str]:
        """Names that the last load_weights has written."""
        return self.loader.loaded

    @property
    def events(self) -> deque[Event]:
        """The last things that were asked and decided, oldest first."""
        return self.log.events

    def _check_idle(self, seq: int, operation: str) -> None:
        if seq in self.scheduler.by_seq or self.loop.is_late(seq):
            raise EngineError(
                f"{operation}(seq={seq}): it is decoding already; wait for its SequenceStopped event or cancel it"
            )
