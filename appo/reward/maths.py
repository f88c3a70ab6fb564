"""Mathematical equality: exact for plain numbers, by math-verify (sympy) for everything else.

The number path compares decimal strings digit by digit, so it needs no big integers and cannot
hang; it may run in the trainer's own process. The rest runs in a worker that may be killed: sympy
will happily try `9**9**9`.
"""

from __future__ import annotations

import re
from typing import Any

from appo.errors import GraderError
from appo.reward.qa import golds

MAX_CHARS = 2000  # an answer longer than this (and than twice the gold) is wrong, not parsed
_NUMBER = re.compile(r"([+-]?)(\d{1,3}(?:,\d{3})+|\d+|(?=\.\d))(?:\.(\d*))?")
_WRAPPERS = (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"))


def canonical_number(text: str) -> str | None:
    """`-1,024.50` → `-1024.5`; None for anything but a plain decimal number.

    Linear time for any length.
    """
    text = (
        _unwrap(text)
        .replace("\u2212", "-")
        .replace(r"\,", "")
        .replace("{,}", ",")
        .removesuffix(".")
    )
    match = _NUMBER.fullmatch(text)
    if not match:
        return None
    whole = match[2].replace(",", "").lstrip("0") or "0"
    part = (match[3] or "").rstrip("0")
    value = f"{whole}.{part}" if part else whole
    return f"-{value}" if match[1] == "-" and value != "0" else value


def _unwrap(text: str) -> str:
    text = text.strip()
    for left, right in _WRAPPERS:
        if text.startswith(left) and text.endswith(right) and len(text) >= len(left) + len(right):
            return text[len(left) : len(text) - len(right)].strip()
    return text


def quick_maths(answer: str, gold: Any) -> float | None:
    """The verdict when it needs no algebra.

    Same text or number, two different integers, or far too long; else None.
    """
    accepted = golds(gold)
    ours = canonical_number(answer)
    theirs = [canonical_number(g) for g in accepted]
    if answer.strip() in [g.strip() for g in accepted] or (ours is not None and ours in theirs):
        return 1.0
    if ours is not None and "." not in ours and all(t is not None and "." not in t for t in theirs):
        return 0.0
    if not answer.strip() or len(answer) > max(MAX_CHARS, 2 * max(map(len, accepted))):
        return 0.0
    return None


def maths(answer: str, gold: Any, meta: dict[str, Any] | None = None) -> float:
    """1.0 when the answer equals one of the golds as mathematics, else 0.0.

    Only call it where it can be killed.

    Raises GraderError when the verdict could not be reached (memory, recursion), never for what the
    model wrote.
    """
    quick = quick_maths(answer, gold)
    if quick is not None:
        return quick
    from math_verify import verify

    ours = _parse(answer)
    for accepted in golds(gold):
        theirs = _parse(accepted)
        if not theirs or not ours:
            continue
        try:
            # The order matters: gold first. Our deadline replaces the library's, which needs
            # signals.
            if verify(theirs, ours, timeout_seconds=None, raise_on_error=True):
                return 1.0
        except (MemoryError, RecursionError) as error:
            raise GraderError(f"{type(error).__name__} while comparing") from error
        except Exception:
            continue
    return 0.0


def _parse(text: str) -> list[Any]:
    r"""Expressions of `text`.

    As the inside of `\boxed{}` first, because bare LaTeX has no anchor.
    """
    from math_verify import parse

    for form in (f"\\boxed{{{text}}}", text):
        try:
            found = parse(form, parsing_timeout=None, raise_on_error=True)
        except (MemoryError, RecursionError) as error:
            raise GraderError(f"{type(error).__name__} while parsing") from error
        except Exception:
            found = []
        if found:
            return list(found)
    return []
