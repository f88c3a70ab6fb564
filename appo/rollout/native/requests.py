"""What is asked for a sequence, what it has sampled since, and where it stands."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from appo.rollout.engine import SamplingParams
from appo.rollout.submission import StopRule


class SequenceState(Enum):
    """Where a sequence stands.

    Its KV is kept in all states but DONE, as long as the pool has room.
    """

    WAITING = "waiting"  # submitted; runs when there is room
    PREFILL = "prefill"  # running; some of its tokens have no KV yet
    DECODE = "decode"  # running; draws a token with every step
    TOOL_WAIT = "tool_wait"  # stopped by its callback: a result will be appended
    # a prompt, a fork not submitted yet, or at its end: may be forked, scored, submitted
    FORK_READY = "fork_ready"
    CANCELLED = "cancelled"  # as FORK_READY, without what it had sampled
    DONE = "done"  # released


@dataclass(eq=False)
class Request(StopRule):
    """A submission and what it has sampled. `order` counts submissions."""

    seq: int
    params: SamplingParams
    seed: int
    start: int  # length at submit
    end: int  # length at which it must stop
    order: int
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    entropy: list[float] = field(default_factory=list)

    @property
    def length(self) -> int:
        """Tokens of the sequence, sampled ones included."""
        return self.start + len(self.tokens)

    def take(self, token: int, logprob: float, entropy: float) -> None:
        """Add a sampled token; log-probability and entropy in nats."""
        self.tokens.append(token)
        self.logprobs.append(logprob)
        self.entropy.append(entropy)
