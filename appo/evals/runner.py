"""Accuracy on held-out tasks: one sampled trajectory per question, the same agent and tools as in training."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from appo.obs.metrics import wilson
from appo.rollout.tree import Rollouts
from appo.types import RolloutTree, Task

EVAL_STEP = (
    -1
)  # evaluation draws the same noise whenever it is run: differences come from the weights


@dataclass(frozen=True)
class EvalResult:
    """accuracy and tool_use are means over the graded questions; errors (graders that failed) are left out of both."""

    trees: list[RolloutTree]
    metrics: dict[str, float]


def evaluate_policy(
    rollouts: Rollouts,
    tasks: Sequence[Task],
    prompts: Sequence[Sequence[int]],
    grade: Callable[[Sequence[RolloutTree]], dict[str, float]],
    on_progress: Callable[[int], None] | None = None,
) -> EvalResult:
    """Sample, grade and count. Seeds depend on the question only."""
    begin = time.perf_counter()
    growths = [rollouts.plant(t, ids, 1, EVAL_STEP) for t, ids in zip(tasks, prompts, strict=True)]
    rollouts.run(on_progress=on_progress)
    for g in growths:
        rollouts.release(g)
    trees = rollouts.finish(growths)
    counters = grade(trees)
    leaves = [t.leaves[0] for t in trees if t.leaves[0].reward is not None]
    n = max(len(leaves), 1)
    right = sum(leaf.reward_parts.get("accuracy", 0.0) for leaf in leaves)
    used = sum(any(c.ok for c in leaf.tool_calls) for leaf in leaves) / n
    accuracy = right / n
    low, high = wilson(right, len(leaves))
    metrics = {
        "eval/accuracy": accuracy,
        "eval/accuracy_low": low,
        "eval/accuracy_high": high,
        "eval/tool_use": used,
        "eval/questions": float(len(leaves)),
        "eval/errors": counters.get("grade/errors", 0.0),
        "eval/truncated": sum(leaf.finish == "length" for leaf in leaves) / n,
        "time/eval": time.perf_counter() - begin,
    }
    return EvalResult(trees, metrics)
