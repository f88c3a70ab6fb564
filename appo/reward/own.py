"""A user's own grader: `module:function` wherever a grader name is expected."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from appo.imports import call_problem, resolve

EXPECTED = "a function my_grader(answer: str, gold, meta: dict | None) -> float that returns a score from 0 to 1"


def own_grader(
    text: str, where: str, *, here: bool = True
) -> Callable[[str, Any, dict[str, Any] | None], float]:
    """The function that `text` names, for the key `where`.

    ConfigError when it cannot be called as a grader is.

    here: look in the current folder too.
    """
    grader: Callable[[str, Any, dict[str, Any] | None], float] = resolve(
        text, where, EXPECTED, lambda found: call_problem(found, "answer", "gold", {}), here=here
    )
    return grader
