"""What the policy wrote, as blocks: the format gate and the answer.

Everything here looks at *sampled* text only. A trajectory arrives as spans `(text, sampled)`; a tag
inside a tool result is text, and a tag cannot begin in one sampled run and end behind a tool
result. The block rule is the one of the live parser: while a block is open, only its own closing
tag counts. Blocks are `<answer>` and the tags of tools: `<python>`, `<search>`, and those given as
`tools`.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

Spans = Sequence[tuple[str, bool]]
Strictness = Literal["none", "answer", "full"]

BLOCKS = ("python", "search", "answer")
_END = re.compile(r"(?:\s|<\|[^|<>]*\|>|</s>|<eos>)*\Z")  # blanks and end-of-sequence tokens


@dataclass(frozen=True)
class FormatCheck:
    """`reason` says what is wrong, or is empty."""

    ok: bool
    reason: str = ""


@dataclass(frozen=True)
class Block:
    """A block in sampled run number `run`: text[start:stop] lies between its tags.

    Stop is None when never closed.
    """

    tag: str
    run: int
    start: int
    stop: int | None


def sampled_runs(spans: Spans) -> list[tuple[str, bool]]:
    """Join neighbours of the same kind.

    A fork may cut a tag in two, and both halves were sampled.
    """
    runs: list[tuple[str, bool]] = []
    for text, sampled in spans:
        if runs and runs[-1][1] == sampled:
            runs[-1] = (runs[-1][0] + text, sampled)
        elif text:
            runs.append((text, sampled))
    return runs


@functools.cache
def _tag(tools: tuple[str, ...]) -> re.Pattern[str]:
    """A tag of the protocol: (slash, name)."""
    names = "|".join(dict.fromkeys(("think", "result", *BLOCKS, *tools)))
    return re.compile(f"<(/?)({names})>")


def blocks(runs: Spans, tools: tuple[str, ...] = ()) -> Iterator[Block]:
    """All blocks of the sampled runs, in order."""
    for number, (text, sampled) in enumerate(runs):
        at = 0
        while sampled and (found := _next_open(text, at, tools)):
            tag, start = found
            stop = text.find(f"</{tag}>", start)
            yield Block(tag, number, start, stop if stop >= 0 else None)
            if stop < 0:
                break
            at = stop + len(tag) + 3


def _next_open(text: str, at: int, tools: tuple[str, ...]) -> tuple[str, int] | None:
    for match in _tag(tools).finditer(text, at):
        if not match[1] and match[2] not in ("think", "result"):
            return match[2], match.end()
    return None


def format_ok(
    spans: Spans, strictness: Strictness = "answer", tools: tuple[str, ...] = ()
) -> FormatCheck:
    """Does the trajectory keep the protocol? tools: names of those it may call.

    none     always
    answer   exactly one `<answer>` block, sampled, closed, with something in it, and nothing behind
             it
    full     also: every block closed, `<think>` balanced and never around an answer, no stray
             closing tag, and no `<result>` written by the policy itself
    """
    if strictness == "none":
        return FormatCheck(True)
    runs = sampled_runs(spans)
    found = list(blocks(runs, tools))
    answers = [b for b in found if b.tag == "answer"]
    if len(answers) != 1:
        return FormatCheck(False, f"{len(answers)} answer blocks, expected 1")
    answer = answers[0]
    if answer.stop is None:
        return FormatCheck(False, "answer block is not closed")
    text = runs[answer.run][0]
    if not text[answer.start : answer.stop].strip():
        return FormatCheck(False, "answer block is empty")
    if not _END.match(text, answer.stop + len("</answer>")) or answer.run != len(runs) - 1:
        return FormatCheck(False, "text after the answer")
    return _balanced(runs, found, _tag(tools)) if strictness == "full" else FormatCheck(True)


def _balanced(runs: Spans, found: list[Block], tag_of: re.Pattern[str]) -> FormatCheck:
    """Walk over the tags outside blocks; only `<think>` pairs may be left."""
    thinking = False
    for number, (text, sampled) in enumerate(runs):
        if not sampled:
            continue
        inside = [(b.start, b.stop) for b in found if b.run == number]
        if any(stop is None for _, stop in inside):
            return FormatCheck(False, "a block is not closed")
        for match in tag_of.finditer(text):
            if any(start <= match.start() < (stop or 0) for start, stop in inside):
                continue  # what is in a block is code, a query or the answer
            closing, tag = bool(match[1]), match[2]
            if tag == "result":
                return FormatCheck(False, "the policy wrote a <result> tag itself")
            if tag == "think":
                if closing != thinking:
                    return FormatCheck(False, "<think> is not balanced")
                thinking = not closing
            elif closing and not any(match.start() == stop for _, stop in inside):
                return FormatCheck(False, f"</{tag}> closes nothing")
            elif tag == "answer" and thinking:
                return FormatCheck(False, "answer inside <think>")
    return FormatCheck(not thinking, "<think> is not closed" if thinking else "")


def extract_answer(
    spans: Spans, *, anywhere: bool = False, tools: tuple[str, ...] = ()
) -> str | None:
    r"""Text of the last closed, sampled `<answer>` block, with an inner `\boxed{…}` unwrapped.

    None when there is none.

    anywhere: without such a block, take the last `\boxed{…}` of the last sampled run (strictness
    "none").
    """
    runs = sampled_runs(spans)
    closed = [b for b in blocks(runs, tools) if b.tag == "answer" and b.stop is not None]
    if closed:
        last = closed[-1]
        inner = runs[last.run][0][last.start : last.stop]
        boxed = last_boxed(inner)
        return (boxed if boxed is not None else inner).strip()
    sampled = [text for text, is_sampled in runs if is_sampled]
    boxed = last_boxed(sampled[-1]) if anywhere and sampled else None
    return boxed.strip() if boxed is not None else None


def last_boxed(text: str) -> str | None:
    r"""Inside of the last `\boxed{…}`, braces matched (`\{` and `\}` do not count).

    None when absent or open.
    """
    start = text.rfind(r"\boxed{")
    if start < 0:
        return None
    start += len(r"\boxed{")
    depth, at = 1, start
    while at < len(text):
        char = text[at]
        if char == "\\":
            at += 2
            continue
        depth += (char == "{") - (char == "}")
        if depth == 0:
            return text[start:at]
        at += 1
    return None
