"""The step loop, and nothing else: which room is called when, and what is counted and timed on the way.

The trainer is handed its parts (see `appo.run`), so it reads as the algorithm does: sample roots; for each mini-batch
score, branch, grade, assign credit, learn, push the new weights; then write down what happened.
"""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from appo.algo.branching import BranchPlan
from appo.algo.credit import MiniBatchCredit, assign
from appo.algo.objective import Objective
from appo.algo.presets import Algorithm
from appo.data.packing import pack
from appo.types import RolloutTree, Task


class Sampler(Protocol):
    """What the trainer needs of rollouts (implemented by `appo.rollout.tree.Rollouts`)."""

    tool_wait_s: float

    def plant(
        self, task: Task, prompt_ids: Sequence[int], roots: int, step: int, copy: int = 0
    ) -> Any: ...

    def remember(self, growths: Sequence[Any]) -> None: ...

    def run(self, on_roots_done: Callable[[Any], None] | None = None,
            on_progress: Callable[[int], None] | None = None) -> None: ...  # fmt: skip

    def grow_branches(self, growths: Sequence[Any], algo: Algorithm) -> list[BranchPlan]: ...

    def release(self, growth: Any) -> None: ...

    def finish(self, growths: Sequence[Any]) -> list[RolloutTree]: ...


COUNTED = (
    "learner/empty",
    "learner/nonfinite",
    "learner/micro_batches",
)  # summed over mini-batches, others are means

LAST = ("push/crc32", "learner/nonfinite_total", "learner/lr")  # of the last mini-batch


