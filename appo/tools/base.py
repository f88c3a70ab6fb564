"""What a tool is: a name, the tag that calls it, and a function from text to text that may fail in a typed way."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class ToolResult:
    """Outcome of one call. `output` is what the model will read; `ok` is False when the tool reported a failure."""

    output: str
    ok: bool
    wall_s: float
    error_kind: str | None = (
        None  # None | "crash" | "timeout" | "unavailable" | "bad_request" | "nonzero_exit"
    )
    truncated: bool = False


class Tool(Protocol):
    """A tool is safe to call from several threads at once and never raises for what the model wrote."""

    name: str  # also the tag: <name>…</name>
    description: str  # one sentence for the system prompt

    def __call__(self, argument: str) -> ToolResult: ...

    def close(self) -> None: ...
