"""NativeEngine: the rollout protocol over a segment tree of KV blocks, for CPU and one device.

    engine = NativeEngine(Path("model"), dtype="bfloat16")
    prompt = engine.add_prompt(ids)
    roots = [engine.fork(prompt, at=len(ids)) for _ in range(8)]      # the prompt is prefilled once
    for i, seq in enumerate(roots):
        engine.submit(seq, SamplingParams(max_new_tokens=64), seed=i)
    while engine.has_work():
        for event in engine.step(): ...

This is the front: what may be asked, and what is refused. The tree is in segment_tree.py, who runs when in scheduler.py,
a step in loop.py, the model in runner.py.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal

import torch

from appo.errors import EngineError, ModelError, StaleWeightsError
from appo.models.shape import ModelFamily
from appo.rollout.engine import SamplingParams, Scored, Stopped
from appo.rollout.native.checks import (
    DTYPES,
    check_params,
    check_room,
    check_settings,
)
from appo.rollout.native.counters import Counters
from appo.rollout.native.events import Event, EventLog
from appo.rollout.native.loop import Loop
from appo.rollout.native.model.model import Model
from appo.rollout.native.model.weights import read_config, read_tensors
from appo.rollout.native.prompts import Prompts
from appo.rollout.native.runner import make_runner
from appo.rollout.native.sampling.sampler import Sampler
from appo.rollout.native.scheduler import Run, Scheduler, State
from appo.rollout.native.scoring import TreeScore
from appo.rollout.native.tree.layout import BLOCK
from appo.rollout.native.tree.native_tree import make_tree
from appo.rollout.submission import Alone, checked_ids


class NativeEngine:
    """See `appo.rollout.engine.RolloutEngine` for the contract of each method.

    Beyond it: `state(seq)`, `tokens(seq)`, `preempt(seq)`, and `events`, the log of what was asked and decided.
    """

    accepts_adapters = (
        True  # load_weights takes `<module>.lora_A` and `.lora_B` beside Hugging Face names
    )

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
        """Load a Hugging Face folder (config.json + safetensors).

        max_batch       sequences that decode together
        prefill_chunk   prefill tokens per step
        kv_tokens       limit on cached tokens, in whole blocks of 16. When it is reached, KV of idle sequences gives
                        way and is computed again when needed. None: nothing is dropped before it is released, until
                        memory ends
        max_context     longest sequence (default: the model's)
        deterministic   the same bits whatever runs beside a sequence, in whatever chunks, before or after a preemption.
                        (Sums follow the cuts of the path, so a `rewind` or `cancel` below another sequence's fork, which
                        leaves a cut there, changes last bits of what is drawn after it.)
                        The C++ layers do that anyway; PyTorch's are given rows in fixed buckets; prompts are not shared
                        by common prefix, as that depends on which were there before
        share_prompts   a new prompt reuses the KV of a live one with a common prefix of 16 tokens or more
        fp32_logits     halve the error of bfloat16 logprobs for about a tenth of the speed (see `Model`)
        runner          what runs the layers: "native" (C++), "torch", "device" (Triton; for device="cuda"), or "auto":
                        C++ on a CPU that can
        record          write the event log to this file, for `events.replay`
        family          of the model, where it is a user's own
        """
        start = time.perf_counter()
        check_settings(dtype, max_batch, prefill_chunk, kv_tokens)
        self.config = config = read_config(model_dir, family)
        self.max_context = max_context or config.max_positions
        if not 2 <= self.max_context <= config.max_positions:
            raise EngineError(
                f"max_context={max_context}: the model's positions allow 2 … {config.max_positions}"
            )
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
            self._load_all(model_dir)
            self.runner = make_runner(self.model, deterministic, runner == "device", limit)
            self.sampler = Sampler(config.vocab, where, self.model)
        self.loaded: set[str] = set()  # names written by the last load_weights
        self._torn = False  # a load_weights broke off: some weights are new, some old
        self._count = Counters()
        self.loop = Loop(self.scheduler, self.sampler, self.log, self._count)
        self._alone = Alone()
        self._load_seconds = time.perf_counter() - start

    def _load_all(self, model_dir: Path) -> None:
        missing = set(self.model.targets) - self.model.load(read_tensors(model_dir))
        if missing:
            raise ModelError(
                f"model_dir={str(model_dir)!r} lacks {len(missing)} weights, for example {min(missing)!r}"
            )

    # -- the tree ---------------------------------------------------------------------------------------------------

    def add_prompt(self, token_ids: Sequence[int]) -> int:
        """New sequence; shares the KV of the longest common prefix with a live prompt (if 16 tokens or more)."""
        ids = checked_ids(token_ids, self.config.vocab)
        if not ids:
            raise EngineError("add_prompt: token_ids is empty; a prompt needs at least one token")
        check_room("add_prompt", 0, len(ids), self.max_context)
        seq, shared = self.prompts.add(ids, self.share_prompts)
        self._count.prefix_hits_tokens += shared
        self.scheduler.rest(seq)
        self.log.write("prompt", seq, ids=ids)
        return seq

    def fork(self, seq: int, at: int) -> int:
        """New handle inheriting tokens < at; it will run token at - 1 as its first row. Any token will do, sampled or not."""
        child = self.tree.fork(seq, at)
        self._count.forks += 1
        self.scheduler.touch(seq)
        self.scheduler.rest(child)
        self.log.write("fork", child, parent=seq, at=at)
        return child

    def append(self, seq: int, token_ids: Sequence[int]) -> None:
        """Add given tokens; they are prefilled with the last sampled one at the next submit (or when a fork needs them).

        After `cancel` this goes on from what was left; after `release` it is an error, so a late result is not taken.
        """
        length = self.tree.length(seq)
        self._check_idle(seq, "append")
        ids = checked_ids(token_ids, self.config.vocab)
        check_room(f"append(seq={seq})", length, len(ids), self.max_context)
        self.tree.extend(seq, ids)
        self.scheduler.touch(seq)
        self.log.write("append", seq, ids=ids)

    def release(self, seq: int) -> None:
        """Give the handle back (a decoding sequence is cancelled); frees what no descendant needs."""
        self.tree.length(seq)  # known and live
        if self.loop.is_late(seq):
            self.cancel(seq)
        run = self.scheduler.by_seq.get(seq)
        if run is not None:
            self._take_out(run)
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

    def state(self, seq: int) -> State:
        """Where the sequence stands; DONE for a handle that was given back."""
        return self.scheduler.state(seq)

    # -- running ----------------------------------------------------------------------------------------------------

    def submit(self, seq: int, params: SamplingParams, seed: int) -> None:
        """Queue the sequence for decoding. Raises PoolTooSmallError if the pool could not hold it even alone."""
        length = self.tree.length(seq)
        self._check_whole(f"submit(seq={seq})")
        self._check_idle(seq, "submit")
        check_params(params)
        if self.tree.stale(seq):
            raise StaleWeightsError(
                f"submit(seq={seq}): its KV was computed before version {self.policy_version}; call score([{seq}]) first, "
                "or start again from add_prompt"
            )
        check_room(f"submit(seq={seq})", length, 1, self.max_context)
        end = min(length + params.max_new_tokens, self.max_context)
        self.scheduler.submit(seq, params, int(seed), length, end)
        self.log.submit(seq, params, int(seed))

    def cancel(self, seq: int) -> None:
        """Stop decoding and drop what was sampled since submit; no effect on a sequence that is not decoding.

        One whose Stopped event was not returned yet (it stopped in a step whose callback raised, or calls this) counts
        as decoding: the event is dropped.
        """
        length = self.tree.length(seq)
        run = self.scheduler.by_seq.get(seq)
        if run is not None:
            self._take_out(run)
            sampled = len(run.tokens)
        elif sampled := self.loop.take_back(seq):
            self.scheduler.rest(seq, State.CANCELLED)
        else:
            return
        self._cut(seq, length - sampled)
        self.log.write("cancel", seq, sampled=sampled)

    def rewind(self, seq: int, length: int) -> None:
        """Drop the tokens of an idle sequence from position `length` on; forks that stand on them keep them."""
        self._check_idle(seq, "rewind")
        self._cut(seq, length)
        self.log.write("rewind", seq, length=length)

    def _take_out(self, run: Run) -> None:
        """The run ends without an event."""
        if run in self.scheduler.active and not run.tokens:
            self._count.gave_up(run.seq, self.tree.kv(run.seq))
        self.scheduler.remove(run, State.CANCELLED)

    def _cut(self, seq: int, length: int) -> None:
        self.tree.truncate(seq, length)
        self.prompts.truncated(seq, length)
        self._count.dropped(seq, length)

    def preempt(self, seq: int) -> None:
        """Take a running sequence out and drop its private KV, as for want of room. It goes on by itself, and the same."""
        self.tree.length(seq)  # known and live
        run = self.scheduler.by_seq.get(seq)
        if run is None or run not in self.scheduler.active:
            raise EngineError(
                f"preempt(seq={seq}): it is {self.state(seq).value}; only a running one can be preempted"
            )
        self.scheduler.preempt(run)

    def has_work(self) -> bool:
        return self.loop.has_work()

    @torch.inference_mode()
    def step(self) -> list[Stopped]:
        """One forward. Returns the sequences that stopped in it.

        If anything raises before commit, nothing has changed and the step can be tried again. A stop callback that
        raises is reported when all tokens of the step are in: its sequence goes on, other events come with the next step.
        """
        with self._alone("step"):
            return self.loop.step(self.runner, self.policy_version)

    # -- weights and scores -----------------------------------------------------------------------------------------

    @torch.inference_mode()
    def load_weights(self, named_tensors: Iterable[tuple[str, object]], version: int) -> None:
        """Replace weights in place. All KV is dropped, and live sequences that had some are stale until scored.

        Nothing may be decoding; sequences that wait for a tool or for a fork may live on. If it breaks off after the
        first weight was written, nothing can be submitted or scored until all weights have been loaded again.
        """
        if self.loop.has_work():
            raise EngineError(
                f"load_weights: {self.loop.decoding} sequences are decoding; let them stop or cancel them first"
            )
        start = time.perf_counter()
        try:
            self.loaded = self.model.load(named_tensors)
        except ModelError:
            raise  # found before anything was written
        except BaseException:
            self._torn = True
            self.tree.new_version(version)
            raise
        self._torn &= not self.loaded >= set(self.model.targets)
        self.policy_version = version
        self.tree.new_version(version)
        self.runner.weights_changed()
        self.runner.idle()
        self._count.new_weights()
        self._load_seconds = time.perf_counter() - start
        self.log.write("version", version=version)

    @torch.inference_mode()
    def score(self, seqs: Sequence[int], temperature: float = 1.0) -> list[Scored]:
        """One pass over the union of the sequences' paths: every stored token is run once, KV is left behind.

        A fork's own first row repeats the token before the fork (one token each); the last token of a sequence is
        not run, as nothing follows it. If the pool is full, other KV gives way, running sequences go on later, and in
        the end the KV of what has been scored goes, but for the path that is being run: that must fit.
        """
        with self._alone("score"):
            self._check_whole("score")
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

    # -- facts ------------------------------------------------------------------------------------------------------

    def stats(self) -> dict[str, float]:
        """See the protocol; beyond it packed_bytes: the C++ copy of the weights."""
        tree, plan, pool, layers = self.tree, self.scheduler, self.runner.pool, self.model.native
        return {
            **self._count.as_dict(),
            "preemptions": plan.preemptions,
            "evicted_tokens": plan.evicted_tokens,
            "live_sequences": tree.live_sequences,
            "live_nodes": tree.live_nodes,
            "running": len(plan.active),
            "waiting": len(plan.waiting),
            "kv_tokens": tree.tokens_held,
            "kv_bytes": pool.bytes,
            "kv_used_bytes": tree.used * pool.block_bytes,
            "blocks_used": tree.used,
            "blocks_free": tree.free,
            "blocks_peak": tree.peak,
            "block_bytes": pool.block_bytes,
            "load_seconds": self._load_seconds,
            "packed_bytes": 0 if layers is None else layers.packed_bytes,
            "pack_seconds": 0.0 if layers is None else layers.pack_seconds,
        }

    @property
    def events(self) -> deque[Event]:
        """The last things that were asked and decided, oldest first."""
        return self.log.events

    def _check_whole(self, what: str) -> None:
        if self._torn:
            raise EngineError(
                f"{what}: the last load_weights broke off, so some weights are old and some new; load all of them again"
            )

    def _check_idle(self, seq: int, what: str) -> None:
        if seq in self.scheduler.by_seq or self.loop.is_late(seq):
            raise EngineError(
                f"{what}(seq={seq}): it is decoding already; wait for its Stopped event or cancel it"
            )