class Clock:
    """Seconds per phase, summed over a step."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[phase] += time.perf_counter() - begin


@dataclass
class StepResult:
    """What one step produced: trees, branch plans (tree by tree) and the metrics record."""

    trees: list[RolloutTree]
    plans: list[BranchPlan | None]
    minibatch: list[int]  # mini-batch number of each tree
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass
class Trainer:
    """One policy, one sampler, one learner. `version` counts optimiser steps that changed the weights."""

    algo: Algorithm
    sampler: Sampler
    learner: Any  # appo.learner.zero.Learner
    objective: Objective
    grade: Callable[
        [Sequence[RolloutTree]], dict[str, float]
    ]  # writes rewards on leaves, returns counters
    push: Callable[[int], dict[str, float]]  # weights → engine under the given version
    token_budget: int
    minibatches: int
    version: int = 0
    rescore_roots: bool = (
        False  # Ω from two scoring passes; wanted where decoding rounds (bfloat16)
    )
    keep_all_rows: bool = False  # also rows without advantage (entropy bonus)
    on_phase: Callable[[str, int, int], None] = lambda name, done, total: None

    def step(
        self, number: int, tasks: Sequence[Task], prompts: Sequence[Sequence[int]]
    ) -> StepResult:
        """One training step on a batch of prompts."""
        clock, waited = Clock(), self.sampler.tool_wait_s
        size = len(tasks) // self.minibatches
        plans: dict[int, BranchPlan] = {}
        with clock("rollout"):
            growths = []
            seen: Counter[str] = Counter()
            for t, ids in zip(tasks, prompts, strict=True):
                growths.append(self.sampler.plant(t, ids, self.algo.roots, number, seen[t.task_id]))
                seen[t.task_id] += 1
            first = {id(g) for g in growths[:size]}
            self.sampler.run(
                # The first mini-batch is drawn from unmoved weights: its prompts branch as soon as they can.
                on_roots_done=lambda g: self._branch_early(g, first, plans),
                on_progress=lambda left: self.on_phase(
                    "rollout", len(tasks) * self.algo.roots - left, 0
                ),
            )
        if self.rescore_roots and not self.algo.flat and self.algo.branch_by == "score":
            with clock("score"):
                for k in range(1, self.minibatches):
                    self.sampler.remember(growths[k * size : (k + 1) * size])
        result = StepResult([], [], [])
        sums: dict[str, float] = defaultdict(float)
        learned: dict[str, list[float]] = defaultdict(list)
        for k in range(self.minibatches):
            part = growths[k * size : (k + 1) * size]
            trees = self._finish_trees(part, plans, clock)
            with clock("reward"):
                for key, value in self.grade(trees).items():
                    sums[key] += value
            credit = assign(trees, self.algo, keep_all=self.keep_all_rows)
            self._learn(trees, credit, clock, sums, learned)
            result.trees += trees
            result.plans += [plans.get(id(g)) for g in part]
            result.minibatch += [k] * len(part)
        result.metrics = self._metrics(result, clock, sums, learned)
        result.metrics["time/tool_wait"] = self.sampler.tool_wait_s - waited
        return result

    def _branch_early(self, growth: Any, first: set[int], plans: dict[int, BranchPlan]) -> None:
        if id(growth) in first and not self.algo.flat:
            plans[id(growth)] = self.sampler.grow_branches([growth], self.algo)[0]

    def _finish_trees(
        self, growths: Sequence[Any], plans: dict[int, BranchPlan], clock: Clock
    ) -> list[RolloutTree]:
        """Branches of this mini-batch with the weights as they are now; → its finished trees."""
        waiting = [g for g in growths if id(g) not in plans]
        if self.algo.flat:
            for g in waiting:
                self.sampler.release(g)
        elif waiting:
            with clock("score"):
                for g, plan in zip(
                    waiting, self.sampler.grow_branches(waiting, self.algo), strict=True
                ):
                    plans[id(g)] = plan
            with clock("branch"):
                self.sampler.run(on_progress=lambda left: self.on_phase("branch", 0, left))
        return self.sampler.finish(growths)

    def _learn(
        self,
        trees: Sequence[RolloutTree],
        credit: MiniBatchCredit,
        clock: Clock,
        sums: dict[str, float],
        learned: dict[str, list[float]],
    ) -> None:
        with clock("learn"):
            batches = pack(
                trees,
                credit.credits,
                token_budget=self.token_budget,
                keep_all=self.keep_all_rows,
            )
            self.on_phase("learn", 0, len(batches))
            out = self.learner.train_minibatch(batches, credit.counts, self.objective)
        sums["learn/rows"] += sum(len(c) for c in credit.credits)
        sums["learn/tokens"] += sum(b.unique_tokens for b in batches)
        sums["group/zero_variance"] += credit.zero_groups
        sums["group/ungraded_leaves"] += credit.ungraded
        for key, value in out.items():
            if key in COUNTED:
                sums[key] += value
            else:
                learned[key].append(value)
        if not (out["learner/empty"] or out["learner/nonfinite"]):
            self.version += 1
            with clock("push"):
                for key, value in self.push(self.version).items():
                    learned[key].append(value)

    def _metrics(
        self,
        result: StepResult,
        clock: Clock,
        sums: dict[str, float],
        learned: dict[str, list[float]],
    ) -> dict[str, float]:
        out = tree_metrics(result.trees)
        out |= branch_metrics(result)
        if self.algo.branch_by != "score":
            out.pop("branch/omega_flat", None)  # Ω was not asked
        out |= {k: v[-1] if k in LAST else float(np.mean(v)) for k, v in learned.items()}
        out |= dict(sums)
        out["policy/version"] = self.version
        out |= {
            f"time/{k}": clock.seconds[k]
            for k in ("rollout", "score", "branch", "reward", "learn", "push")
        }
        return out


def tree_metrics(trees: Sequence[RolloutTree]) -> dict[str, float]:
    """Rewards, tool use and token counts over all leaves."""
    leaves = [leaf for t in trees for leaf in t.leaves]
    rewards = [leaf.reward for leaf in leaves if leaf.reward is not None]
    graded = [x for x in leaves if x.reward is not None]
    calls = {
        id(c): c for leaf in leaves for c in leaf.tool_calls
    }.values()  # branches share those they inherit
    n = max(len(leaves), 1)
    drawn = sum(len(node.token_ids) for t in trees for node in t.nodes if node.sampled)
    entropy = sum(sum(node.entropy or ()) for t in trees for node in t.nodes)
    return {
        "reward/mean": _mean(rewards),
        "reward/roots": _mean([x.reward for x in leaves if x.is_root and x.reward is not None]),
        "reward/std": float(np.std(rewards)) if rewards else 0.0,
        "reward/accuracy": _mean([x.reward_parts.get("accuracy", 0.0) for x in graded]),
        "format/ok": _mean([x.reward_parts.get("format_ok", 0.0) for x in graded]),
        "tool/use": sum(any(c.ok for c in leaf.tool_calls) for leaf in leaves) / n,
        "tool/calls": len(calls) / n,
        "tool/errors": sum(not c.ok for c in calls) / max(len(calls), 1),
        "rollout/entropy": entropy / max(drawn, 1),
        "rollout/truncated": sum(leaf.finish == "length" for leaf in leaves) / n,
        "tokens/unique": sum(t.unique_tokens() for t in trees),
        "tokens/total": sum(t.total_tokens() for t in trees),
        "tokens/generated": drawn,
    }


def branch_metrics(result: StepResult) -> dict[str, float]:
    """How often Ω said nothing, and how branch slots were filled."""
    plans = [p for p in result.plans if p is not None]
    points = [pt for p in plans for pt in p.points]
    flat = [f for p in plans for f in p.flat]
    if not plans:
        return {}
    return {
        "branch/omega_flat": float(np.mean(flat)) if flat else 0.0,
        "branch/strict": sum(p.rule == "strict" for p in points) / max(len(points), 1),
        "branch/points": len(points),
        "branch/shortfall": sum(p.shortfall for p in plans),
    }


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if values else 0.0
