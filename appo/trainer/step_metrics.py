"""The numbers of a step while they are still sums: they add up over mini-batches and ranks, and are divided at the end.

So a run on two ranks writes the keys that one writes, and (up to rounding) the same values.
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

from appo.algo.branching import BranchPlan
from appo.types import RolloutTree

PHASES = ("rollout", "score", "branch", "reward", "learn", "push")

# Of what the learner answers per mini-batch: these are added up, those are taken from the last one, others are means.
COUNTED = ("learner/empty", "learner/nonfinite", "learner/micro_batches")
LAST = ("learner/nonfinite_total", "learner/lr")
LAST_PUSH = ("push/crc32",)


class Reduces(Protocol):
    """What `MetricSums` needs of `appo.dist.ranks.Ranks`."""

    def sum(self, values: Mapping[str, float]) -> dict[str, float]:
        """Sums over ranks."""

    def reduce(self, values: Mapping[str, float], how: Any) -> dict[str, float]:
        """The sum, the largest or the smallest of each key over ranks."""


class MetricSums:
    """Totals, ratios of two totals, spreads and maxima by metric name.

    >>> sums = MetricSums(); sums.ratio("tool/use", 3, 4); sums.ratio("tool/use", 1, 4); sums.over(Ranks())
    {'tool/use': 0.5}
    """

    def __init__(self) -> None:
        self._sums: defaultdict[tuple[str, str], float] = defaultdict(float)
        self._most: dict[str, float] = {}

    def total(self, name: str, value: float) -> None:
        """Reduces to a number that is written as it is."""
        self._sums["total", name] += value

    def ratio(self, name: str, value: float, count: float) -> None:
        """Reduces to both parts of value / count; 0 where nothing was counted."""
        self._sums["value", name] += value
        self._sums["count", name] += count

    def spread(self, name: str, values: Iterable[float]) -> None:
        """Reduces values whose population standard deviation is wanted; 0 of none."""
        values = list(values)
        self.ratio(name, sum(values), len(values))
        self._sums["square", name] += sum(v * v for v in values)

    def most(self, name: str, value: float) -> None:
        """The largest of all."""
        self._most[name] = max(value, self._most.get(name, value))

    def over(self, ranks: Reduces) -> dict[str, float]:
        """The metrics, over all ranks. Collective."""
        added = ranks.sum({" ".join(key): value for key, value in self._sums.items()})
        out = ranks.reduce(self._most, "max")
        for key, value in added.items():
            kind, name = key.split(" ", 1)
            if kind == "total":
                out[name] = value
            elif kind == "value":
                n, square = added[f"count {name}"], added.get(f"square {name}")
                mean = value / n if n else 0.0
                out[name] = mean if square is None else _deviation(mean, square / n if n else 0.0)
        return out


def _deviation(mean: float, square: float) -> float:
    """Standard deviation from the means of values and squares; a speck of rounding is 0."""
    variance = square - mean * mean
    return math.sqrt(variance) if variance > 1e-12 * square else 0.0


class StepMetrics:
    """All that one step writes down. `learned` holds what the learner answers, which is over all ranks already."""

    def __init__(self) -> None:
        self.sums = MetricSums()
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.learned: list[dict[str, float]] = []  # by mini-batch
        self.pushed: list[dict[str, float]] = []  # by push

    @contextmanager
    def clock(self, phase: str) -> Iterator[None]:
        """Reduces what its block takes to the seconds of a phase."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[phase] += time.perf_counter() - begin

    def finish(self, ranks: Reduces) -> dict[str, float]:
        """The metrics record of the step. Collective; times and pushes are the largest of any rank."""
        for phase in dict.fromkeys((*PHASES, *self.seconds)):
            self.sums.most(f"time/{phase}", self.seconds[phase])
        for name, value in _over_minibatches(self.pushed, (), LAST_PUSH).items():
            self.sums.most(name, value)
        return _over_minibatches(self.learned, COUNTED, LAST) | self.sums.over(ranks)


def _over_minibatches(
    records: Sequence[Mapping[str, float]], counted: Sequence[str], last: Sequence[str]
) -> dict[str, float]:
    by_name: defaultdict[str, list[float]] = defaultdict(list)
    for record in records:
        for name, value in record.items():
            by_name[name].append(value)
    return {
        name: sum(v) if name in counted else v[-1] if name in last else sum(v) / len(v)
        for name, v in by_name.items()
    }


def count_trees(sums: MetricSums, trees: Sequence[RolloutTree]) -> None:
    """Rewards, tool use and token counts over all leaves."""
    leaves = [leaf for t in trees for leaf in t.leaves]
    graded = [leaf for leaf in leaves if leaf.reward is not None]
    rewards = [leaf.reward for leaf in graded if leaf.reward is not None]
    roots = [x.reward for x in graded if x.is_root and x.reward is not None]
    calls = {id(c): c for leaf in leaves for c in leaf.tool_calls}.values()  # branches share some
    sampled = [node for t in trees for node in t.nodes if node.sampled]
    drawn = sum(len(node.token_ids) for node in sampled)
    accuracy = sum(x.reward_parts.get("accuracy", 0.0) for x in graded)
    formed = sum(x.reward_parts.get("format_ok", 0.0) for x in graded)

    sums.ratio("reward/mean", sum(rewards), len(rewards))
    sums.ratio("reward/roots", sum(roots), len(roots))
    sums.spread("reward/std", rewards)
    sums.ratio("reward/accuracy", accuracy, len(graded))
    sums.ratio("format/ok", formed, len(graded))
    sums.ratio("tool/use", sum(any(c.ok for c in x.tool_calls) for x in leaves), len(leaves))
    sums.ratio("tool/calls", len(calls), len(leaves))
    sums.ratio("tool/errors", sum(not c.ok for c in calls), len(calls))
    sums.ratio("rollout/entropy", sum(sum(node.entropy or ()) for node in sampled), drawn)
    sums.ratio("rollout/truncated", sum(x.finish == "length" for x in leaves), len(leaves))
    sums.total("tokens/unique", sum(t.unique_tokens() for t in trees))
    sums.total("tokens/total", sum(t.total_tokens() for t in trees))
    sums.total("tokens/generated", drawn)


def count_branches(sums: MetricSums, plans: Sequence[BranchPlan], by_score: bool) -> None:
    """How branch slots were filled and, where they are chosen `by_score`, how often Ω said nothing."""
    points = [point for plan in plans for point in plan.points]
    silent = [f for plan in plans for f in plan.omega_uninformative]
    if by_score:
        sums.ratio("branch/omega_uninformative", sum(silent), len(silent))
    sums.ratio("branch/strict", sum(p.rule == "strict" for p in points), len(points))
    sums.total("branch/points", len(points))
    sums.total("branch/shortfall", sum(p.shortfall for p in plans))


def count_packing(sums: MetricSums, counts: Mapping[str, float]) -> None:
    """What packing saved, from the counts of `appo.packing.sharing.sharing_counts`; its two factors stand apart."""
    for name, value in counts.items():
        sums.total(name, value)
    every, rows = counts["pack/tokens_all"], counts["pack/tokens_rows"]
    sums.ratio("pack/skip_factor", every, rows)
    sums.ratio("pack/sharing_factor", rows, counts["pack/tokens_unique"])
