"""What a tool is.

A name, the tag that calls it, and a function from text to text that may fail in a typed way.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class ToolResult:
    """Outcome of one call.

    `output` is what the model will read; `ok` is False when the tool reported a failure.

    error_kind  None, "crash", "timeout", "unavailable", "bad_request" or "nonzero_exit"
    """

    output: str
    ok: bool
    wall_s: float
    error_kind: str | None = None
    truncated: bool = False


class Tool(Protocol):
    """What a model may call.

    A tool is safe to call from several threads at once and never raises for what the model wrote.

    Tools that ship with the package keep this contract themselves; `appo.tools.own` makes a user's
    function keep it.
    """

    name: str  # also the tag: <name>…</name>
    description: str  # sentences for the system prompt: what it does and how it is called

    def __call__(self, argument: str) -> ToolResult:
        """Run the tool on what stood between its tags."""

    def close(self) -> None:
        """Give back what the tool holds (processes, folders); it is not called again."""


@dataclass(frozen=True)
class ToolSpec:
    """A tool before it is made: what prompt, parser and checks need to know.

    description  goes into the system prompt as it is
    max_chars    of output that the model gets to read
    make         the tool itself, ready to be called; may take time and may raise ConfigError
    example      messages that show one call, for the prompt (data.example)
    """

    name: str
    description: str
    max_chars: int
    make: Callable[[], Tool]
    example: tuple[Mapping[str, str], ...] = ()
