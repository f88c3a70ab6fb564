"""What any engine needs to take submissions.

Valid ids, the rule when to stop, and one step at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

from appo.errors import EngineError
from appo.rollout.engine import SamplingParams

Reason = Literal["stop_token", "stop", "length"]


class StopRule:
    """When a submission is over.

    A base of an engine's own record of it, which has the attributes below.
    """

    params: SamplingParams
    end: int  # length at which it must stop

    @property
    def length(self) -> int:
        """Tokens of the sequence now."""
        raise NotImplementedError

    def reason_to_stop(self, token: int) -> Reason | None:
        """After `token`, the last one taken. The callback sees every id, a stop token too."""
        asked = self.params.stop is not None and self.params.stop(token)
        return "stop" if asked and token not in self.params.stop_token_ids else self.at_end(token)

    def at_end(self, token: int) -> Reason | None:
        """The reason to stop that needs no callback."""
        if token in self.params.stop_token_ids:
            return "stop_token"
        return "length" if self.length >= self.end else None


class ReentrancyGuard:
    """Refuses a step or score inside a step (from a stop callback)."""

    def __init__(self) -> None:
        self._busy = False

    @contextmanager
    def __call__(self, operation: str) -> Iterator[None]:
        """A context in which `operation` runs; EngineError inside another one."""
        if self._busy:
            raise EngineError(f"{operation}: a step is under way (called from a stop callback?)")
        self._busy = True
        try:
            yield
        finally:
            self._busy = False


def checked_ids(token_ids: Sequence[int], vocab: int) -> list[int]:
    """The ids as ints; all are in the vocabulary."""
    ids = [int(t) for t in token_ids]
    bad = next((t for t in ids if not 0 <= t < vocab), None)
    if bad is not None:
        raise EngineError(f"token id {bad} is outside the vocabulary of {vocab}")
    return ids
