"""Rewards: what a finished trajectory is worth.

`format` reads what the policy wrote, the graders compare answers, `workers` runs them where they
can be killed, and `compose` adds the parts up. A grader is a function
`(answer, gold, meta) -> score in [0, 1]`; one of your own is named by its import string
`module:function` wherever a grader name is expected.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from appo.reward.maths import maths
from appo.reward.paper import paper_score
from appo.reward.procedural import reasoning_gym_score
from appo.reward.qa import exact, exact_match, token_f1

Grader = Callable[[str, Any, dict[str, Any] | None], float]

GRADERS: dict[str, Grader] = {
    "maths": maths,
    "exact": exact,
    "qa_em": exact_match,
    "qa_f1": token_f1,
    "reasoning_gym": reasoning_gym_score,
    "paper": paper_score,  # takes the whole response text, brings its own format rule
}
