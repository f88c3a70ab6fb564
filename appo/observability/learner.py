"""What the learner did not have to compute, and whether there was anything to learn.

For a step's line and the report.

Read from the `pack/*` keys of a step's record: sums over its mini-batches and ranks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from appo.observability.card import md_table

Record = Mapping[str, Any]

ALL, ROWS, UNIQUE = "pack/tokens_all", "pack/tokens_rows", "pack/tokens_unique"


def learner_parts(record: Record) -> list[tuple[str, str]]:
    """(label, value) for the line of a step.

    Tokens computed, and how many times more all rollouts would have been.
    """
    everything, unique = record.get(ALL), record.get(UNIQUE)
    if not everything or not unique:
        return []
    return [("learned", f"{unique:,.0f} ({everything / unique:.1f}x)")]


def learner_section(steps: Sequence[Record]) -> str:
    """Markdown: tokens avoided by leaving rows out and by sharing, each on its own."""
    known = [r for r in steps if r.get(ALL) is not None]
    if not known:
        return "Nothing was counted."
    everything, rows, unique = (
        sum(float(r.get(key) or 0.0) for r in known) for key in (ALL, ROWS, UNIQUE)
    )
    table = md_table(
        ["tokens", "key", "all steps", "avoided", "factor"],
        [
            ["of all rollouts, one by one", f"`{ALL}`", f"{everything:,.0f}", "–", "–"],
            ["of rows that can move a weight, one by one", f"`{ROWS}`", f"{rows:,.0f}",
             f"{everything - rows:,.0f}", _factor(everything, rows)],
            ["of those, shared ones once: what was computed", f"`{UNIQUE}`", f"{unique:,.0f}",
             f"{rows - unique:,.0f}", _factor(rows, unique)],
        ],
        2,
    )  # fmt: skip
    text = [table]
    uneven = [r["pack/imbalance"] for r in known if r.get("pack/imbalance") is not None]
    if uneven and max(uneven) > 1.0:
        text.append(
            f"Work of the busiest rank over the mean, worst mini-batch of a step: {sum(uneven) / len(uneven):.2f} on "
            f"average, {max(uneven):.2f} at most."
        )
    if over := sum(r.get("pack/over_budget") or 0.0 for r in known):
        text.append(
            f"{over:,.0f} rows were longer than learner.token_budget; each took a micro-batch of its own."
        )
    return "\n\n".join(text)


def _factor(before: float, after: float) -> str:
    return f"{before / after:.2f}" if after else "–"


class NoSignal:
    """Notices that nothing is learned.

    `limit` steps in a row without one row that can move a weight.

    >>> watch = NoSignal(limit=2)
    >>> [watch.look({"step": n, "pack/rows": 0.0}) is None for n in (1, 2, 3, 4)]
    [True, False, True, False]
    """

    def __init__(self, limit: int = 5):
        self.limit = limit
        self.in_a_row = 0

    def look(self, record: Record) -> str | None:
        """The record of a step → a warning for the user, every `limit` such steps.

        None: all is well.
        """
        rows = record.get("pack/rows")
        if rows is None:  # an evaluation
            return None
        self.in_a_row = 0 if rows else self.in_a_row + 1
        if not self.in_a_row or self.in_a_row % self.limit:
            return None
        mean = record.get("reward/mean")
        seen = "" if mean is None else f" (mean reward of the last one: {mean:.3g})"
        return (
            f"{self.in_a_row} steps in a row, up to step {record.get('step')}, have changed no weight: within every "
            f"prompt all rewards were equal{seen} or missing, so all advantages are 0. If all are wrong, the questions are too "
            "hard, max_new_tokens cuts answers off (rollout/truncated) or the grader does not read them (format/ok); "
            "if all are right, they are too easy. More rollouts per prompt (algo.roots), a higher "
            "rollout.temperature or other data give the group something to compare."
        )
