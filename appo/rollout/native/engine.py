"""NativeEngine: the rollout protocol over the segment tree, for CPU and one device.

    engine = NativeEngine(Path("model"), dtype="bfloat16")
    prompt = engine.add_prompt(ids)
    roots = [engine.fork(prompt, at=len(ids)) for _ in range(8)]      # the prompt is prefilled once
    for i, seq in enumerate(roots):
        engine.submit(seq, SamplingParams(max_new_tokens=64), seed=i)
    while engine.has_work():
        for event in engine.step(): ...

One loop: plan → forward → sample → commit. The tree changes only between forwards.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal

import torch

from appo.errors import EngineError, ModelError, StaleWeightsError
from appo.rollout.engine import SamplingParams, Scored, Stopped
from appo.rollout.native.batch import Batch, Unit
from appo.rollout.native.kv import KVStore
from appo.rollout.native.model import Model
from appo.rollout.native.sampler import Sampler, uniform
from appo.rollout.native.scheduler import Run, Scheduler
from appo.rollout.native.scoring import TreeScore, positions_needed
from appo.rollout.native.tree import Node, Tree
from appo.rollout.native.weights import read_config, read_tensors

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
BUCKET = 8  # deterministic mode: rows are padded to a multiple of this (GEMMs with 1-3 rows take another path)


class NativeEngine:
    """See `appo.rollout.engine.RolloutEngine` for the contract of each method."""

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
        runner: Literal["auto", "torch", "native"] = "auto",
    ):
        """Load a Hugging Face folder (config.json + safetensors).

        max_batch: sequences that decode together · prefill_chunk: prefill tokens per step · kv_tokens: limit on cached
        tokens (None: memory) · max_context: longest sequence (default: the model's) · deterministic: pad rows to
        buckets · share_prompts: a new prompt reuses the KV of a live one with a common prefix of 16 tokens or more ·
        fp32_logits: halve the error of bfloat16 logprobs for about a tenth of the speed (see `Model`) · runner: what
        runs the layers, "native" (C++), "torch" or "auto": C++ where this machine can.
        """
        if dtype not in DTYPES:
            raise EngineError(f"dtype={dtype!r}: use one of {', '.join(DTYPES)}")
        for name, value in (
            ("max_batch", max_batch),
            ("prefill_chunk", prefill_chunk),
            ("kv_tokens", kv_tokens),
        ):
            if value is not None and value < 1:
                raise EngineError(f"{name}={value}: must be at least 1")
        start = time.perf_counter()
        config = read_config(model_dir)
        self.max_context = max_context or config.max_positions
        if not 2 <= self.max_context <= config.max_positions:
            raise EngineError(
                f"max_context={max_context}: the model's positions allow 2 … {config.max_positions}"
            )
        self.config, self.policy_version, self.deterministic = config, policy_version, deterministic
        self.share_prompts = share_prompts
        where = torch.device(device)
        with torch.inference_mode():
            self.model = Model(config, DTYPES[dtype], where, self.max_context, fp32_logits, runner)
            self._load_all(model_dir)
            self.store = KVStore(
                config.layers,
                config.kv_heads,
                config.head_dim,
                DTYPES[dtype],
                where,
                max_slots=max_batch,
            )
            self.sampler = Sampler(config.vocab, where)
        self.loaded: set[str] = set()  # names written by the last load_weights
        self.tree = Tree()
        self.scheduler = Scheduler(self.store, max_batch, prefill_chunk, kv_tokens)
        self._batch: Batch | None = None
        self._steady = (
            False  # the batch is one row of every active run: the next one may be it, moved on
        )
        self._runs: list[Run] = []  # runs of the batch's sampled units, in row order
        self._out_rows: torch.Tensor | None = None
        self._count = dict.fromkeys(
            (
                "prefill_tokens",
                "decode_tokens",
                "scored_tokens",
                "forks",
                "prefix_hits_tokens",
                "steps",
            ),
            0,
        )
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
        ids = self._checked(token_ids)
        if not ids:
            raise EngineError("add_prompt: token_ids is empty; a prompt needs at least one token")
        if len(ids) > self.max_context:
            raise EngineError(
                f"prompt of {len(ids)} tokens is longer than max_context={self.max_context}"
            )
        node, shared = self.tree.add_prompt(ids, self.share_prompts)
        self._count["prefix_hits_tokens"] += shared
        assert node.handle is not None
        return node.handle

    def fork(self, seq: int, at: int) -> int:
        """New handle inheriting tokens < at; it will run token at - 1 as its first row."""
        node = self.tree.get(seq)
        if not 1 <= at <= node.length:
            raise EngineError(
                f"fork(seq={seq}, at={at}): at must be in 1 … {node.length}, the sequence's length"
            )
        self._check_fresh(node, "fork")
        child = self.tree.fork(node, at)
        self._count["forks"] += 1
        assert child.handle is not None
        return child.handle

    def append(self, seq: int, token_ids: Sequence[int]) -> None:
        """Add given tokens; they are prefilled with the last sampled one at the next submit (or when a fork needs them)."""
        node = self.tree.get(seq)
        if seq in self.scheduler.by_seq:
            raise EngineError(
                f"append(seq={seq}): it is decoding; wait for its Stopped event or cancel it"
            )
        ids = self._checked(token_ids)
        if node.length + len(ids) > self.max_context:
            raise EngineError(
                f"append(seq={seq}): {node.length} + {len(ids)} tokens do not fit max_context={self.max_context}"
            )
        node.tokens += ids

    def release(self, seq: int) -> None:
        """Give the handle back (a running sequence is cancelled); frees what no descendant needs."""
        self.cancel(seq)
        for node in self.tree.release(self.tree.get(seq)):
            self.store.drop(node)
        if self.scheduler.waiting:
            self.scheduler.changed = True  # there may be room now

    def length(self, seq: int) -> int:
        """Tokens of the sequence, inherited ones included."""
        return self.tree.get(seq).length

    def tokens(self, seq: int) -> list[int]:
        """All token ids of the sequence."""
        return self.tree.get(seq).path_tokens()

    # -- running ----------------------------------------------------------------------------------------------------

    def submit(self, seq: int, params: SamplingParams, seed: int) -> None:
        """Queue the sequence for decoding."""
        node = self.tree.get(seq)
        if seq in self.scheduler.by_seq:
            raise EngineError(f"submit(seq={seq}): it is already decoding")
        _check_params(params)
        self._check_fresh(node, "submit")
        if node.length >= self.max_context:
            raise EngineError(
                f"submit(seq={seq}): {node.length} tokens leave no room in max_context={self.max_context}; "
                f"a token more needs {node.length + 1}"
            )
        end = min(node.length + params.max_new_tokens, self.max_context)
        limit = self.scheduler.kv_tokens
        if limit is not None and end - 1 > limit:
            raise EngineError(
                f"submit(seq={seq}): alone it needs {end - 1} tokens of KV, kv_tokens={limit} is less"
            )
        self.scheduler.add(Run(seq, node, params, int(seed), node.length, end))

    def cancel(self, seq: int) -> None:
        """Stop decoding and drop what was sampled since submit; no effect on a sequence that is not decoding."""
        node = self.tree.get(seq)
        run = self.scheduler.by_seq.get(seq)
        if run is None:
            return
        self.scheduler.remove(run)
        if run.tokens and self.tree.truncate(node, run.start) is node:
            self.store.shrink(node, min(node.kv, len(node.tokens) - 1))

    def has_work(self) -> bool:
        return bool(self.scheduler.by_seq)

    @torch.inference_mode()
    def step(self) -> list[Stopped]:
        """One forward. Returns the sequences that stopped in it."""
        if not self.scheduler.by_seq:
            return []
        batch = self._next_batch()
        hidden = self.model.forward(batch.ids, batch.positions, batch.attention, self._out_rows)
        for unit in batch.units:
            self.store.written(unit.node, unit.start + unit.count, self.policy_version)
        self._count["steps"] += 1
        self._count_tokens(batch)
        if not self._runs:
            return []
        logits = self.model.logits(hidden)[: len(self._runs)]
        noise = [uniform(run.seed, run.node.length) for run in self._runs]
        return self._commit(*self.sampler.sample(logits, noise))

    def _next_batch(self) -> Batch:
        """The last plan moved one token on if nothing but tokens changed, else a new plan."""
        batch = self._batch
        if batch is not None and self._steady and not self.scheduler.changed:
            for unit in batch.units:
                self.store.room(unit.node, unit.node.kv + 1)
            if batch.epoch == self.store.epoch:
                batch.advance([run.tokens[-1] for run in self._runs])
                return batch
        units = self.scheduler.plan()
        decode_only = all(u.single for u in units)
        if decode_only:
            self.scheduler.localise()
        batch = self._batch = Batch(
            units, self.store, self.config.heads, self._padded(sum(u.count for u in units))
        )
        sampled = [u for u in batch.units if u.sampled]
        by_node = {run.node.id: run for run in self.scheduler.active}
        self._runs = [by_node[u.node.id] for u in sampled]
        self._steady = decode_only and len(sampled) == len(units) == len(self.scheduler.active)
        self._out_rows = self._rows_out(batch, sampled)
        self.sampler.rows([run.params for run in self._runs])
        return batch

    def _rows_out(self, batch: Batch, sampled: list[Unit]) -> torch.Tensor | None:
        if len(sampled) == batch.padded:
            return None
        rows = [batch.first_row[u.node.id] + u.count - 1 for u in sampled]
        rows += rows[:1] * (self._padded(len(rows)) - len(rows))
        return torch.tensor(rows, dtype=torch.long, device=self.store.device)

    def _padded(self, rows: int) -> int:
        return -(-rows // BUCKET) * BUCKET if self.deterministic else rows

    def _count_tokens(self, batch: Batch) -> None:
        total = batch.rows
        decoded = sum(1 for run in self._runs if run.tokens)
        self._count["decode_tokens"] += decoded
        self._count["prefill_tokens"] += total - decoded

    def _commit(
        self, tokens: list[int], logprobs: list[float], entropy: list[float]
    ) -> list[Stopped]:
        events = []
        for run, token, logprob, ent in zip(self._runs, tokens, logprobs, entropy):
            run.tokens.append(token)
            run.logprobs.append(logprob)
            run.entropy.append(ent)
            run.node.tokens.append(token)
            reason = self._stop_reason(run, token)
            if reason is not None:
                self.scheduler.remove(run)
                events.append(
                    Stopped(
                        run.seq, run.tokens, run.logprobs, run.entropy, reason, self.policy_version
                    )
                )
        return events

    def _stop_reason(self, run: Run, token: int) -> Literal["stop_token", "stop", "length"] | None:
        asked = run.params.stop is not None and run.params.stop(
            token
        )  # sees every id, also a stop token
        if token in run.params.stop_token_ids:
            return "stop_token"
        if asked:
            return "stop"
        return "length" if run.node.length >= run.end else None

    # -- weights and scores -----------------------------------------------------------------------------------------

    @torch.inference_mode()
    def load_weights(self, named_tensors: Iterable[tuple[str, object]], version: int) -> None:
        """Replace weights in place; all KV is dropped and sequences that had some are stale until scored."""
        if self.scheduler.by_seq:
            raise EngineError(
                f"load_weights: {len(self.scheduler.by_seq)} sequences are decoding; let them stop or cancel them first"
            )
        start = time.perf_counter()
        self.loaded = self.model.load(named_tensors)
        self.policy_version = version
        for node in self.tree.nodes.values():
            if node.kv:
                self.store.drop(node)
                node.stale = True
        self._load_seconds = time.perf_counter() - start

    @torch.inference_mode()
    def score(self, seqs: Sequence[int], temperature: float = 1.0) -> list[Scored]:
        """One pass over the union of the sequences' paths: every stored token is run once, KV is left behind.

        A fork's own first row repeats the token before the fork (one token each); the last token of a sequence is
        not run, as nothing follows it.
        """
        if not temperature > 0:
            raise EngineError(f"score: temperature={temperature}; must be above 0")
        leaves = [self.tree.get(seq) for seq in seqs]
        for seq in seqs:
            if seq in self.scheduler.by_seq:
                raise EngineError(
                    f"score: sequence {seq} is decoding; wait for its Stopped event or cancel it"
                )
        needs = positions_needed(leaves)
        limit = self.scheduler.kv_tokens
        more = sum(max(0, count - node.kv) for node, count in needs)
        if limit is not None and self.store.tokens + more > limit:
            free = limit - self.store.tokens
            raise EngineError(
                f"score needs {more} tokens of KV, {free} of kv_tokens={limit} are free; release sequences"
            )
        score = TreeScore(self.model, self.store, self.policy_version, temperature)
        self._count["scored_tokens"] += score.run(needs, self.scheduler.prefill_chunk, self._padded)
        return [score.of(leaf) for leaf in leaves]

    # -- facts ------------------------------------------------------------------------------------------------------

    def stats(self) -> dict[str, float]:
        """Counters since construction and what is held now (tokens, bytes, seconds)."""
        layers = self.model.native
        return {
            **self._count,
            "live_sequences": len(self.tree.by_handle),
            "live_nodes": len(self.tree.nodes),
            "running": len(self.scheduler.active),
            "waiting": len(self.scheduler.waiting),
            "kv_tokens": self.store.tokens,
            "kv_copied_tokens": sum(node.off for node in self.store.owner if node is not None),
            "kv_bytes": self.store.bytes,
            "load_seconds": self._load_seconds,
            "packed_bytes": 0 if layers is None else layers.packed_bytes,
            "pack_seconds": 0.0 if layers is None else layers.pack_seconds,
        }

    def _checked(self, token_ids: Sequence[int]) -> list[int]:
        ids = [int(t) for t in token_ids]
        bad = next((t for t in ids if not 0 <= t < self.config.vocab), None)
        if bad is not None:
            raise EngineError(f"token id {bad} is outside the vocabulary of {self.config.vocab}")
        return ids

    def _check_fresh(self, node: Node, what: str) -> None:
        if node.stale or any(a.stale for a, _ in node.chain()):
            raise StaleWeightsError(
                f"{what}(seq={node.handle}): its KV was computed before version {self.policy_version}; "
                "call score([seq]) first, or start again from add_prompt"
            )


def _check_params(p: SamplingParams) -> None:
    if p.max_new_tokens < 1:
        raise EngineError(f"max_new_tokens={p.max_new_tokens}: must be at least 1")
    if not p.temperature >= 0:
        raise EngineError(f"temperature={p.temperature}: must be 0 (greedy) or above")
    if not 0 < p.top_p <= 1 or p.top_k < 0:
        raise EngineError(
            f"top_p={p.top_p}, top_k={p.top_k}: need 0 < top_p <= 1 and top_k >= 0 (0: off)"
        )
