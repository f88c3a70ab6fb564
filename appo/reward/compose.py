"""From spans and a grade to one number.

Correctness behind a format gate, plus small terms that are off by default.
"""

from __future__ import annotations

from appo.config import RewardSettings
from appo.reward.format import Spans, extract_answer, format_ok
from appo.reward.workers import Grade, GradeItem
from appo.types import Task

RewardConfig = RewardSettings  # one definition: the `reward:` section of the configuration


def grade_item(task: Task, spans: Spans, config: RewardConfig | None = None) -> GradeItem:
    """What the grader pool needs for one trajectory of `task`.

    spans: (text, sampled) of the response, in order.
    """
    config = config or RewardConfig()
    grader = config.grader or task.grader
    if grader == "paper":  # its own format rule reads the whole response
        return GradeItem("paper", "".join(text for text, _ in spans), task.answer, task.meta)
    if not format_ok(spans, config.strictness, task.tools).ok:
        return GradeItem(grader, None, task.answer)
    answer = extract_answer(spans, anywhere=config.strictness == "none", tools=task.tools)
    return GradeItem(grader, answer, task.answer, task.meta)


def score_leaf(
    task: Task, spans: Spans, n_tool_ok: int, grade: Grade, config: RewardConfig | None = None
) -> tuple[float | None, dict[str, float]]:
    """(reward, parts).

    The parts correct + format + tool add up to the reward; `accuracy` is the raw score.

    n_tool_ok  successful tool calls of the trajectory, counted from its record and never from text
    A grader error gives (None, …): no reward is known, so the leaf must be left out and counted.
    """
    config = config or RewardConfig()
    if (config.grader or task.grader) == "paper":
        if grade.score is None:
            return None, {"grade_error": 1.0}
        return grade.score, {"correct": grade.score, "accuracy": max(0.0, min(1.0, grade.score))}

    tool = config.tool_use if n_tool_ok > 0 else 0.0  # whatever becomes of the answer
    if not format_ok(spans, config.strictness, task.tools).ok:
        parts = {"format": config.bad_format, "tool": tool}
        return sum(parts.values()), parts | {"accuracy": 0.0, "format_ok": 0.0}
    if grade.score is None:
        return None, {"grade_error": 1.0, "format_ok": 1.0}
    if n_tool_ok > 0:
        # The bonus scales with the score so that partial credit stays partial.
        tool += config.tool_bonus * grade.score
    parts = {"correct": config.correct * grade.score, "format": config.format_bonus, "tool": tool}
    return sum(parts.values()), parts | {"accuracy": grade.score, "format_ok": 1.0}
