"""Rewards onto leaves.

Spans of each trajectory → graders (in their own processes) → one number per leaf.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

from appo.config import RewardSettings
from appo.reward.compose import grade_item, score_leaf
from appo.reward.workers import GraderPool
from appo.types import RolloutTree

Text = Callable[[Sequence[int]], str]


def spans_of(tree: RolloutTree, leaf: int, text: Text) -> list[tuple[str, bool]]:
    """(text, sampled) along the response of one leaf; what the format gate and the graders read."""
    runs: list[tuple[list[int], bool]] = []
    for n, k in tree.walk(tree.leaves[leaf].node):
        if n.role == "prompt":
            continue
        if runs and runs[-1][1] == n.sampled:  # a fork may split a character: join ids, not text
            runs[-1][0].extend(n.token_ids[:k])
        else:
            runs.append((list(n.token_ids[:k]), n.sampled))
    return [(text(ids), sampled) for ids, sampled in runs]


def grade_trees(
    trees: Sequence[RolloutTree], text: Text, pool: GraderPool, reward: RewardSettings
) -> dict[str, float]:
    """Write reward, parts and grading errors on every leaf.

    → counters `grade/error:<kind>` and `grade/errors`.

    A grader that timed out or crashed leaves `reward=None`: the leaf is counted and left out, never
    scored 0.
    """
    places = [(tree, i) for tree in trees for i in range(len(tree.leaves))]
    spans = [spans_of(tree, i, text) for tree, i in places]
    grades = pool.grade(
        [grade_item(t.task, s, reward) for (t, _), s in zip(places, spans, strict=True)]
    )
    errors: Counter[str] = Counter()
    for (tree, i), s, grade in zip(places, spans, grades, strict=True):
        leaf = tree.leaves[i]
        ok_calls = sum(c.ok for c in leaf.tool_calls)
        leaf.reward, leaf.reward_parts = score_leaf(tree.task, s, ok_calls, grade, reward)
        leaf.grade_error = grade.error
        if leaf.reward is None:
            errors[(grade.error or "unknown").split(":")[0]] += 1
    return {"grade/errors": float(sum(errors.values()))} | {
        f"grade/error:{k}": float(v) for k, v in errors.items()
    }
