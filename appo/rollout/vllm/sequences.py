"""Who has which tokens, and under which weights they were last computed. vLLM itself knows requests only.

A fork is a copy of token ids; that its KV is shared is up to vLLM's prefix cache, block by block.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from appo.errors import EngineError, StaleWeightsError
from appo.rollout.engine import SamplingParams

Reason = Literal["stop_token", "stop", "length"]


class Sequence:
    """One handle. `computed`: policy version under which vLLM last computed some of it, None: never."""

    __slots__ = ("handle", "parent", "tokens", "computed")

    def __init__(self, handle: int, parent: Sequence | None, tokens: list[int]):
        self.handle, self.parent, self.tokens = handle, parent, tokens
        self.computed: int | None = None

    def chain(self) -> Iterator[Sequence]:
        """This sequence and all it was forked from."""
        node: Sequence | None = self
        while node is not None:
            yield node
            node = node.parent


@dataclass
class Run:
    """A submitted sequence and what it has drawn since. `end`: length at which it must stop."""

    key: str
    seq: Sequence
    params: SamplingParams
    version: int
    start: int
    end: int
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    entropy: list[float] = field(default_factory=list)
    counted: bool = False  # its prefill is in the statistics

    def take(self, token: int, logprob: float, entropy: float | None) -> Reason | None:
        """Add a drawn token; → why to stop after it, if so. The callback sees every id, also a stop token."""
        self.tokens.append(token)
        self.logprobs.append(logprob)
        if entropy is not None:
            self.entropy.append(entropy)
        self.seq.tokens.append(token)
        asked = self.params.stop is not None and self.params.stop(token)
        if token in self.params.stop_token_ids:
            return "stop_token"
        if asked:
            return "stop"
        return "length" if len(self.seq.tokens) >= self.end else None


class Sequences:
    """Live handles."""

    def __init__(self) -> None:
        self.by_handle: dict[int, Sequence] = {}
        self._next = 0

    def add(self, parent: Sequence | None, tokens: list[int]) -> Sequence:
        seq = Sequence(self._next, parent, tokens)
        self.by_handle[self._next] = seq
        self._next += 1
        return seq

    def get(self, handle: int) -> Sequence:
        """Raises EngineError for a handle that is unknown or was released."""
        seq = self.by_handle.get(handle)
        if seq is None:
            known = isinstance(handle, int) and 0 <= handle < self._next
            raise EngineError(
                f"sequence {handle!r} {'was released' if known else 'is unknown'}; use a live handle"
            )
        return seq

    def fork(self, handle: int, at: int, version: int) -> Sequence:
        """A child that inherits tokens < at."""
        parent = self.get(handle)
        if not 1 <= at <= len(parent.tokens):
            raise EngineError(
                f"fork(seq={handle}, at={at}): at must be in 1 … {len(parent.tokens)}, the sequence's length"
            )
        check_fresh(parent, version, "fork")
        return self.add(parent, parent.tokens[:at])

    def release(self, handle: int) -> None:
        del self.by_handle[self.get(handle).handle]


def check_fresh(seq: Sequence, version: int, what: str) -> None:
    """Raise StaleWeightsError if any of the sequence was computed under other weights than those of `version`."""
    old = [s.computed for s in seq.chain() if s.computed not in (None, version)]
    if old:
        raise StaleWeightsError(
            f"{what}(seq={seq.handle}): it was computed under policy version {old[0]}, the weights are those of version "
            f"{version}; call score([seq]) first, or start again from add_prompt"
        )


def check_params(p: SamplingParams, cut_allowed: bool) -> None:
    """Raise EngineError for what vLLM would change silently or could not report on."""
    if p.max_new_tokens < 1:
        raise EngineError(f"max_new_tokens={p.max_new_tokens}: must be at least 1")
    if not (p.temperature == 0 or p.temperature >= 0.01):
        raise EngineError(
            f"temperature={p.temperature}: must be 0 (greedy) or at least 0.01, to which vLLM would raise it"
        )
    if not 0 < p.top_p <= 1 or p.top_k < 0:
        raise EngineError(
            f"top_p={p.top_p}, top_k={p.top_k}: need 0 < top_p <= 1 and top_k >= 0 (0: off)"
        )
    if not cut_allowed and (p.top_p < 1 or p.top_k > 0):
        raise EngineError(
            f"top_p={p.top_p}, top_k={p.top_k}: vLLM reports log-probs after the cut only, so the entropy of the full "
            "distribution is unknown; use statistics='exact', or top_p=1 and top_k=0"
        )
