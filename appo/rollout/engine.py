"""The one contract between rollouts and whatever runs the model.

A *sequence* is a handle (an int) for one growing line of tokens inside the engine's tree. Forking
gives a new handle that shares everything before the fork. All positions are absolute: the prompt's
first token is 0.

Life of a sequence: `add_prompt` → `fork` (roots) → `submit` → tokens appear in `step()` events →
stopped, then `append` (tool result) + `submit` again, or `fork` (branches), and finally `release`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np


@dataclass(frozen=True)
class SamplingParams:
    """How to sample.

    Temperature 0 means greedy. `stop` sees every sampled id and returns True to stop after it.
    """

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0 = off
    stop_token_ids: frozenset[int] = frozenset()
    stop: Callable[[int], bool] | None = field(default=None, compare=False)


@dataclass(frozen=True)
class SequenceStopped:
    """A submitted sequence stopped decoding. Arrays cover the tokens sampled since `submit`.

    reason: "stop_token" (last id is in stop_token_ids) | "stop" (callback) | "length"
    (max_new_tokens or context)
    logprobs, entropy: float32, at the sampling temperature (entropy of the full-vocabulary
    distribution, nats)
    """

    seq: int
    token_ids: list[int]
    logprobs: list[float]
    entropy: list[float]
    reason: Literal["stop_token", "stop", "length"]
    policy_version: int


@dataclass(frozen=True)
class Scored:
    """Statistics of tokens 1 … len-1 of a sequence under the weights of `policy_version`.

    Index 0 = token 1.
    """

    logprobs: np.ndarray
    entropy: np.ndarray
    policy_version: int


class RolloutEngine(Protocol):
    """What `rollout.tree` needs.

    Every method raises EngineError on misuse (unknown handle, write after release …).
    """

    policy_version: int
    max_context: int

    def add_prompt(self, token_ids: Sequence[int]) -> int:
        """New sequence without parent. Nothing is computed yet."""

    def fork(self, seq: int, at: int) -> int:
        """New sequence that inherits tokens < `at` (1 ≤ at ≤ length) of `seq`, alive or decoding.

        O(1).
        """

    def append(self, seq: int, token_ids: Sequence[int]) -> None:
        """Add given tokens (a tool result).

        They are prefilled when the sequence is next submitted.
        """

    def submit(self, seq: int, params: SamplingParams, seed: int) -> None:
        """Start decoding.

        The token at absolute position t is drawn with noise from (seed, t): independent of
        batching.
        """

    def cancel(self, seq: int) -> None:
        """Stop decoding without an event.

        The sequence stays usable; sampled tokens are dropped from it.
        """

    def step(self) -> list[SequenceStopped]:
        """One forward for what is runnable.

        Prefill chunks + one token of each decoding sequence.
        """

    def has_work(self) -> bool:
        """True while any submitted sequence has not stopped."""

    def score(self, seqs: Sequence[int], temperature: float = 1.0) -> list[Scored]:
        """Current-weight statistics for every token of the sequences, in one prefix-shared pass.

        Rebuilds their KV.
        """

    def release(self, seq: int) -> None:
        """Give the handle back. Memory is freed when no descendant needs it."""

    def length(self, seq: int) -> int:
        """Tokens of the sequence, inherited ones included."""

    def load_weights(self, named_tensors: Iterable[tuple[str, object]], version: int) -> None:
        """Replace weights in place (Hugging Face names). KV of older versions becomes invalid.

        An engine with a true attribute `accepts_adapters` also takes `<module>.lora_A` and
        `<module>.lora_B` (scaling folded in) and applies them; one with an attribute `loaded` keeps
        there the names it has written.
        """

    def stats(self) -> dict[str, float]:
        """Counters since construction, and what is held now.

        Every engine has

        prefill_tokens       given tokens that were run
        decode_tokens        sampled tokens that were run
        scored_tokens        tokens that were run for `score`
        prefix_hits_tokens   prompt tokens taken from another prompt · forks · live_sequences
        load_seconds         of the last load_weights

        and one that owns its KV (the native one) also

        kv_tokens            positions with KV, each counted once
        kv_used_bytes, kv_bytes   of blocks in use · allocated
        blocks_used, blocks_free, blocks_peak, block_bytes   the pool in blocks of 16 positions
                             (free: up to the limit, or to the peak without one)
        tokens_saved         tokens that as many independent sequences, each with KV of its own,
                             would have run more
        preemptions          running sequences sent back for want of room · evicted_tokens: KV
                             dropped for want of room
        steps, running, waiting, live_nodes
        pack_seconds         of load_seconds: copying weights into the kernels' layout
        """
