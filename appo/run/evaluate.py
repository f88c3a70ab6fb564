"""Accuracy on held-out tasks.

One sampled trajectory per question, the same agent and tools as in training.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from appo.dist.ranks import Ranks
from appo.observability.metrics import wilson
from appo.rollout.sampler import Rollouts
from appo.types import RolloutTree, Task

# Evaluation draws the same noise whenever it is run: differences come from the weights.
EVAL_STEP = -1


@dataclass(frozen=True)
class EvalResult:
    """trees: of this rank's questions.

    metrics: over all ranks; accuracy and tool_use are means over the graded questions, errors
    (graders that failed) are left out of both.
    """

    trees: list[RolloutTree]
    metrics: dict[str, float]


def evaluate_policy(
    rollouts: Rollouts,
    tasks: Sequence[Task],
    prompts: Sequence[Sequence[int]],
    grade: Callable[[Sequence[RolloutTree]], dict[str, float]],
    on_progress: Callable[[int], None] | None = None,
    ranks: Ranks | None = None,
) -> EvalResult:
    """Sample, grade and count; rank r answers tasks r::world.

    Seeds depend on the question only. Collective.
    """
    ranks, begin = ranks or Ranks(), time.perf_counter()
    mine = list(zip(tasks, prompts, strict=True))[ranks.rank :: ranks.world]
    tree_rollouts = [rollouts.start(task, ids, 1, EVAL_STEP) for task, ids in mine]
    rollouts.run(on_progress=on_progress)
    for g in tree_rollouts:
        rollouts.release(g)
    trees = rollouts.finish(tree_rollouts)
    errors = grade(trees).get("grade/errors", 0.0)
    counts = ranks.sum(_count(trees) | {"errors": errors}, "evaluation")
    seconds = ranks.reduce({"s": time.perf_counter() - begin}, "max", "evaluation")["s"]
    return EvalResult(trees, _rates(counts) | {"time/eval": seconds})


def _count(trees: Sequence[RolloutTree]) -> dict[str, float]:
    """Counts over the graded leaves, which ranks add up."""
    leaves = [t.leaves[0] for t in trees if t.leaves[0].reward is not None]
    return {
        "graded": float(len(leaves)),
        "right": sum(leaf.reward_parts.get("accuracy", 0.0) for leaf in leaves),
        "used": float(sum(any(c.ok for c in leaf.tool_calls) for leaf in leaves)),
        "truncated": float(sum(leaf.finish == "length" for leaf in leaves)),
    }


def _rates(counts: dict[str, float]) -> dict[str, float]:
    n = max(counts["graded"], 1.0)
    low, high = wilson(counts["right"], int(counts["graded"]))
    return {
        "eval/accuracy": counts["right"] / n,
        "eval/accuracy_low": low,
        "eval/accuracy_high": high,
        "eval/tool_use": counts["used"] / n,
        "eval/questions": counts["graded"],
        "eval/errors": counts["errors"],
        "eval/truncated": counts["truncated"] / n,
    }
