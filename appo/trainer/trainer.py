"""The step loop, and nothing else: which room is called when, and what is counted and timed on the way.

The trainer is handed its parts (see `appo.run.build`), so it reads as the algorithm does: sample roots; for each mini-batch
score, branch, grade, assign credit, learn, push the new weights; then write down what happened. Numbers are kept as sums
until the end of the step (`appo.trainer.step_metrics`), roots may be drawn some steps ahead (`appo.trainer.prefetch`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Generic, Literal

from appo.algo.algorithm import Algorithm
from appo.algo.branching import BranchPlan
from appo.algo.credit import assign
from appo.algo.objective import Objective
from appo.dist.ranks import Ranks
from appo.packing.pack import pack
from appo.packing.sharing import sharing_counts
from appo.trainer.balance import Costs, balance
from appo.trainer.old_logprobs import set_old_logp
from appo.trainer.prefetch import (
    MinibatchShard,
    Prompt,
    RootPrefetcher,
    shard_prompts,
    split_threads,
)
from appo.trainer.protocols import MinibatchLearner, T, TreeSampler
from appo.trainer.step_metrics import StepMetrics, count_branches, count_packing, count_trees
from appo.types import RolloutTree, Task

Grade = Callable[[Sequence[RolloutTree]], dict[str, float]]  # rewards onto leaves; → counters


@dataclass
class StepResult:
    """What one step produced on this rank, tree by tree, and the metrics record, which is over all ranks."""

    trees: list[RolloutTree] = field(default_factory=list)
    plans: list[BranchPlan | None] = field(default_factory=list)
    minibatch: list[int] = field(default_factory=list)  # mini-batch number of each tree
    index: list[int] = field(default_factory=list)  # its prompt's place in the step's batch
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass
class Trainer(Generic[T]):
    """One policy, one sampler, one learner, on each rank. `version` counts optimiser steps that changed the weights.

    staleness     steps between the drawing of roots and their training; 0: none, nothing runs beside anything
    old_logprobs  whose log-probs ratios are taken against: the learner's own under the weights at the start of the step
                  (see `appo.trainer.old_logprobs`), or those that the engine recorded
    score_references Ω from two scoring passes; wanted where decoding rounds (bfloat16)
    keep_all_rows also rows without advantage (entropy bonus)
    threads       cores of this rank, shared by learner and sampler while both run; None: torch's numbers stay
    """

    algo: Algorithm
    sampler: TreeSampler[T] | None  # None: it learns from trees that exist (`learn`)
    learner: MinibatchLearner
    objective: Objective
    grade: Grade | None
    push: Callable[[int], dict[str, float]]  # weights → engine under the given version
    token_budget: int
    minibatches: int
    version: int = 0
    score_references: bool = False
    keep_all_rows: bool = False
    staleness: int = 0
    old_logprobs: Literal["learner", "engine"] = "learner"
    threads: int | None = None
    ranks: Ranks = field(default_factory=Ranks)
    costs: Costs = field(default_factory=Costs)  # of a packed stream, for even work over ranks
    on_phase: Callable[[str, int, int], None] = lambda name, done, total: None
    # Version whose log-probs are the old log-probs; None: the engine's are.
    old_logp_version: int | None = None

    def __post_init__(self) -> None:
        compares = self.algo.has_branches and self.algo.branch_by == "score"
        self._score_reference = self.score_references and compares
        share = None
        if self.staleness and self.threads:
            device = getattr(self.learner, "device", None)
            share = split_threads(self.threads, device is None or device.type == "cpu")
        if self.sampler is not None:
            self.roots = RootPrefetcher(
                self.sampler,
                self.algo.roots,
                self.minibatches,
                self._score_reference,
                threads=share,
            )

    @property
    def rollouts(self) -> TreeSampler[T]:
        """The sampler, where there is one."""
        assert self.sampler is not None, "this trainer learns from trees that exist"
        return self.sampler

    # -- one step ----------------------------------------------------------------------------------

    def step(
        self, number: int, tasks: Sequence[Task], prompts: Sequence[Sequence[int]]
    ) -> StepResult:
        """One training step. Collective: every rank is given the whole batch and takes its share of each mini-batch.

        `tasks` are those of step number + staleness: their roots are drawn here. None if there is no such step. The
        roots of this step were drawn `staleness` steps ago, or by `prefetch`.
        """
        log, result, waited = StepMetrics(), StepResult(), self.rollouts.tool_wait_s
        dealt = shard_prompts(tasks, prompts, self.minibatches, self.ranks)
        plans: dict[int, BranchPlan] = {}
        if self.staleness:
            parts = self.roots.take(number)
        else:
            parts = self._draw(number, dealt, plans, log)
        self._start([[g.tree for g in part.tree_rollouts] for part in parts], log)
        for k, part in enumerate(parts):
            trees = self._grow(part, plans, log)
            self.on_phase("reward", 0, len(trees))
            with log.clock("reward"):
                assert self.grade is not None
                for name, value in self.grade(trees).items():
                    log.sums.total(name, value)
            prefetching = None
            if self.staleness and tasks:
                ahead = number + self.staleness
                prefetching = self.roots.prefetching(
                    ahead, dealt[k], log, self._on_progress(len(dealt[k]))
                )
            self._train(trees, log, prefetching)
            result.trees += trees
            result.plans += [plans.get(id(g)) for g in part.tree_rollouts]
            result.minibatch += [k] * len(trees)
            result.index += [p.index for p in part.prompts]
        result.metrics = self._metrics(result, log, waited)
        return result

    def learn(
        self, parts: Sequence[Sequence[RolloutTree]]
    ) -> tuple[dict[str, float], list[dict[str, float]]]:
        """The learning half of one step, on finished and graded trees of each of its mini-batches. Collective.

        → (the metrics that it has, by the names of a step's record; what the learner answered for each mini-batch)
        """
        log = StepMetrics()
        self._start(parts, log)
        for trees in parts:
            self._train(trees, log)
        return log.finish(self.ranks) | {"policy/version": self.version}, log.learned

    # -- roots and branches ------------------------------------------------------------------------

    def missing(self, number: int, steps: int) -> list[int]:
        """The steps whose roots must be given to `prefetch` before step `number` of a run of `steps`, in order."""
        if not self.staleness:
            return []
        due = range(number, min(number + self.staleness, steps + 1))
        return [step for step in due if step not in self.roots.waiting]

    def prefetch(
        self, number: int, tasks: Sequence[Task], prompts: Sequence[Sequence[int]]
    ) -> None:
        """Draw the roots of a coming step now, with the weights as they are."""
        dealt = shard_prompts(tasks, prompts, self.minibatches, self.ranks)
        self.roots.prefetch(number, dealt, self._on_progress(sum(map(len, dealt))))

    def save_roots(self, folder: Path) -> None:
        """RootPrefetcher that wait for their step, into a folder (of a checkpoint); nothing without staleness."""
        if self.staleness:
            self.roots.save(folder, self.ranks.rank)

    def restore_roots(self, folder: Path) -> None:
        """What `save_roots` of a run on any number of ranks wrote. Call it after the weights were pushed."""
        if self.staleness:
            self.roots.restore(folder, self.ranks)

    def _on_progress(self, prompts: int, phase: str = "rollout") -> Callable[[int], None]:
        """A callback: given how many rollouts still grow, it reports to `on_phase` how many are done."""
        return lambda left: self.on_phase(phase, max(0, prompts * self.algo.roots - left), 0)

    def _draw(
        self,
        number: int,
        dealt: Sequence[Sequence[Prompt]],
        plans: dict[int, BranchPlan],
        log: StepMetrics,
    ) -> list[MinibatchShard[T]]:
        """RootPrefetcher of all mini-batches. The first is drawn from unmoved weights: its prompts branch as soon as they can."""
        with log.clock("rollout"):
            parts = [self.roots.start(number, prompts) for prompts in dealt]
            first = {id(g) for g in parts[0].tree_rollouts}

            def branch_early(tree_rollout: T) -> None:
                if id(tree_rollout) in first and self.algo.has_branches:
                    plans[id(tree_rollout)] = self.rollouts.grow_branches(
                        [tree_rollout], self.algo
                    )[0]

            self.rollouts.run(branch_early, self._on_progress(sum(map(len, dealt))))
        later = [g for part in parts[1:] for g in part.tree_rollouts]
        if self._score_reference and later:
            self.on_phase("score", 0, len(later))
            with log.clock("score"):
                self.rollouts.score_reference(later)
        return parts

    def _grow(
        self, part: MinibatchShard[T], plans: dict[int, BranchPlan], log: StepMetrics
    ) -> list[RolloutTree]:
        """Branches of this mini-batch with the weights as they are now; → its finished trees."""
        waiting = [g for g in part.tree_rollouts if id(g) not in plans]
        if not self.algo.has_branches:
            for g in waiting:
                self.rollouts.release(g)
        elif waiting:
            self.on_phase("score", 0, len(waiting))
            with log.clock("score"):
                found = self.rollouts.grow_branches(waiting, self.algo)
                plans |= {id(g): plan for g, plan in zip(waiting, found, strict=True)}
            with log.clock("branch"):
                self.rollouts.run(on_progress=lambda left: self.on_phase("branch", 0, left))
        return self.rollouts.finish(part.tree_rollouts)

    # -- learning ----------------------------------------------------------------------------------

    def _start(self, parts: Sequence[Sequence[RolloutTree]], log: StepMetrics) -> None:
        """Compute old log-probs, before the first update, of what will be trained after it.

        Those of the first mini-batch are the log-probs of its own training forward.
        """
        self.old_logp_version = self.version if self.old_logprobs == "learner" else None
        if self.old_logp_version is None or len(parts) == 1:
            return
        later = [tree for trees in parts[1:] for tree in trees]
        self.on_phase("old_logprobs", 0, len(later))
        with log.clock("learn"), log.clock("old_logprobs"):
            set_old_logp(later, self.learner, self.token_budget)

    def _train(
        self,
        trees: Sequence[RolloutTree],
        log: StepMetrics,
        prefetching: AbstractContextManager[None] | None = None,
    ) -> None:
        """Credit, packing, one update on a mini-batch, and the push if weights have changed."""
        credit = assign(trees, self.algo, keep_all=self.keep_all_rows)
        with prefetching or nullcontext(), log.clock("learn"):
            with log.clock("pack"):
                batches = pack(
                    trees,
                    credit.credits,
                    token_budget=self.token_budget,
                    keep_all=self.keep_all_rows,
                )
                log.sums.total("learn/tokens", sum(b.unique_tokens for b in batches))
                count_packing(log.sums, sharing_counts(trees, batches, self.token_budget))
                batches, even = balance(batches, self.ranks, self.costs)
                log.sums.most("pack/imbalance", even["pack/imbalance"])
            self.on_phase("learn", 0, len(batches))
            out = self.learner.train_minibatch(batches, credit.counts, self.objective)
        log.learned.append(out)
        log.sums.total("learn/rows", sum(len(c) for c in credit.credits))
        log.sums.total("group/zero_variance", credit.zero_groups)
        log.sums.total("group/ungraded_leaves", credit.ungraded)
        if not (out["learner/empty"] or out["learner/nonfinite"]):
            self.version += 1
            with log.clock("push"):
                log.pushed.append(self.push(self.version))

    def _metrics(self, result: StepResult, log: StepMetrics, waited: float) -> dict[str, float]:
        count_trees(log.sums, result.trees)
        if self.algo.has_branches:
            plans = [p for p in result.plans if p is not None]
            count_branches(log.sums, plans, self.algo.branch_by == "score")
        log.sums.most("time/tool_wait", self.rollouts.tool_wait_s - waited)
        return log.finish(self.ranks) | {"policy/version": self.version}
