"""Who has which tokens, and under which weights they were last computed.

vLLM itself knows requests only.

A fork is a copy of token ids; that its KV is shared is up to vLLM's prefix cache, block by block.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from appo.errors import EngineError, StaleWeightsError
from appo.rollout.engine import SamplingParams
from appo.rollout.submission import Reason, StopRule


class Sequence:
    """One line of tokens.

    Its own positions begin at `base`: with the token before the fork, as in the native engine.

    seen    positions before it were computed under the weights as they are
    lost    positions before it were under older ones; those from `seen` on have not been since
    """

    __slots__ = ("handle", "parent", "base", "tokens", "seen", "lost")

    def __init__(self, handle: int, parent: Sequence | None, base: int, tokens: list[int]):
        while parent is not None and base <= parent.base:
            parent = parent.parent  # nothing of this one is inherited
        self.handle, self.tokens = handle, tokens
        self.parent: Sequence | None = parent
        self.base: int = base
        self.seen = self.lost = base

    def path(self, end: int) -> Iterator[tuple[Sequence, int]]:
        """What positions before `end` belong to, nearest first.

        (sequence, up to which position).
        """
        node: Sequence | None = self
        while node is not None:
            yield node, end
            end, node = min(end, node.base), node.parent

    def computed(self, end: int) -> None:
        """Positions before `end` were run under the weights as they are."""
        for node, count in self.path(end):
            node.seen = max(node.seen, count)

    def stale(self, end: int) -> bool:
        """Whether a position before `end` was computed under older weights and not since."""
        return any(min(node.lost, count) > node.seen for node, count in self.path(end))


@dataclass
class DecodeRequest(StopRule):
    """A submitted sequence and what it has drawn since.

    end        length at which it must stop
    finished   vLLM is done with it
    reason     why it stopped, once it has
    """

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
    finished: bool = False
    reason: Reason | None = None

    def take(self, token: int, logprob: float, entropy: float | None) -> None:
        """Add a drawn token."""
        self.tokens.append(token)
        self.logprobs.append(logprob)
        if entropy is not None:
            self.entropy.append(entropy)
        self.seq.tokens.append(token)
        self.seq.computed(len(self.seq.tokens) - 1)

    @property
    def length(self) -> int:
        """Tokens of the sequence, drawn ones included."""
        return len(self.seq.tokens)


class Sequences:
    """Live handles."""

    def __init__(self) -> None:
        self.by_handle: dict[int, Sequence] = {}
        self._next = 0

    def add(self, parent: Sequence | None, base: int, tokens: list[int]) -> Sequence:
        """A new sequence under the next handle; `parent`: the one it shares tokens < base with."""
        seq = self.by_handle[self._next] = Sequence(self._next, parent, base, tokens)
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
        check_fresh(parent, at - 1, version, "fork")
        return self.add(parent, at - 1, parent.tokens[:at])

    def truncate(self, handle: int, length: int) -> None:
        """Drop tokens from position `length` on.

        Forks may stand on them, so a fork takes the handle.
        """
        old = self.get(handle)
        if length == len(old.tokens):
            return
        self.by_handle[handle] = Sequence(handle, old, length - 1, old.tokens[:length])

    def new_weights(self) -> None:
        """What was computed is stale from now on."""
        lines = self.by_handle.values()
        nodes = {id(node): node for line in lines for node, _ in line.path(len(line.tokens))}
        for node in nodes.values():
            node.lost, node.seen = max(node.lost, node.seen), node.base

    def release(self, handle: int) -> None:
        """Give the handle back; EngineError when it is unknown or was released."""
        del self.by_handle[self.get(handle).handle]


def check_fresh(seq: Sequence, end: int, version: int, operation: str) -> None:
    """Raise StaleWeightsError if a position before `end` is stale.

    version: that of the weights as they are
    """
    if seq.stale(end):
        raise StaleWeightsError(
            f"{operation}(seq={seq.handle}): it was computed before version {version}; call score([{seq.handle}]) first, or "
            "start again from add_prompt"
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
