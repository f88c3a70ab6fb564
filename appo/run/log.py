"""What a run writes while it goes.

metrics.jsonl, branches.jsonl and trees.jsonl, by rank 0 and for all ranks.

Lines stand in the order of the tasks of a step, so that the files do not tell how many ranks have
written them.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from appo.dist.ranks import Ranks
from appo.observability.branches import BranchLog
from appo.observability.lines import cut_after
from appo.observability.metrics import MetricsWriter
from appo.types import RolloutTree

if TYPE_CHECKING:  # they load torch, and a user's mistake is found sooner without
    from appo.algo.branching import BranchPlan
    from appo.trainer.trainer import StepResult

# Counters of the engine that a step's record holds the differences of; not every engine has all of
# them.
ENGINE_WORK = (
    "prefill_tokens", "decode_tokens", "scored_tokens", "prefix_hits_tokens", "forks", "tokens_saved", "preemptions",
    "evicted_tokens",
)  # fmt: skip


class RunLog:
    """The three logs in `folder`.

    `resume_after`: step of the checkpoint the run goes on from; later lines are cut off.

    text: ids → readable text · save_trees: how many trees of a step are kept
    """

    def __init__(
        self,
        folder: Path,
        resume_after: int | None,
        *,
        text: Any,
        ranks: Ranks,
        save_trees: int | Literal["all"],
    ):
        self.folder, self.text, self.ranks, self.save_trees = folder, text, ranks, save_trees
        if not ranks.main:
            return
        # The metrics of a resumed run continue after its checkpoint; what was written past it is
        # drawn again.
        self._metrics = MetricsWriter(folder, resume_after=resume_after)
        self._branches = BranchLog(folder, resume_after=resume_after)
        if resume_after is not None:
            cut_after(folder / "trees.jsonl", resume_after)

    def metrics(self, record: Mapping[str, Any]) -> None:
        """One line of metrics.jsonl."""
        if self.ranks.main:
            self._metrics.write(record)

    def step(self, number: int, result: StepResult) -> None:
        """Branch points and trees of a step, of all ranks. Collective."""
        mine = []
        for i, k, tree, found in zip(
            result.index, result.minibatch, result.trees, result.plans, strict=True
        ):
            rows = branch_rows(tree, found, self.text) if found is not None else []
            saved = self.save_trees == "all" or i < self.save_trees
            plan = (found.omega_uninformative, found.shortfall) if found is not None else None
            mine.append((i, k, tree.task.task_id, rows, plan, tree if saved else None))
        gathered = self.ranks.gather(mine, "trees and branch points of the step")
        if gathered is not None:
            self._write(
                number,
                sorted(itertools.chain.from_iterable(gathered), key=lambda item: item[0]),
            )

    def _write(self, number: int, items: list[tuple[Any, ...]]) -> None:
        from appo.rollout.store import append_trees

        trees, parts = [], []
        for _, k, task_id, rows, plan, tree in items:
            if plan is not None:
                self._branches.write(number, k, task_id, rows, *plan)
            if tree is not None:
                trees.append(tree)
                parts.append(k)
        append_trees(self.folder / "trees.jsonl", trees, self.text, minibatch=parts)


def branch_rows(tree: RolloutTree, found: BranchPlan, text: Any) -> list[dict[str, Any]]:
    """One row per root of the prompt and branch point: where it fell, why, and what it earned."""
    views = {tree.leaves[i].root: tree.trajectory(i) for i in tree.roots}
    rewards = {leaf.root: leaf.reward for leaf in tree.leaves if leaf.is_root}
    # Branches were forked in the order of the points.
    branch_rewards = iter([leaf.reward for leaf in tree.leaves if not leaf.is_root])
    rows: list[dict[str, Any]] = []
    for point in found.points:
        view = views[point.root]
        rows.append(
            {
                "root": point.root, "position": point.position, "response_length": len(view),
                "token": text([int(view.response_ids[point.position])]), "rule": point.rule, "score": point.score,
                "z_entropy": point.z_entropy, "z_omega": point.z_omega, "omega_uninformative": found.omega_uninformative[point.root],
                "root_reward": rewards[point.root], "branch_reward": next(branch_rewards),
            }
        )  # fmt: skip
    return rows


def engine_work(
    before: Mapping[str, float], now: Mapping[str, float], ranks: Ranks
) -> dict[str, float]:
    """What the engines of all ranks did between two `stats()`.

    Differences, so that a resumed run writes the same.

    `memory/kv_*` is what a rank has needed at most so far, hence not the same after a resumption.
    Collective.
    """
    work = {f"engine/{k}": float(now[k] - before[k]) for k in ENGINE_WORK if k in now}
    peaks = {}
    if "blocks_peak" in now:
        peaks["memory/kv_blocks_peak"] = float(now["blocks_peak"])
        peaks["memory/kv_mb_peak"] = now["blocks_peak"] * now["block_bytes"] / 2**20
    return ranks.sum(work, "engine counters") | ranks.reduce(peaks, "max", "engine counters")
