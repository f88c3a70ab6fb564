"""RootPrefetcher of coming steps, drawn on a thread of their own while the learner trains.

With staleness k, the roots of mini-batch j of step t + k are drawn while mini-batch j of step t trains, under the weights
that the engine has then: the thread starts after that mini-batch's branches are complete and is joined before the new
weights are pushed. So what is drawn with which weights is a matter of counting, never of timing. Only the engine and the
tools run there: no collective, no tokenizer that somebody else uses, no randomness but that of a root's own path.
"""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch

from appo.dist.ranks import Ranks
from appo.errors import CheckpointError
from appo.trainer.protocols import T, TreeSampler
from appo.trainer.step_metrics import StepMetrics
from appo.types import Task

R = TypeVar("R")
Progress = Callable[[int], None]  # rollouts that still grow

POLL_S = 0.1  # how often the main thread looks after the other one while it waits
GRACE_S = (
    5.0  # how long a thread may take to end after its step has failed; then it is left to itself
)
FILES = "roots_rank{}.jsonl"


@dataclass(frozen=True)
class Prompt:
    """A prompt of a step: its place in the step's batch and in its mini-batch, both over all ranks.

    copy: how often the task came before in the step.
    """

    index: int
    position: int
    task: Task
    ids: Sequence[int]
    copy: int


@dataclass
class MinibatchShard(Generic[T]):
    """This rank's share of a mini-batch: its prompts and the tree rollouts (of the sampler) that belong to them."""

    prompts: list[Prompt]
    tree_rollouts: list[T]


def shard_prompts(
    tasks: Sequence[Task], prompts: Sequence[Sequence[int]], minibatches: int, ranks: Ranks
) -> list[list[Prompt]]:
    """This rank's prompts of each mini-batch: of those of mini-batch k, in order, every world-th. A share may be empty."""
    size, seen = len(tasks) // minibatches, Counter[str]()
    parts: list[list[Prompt]] = [[] for _ in range(minibatches)]
    for index, (task, ids) in enumerate(zip(tasks, prompts, strict=True)):
        k, position = divmod(index, size)
        if position % ranks.world == ranks.rank:
            parts[k].append(Prompt(index, position, task, ids, seen[task.task_id]))
        seen[task.task_id] += 1
    return parts


@dataclass
class RootPrefetcher(Generic[T]):
    """Draws roots, now or beside the learner, and keeps those that wait for their step.

    sampler   see `appo.trainer.protocols.TreeSampler`
    count     roots per prompt
    score_reference  whether roots that wait for an update are scored with the weights that drew
              them (`Rollouts.score_reference`)
    threads   (learner, sampler) while both run; None leaves torch's numbers alone
    """

    sampler: TreeSampler[T]
    count: int
    minibatches: int
    score_reference: bool = False
    threads: tuple[int, int] | None = None
    # step → its mini-batches so far
    waiting: dict[int, list[MinibatchShard[T]]] = field(default_factory=dict)

    def start(self, step: int, prompts: Sequence[Prompt]) -> MinibatchShard[T]:
        """Roots that start to grow at the sampler's next `run`."""
        start = self.sampler.start
        tree_rollouts = [start(p.task, p.ids, self.count, step, p.copy) for p in prompts]
        return MinibatchShard(list(prompts), tree_rollouts)

    def draw(
        self, step: int, parts: Sequence[Sequence[Prompt]], on_progress: Progress
    ) -> list[MinibatchShard[T]]:
        """Complete roots of some mini-batches, under the weights that the engine has."""
        out = [self.start(step, prompts) for prompts in parts]
        self.sampler.run(on_progress=on_progress)
        tree_rollouts = [g for part in out for g in part.tree_rollouts]
        if self.score_reference and tree_rollouts:
            self.sampler.score_reference(tree_rollouts)
        return out

    def prefetch(self, step: int, parts: Sequence[Sequence[Prompt]], on_progress: Progress) -> None:
        """All roots of a coming step, now."""
        self.waiting[step] = self.draw(step, parts, on_progress)

    def take(self, step: int) -> list[MinibatchShard[T]]:
        """The mini-batches that wait for this step; they wait no longer."""
        parts = self.waiting.pop(step)
        assert len(parts) == self.minibatches, f"step {step}: {len(parts)} mini-batches were drawn"
        return parts

    @contextmanager
    def prefetching(
        self, step: int, prompts: Sequence[Prompt], log: StepMetrics, on_progress: Progress
    ) -> Iterator[None]:
        """Draw the roots of one mini-batch of a coming step while the block runs.

        They are complete when the block is left. What the block raises ends the drawing; what the
        drawing raises is raised at the end of the block.
        `log` gets the seconds of the drawing ("ahead") and of the wait for it ("rollout").
        """
        mine, theirs = self.threads or (None, None)
        task = BackgroundTask(lambda report: self.draw(step, [prompts], report), theirs)
        task.start()
        try:
            with _torch_threads(mine):
                yield
            with log.clock("rollout"):
                parts = task.wait(on_progress)
        except BaseException:
            task.abandon()
            raise
        log.seconds["ahead"] += task.seconds
        self.waiting.setdefault(step, []).extend(parts)

    def save(self, folder: Path, rank: int) -> None:
        """Write what waits on this rank into a folder (of a checkpoint)."""
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / FILES.format(rank), "w") as file:
            file.write(json.dumps({"steps": sorted(self.waiting)}) + "\n")
            for step, parts in sorted(self.waiting.items()):
                for k, part in enumerate(parts):
                    for p, tree_rollout in zip(part.prompts, part.tree_rollouts, strict=True):
                        place = {
                            "step": step,
                            "minibatch": k,
                            "index": p.index,
                            "position": p.position,
                        }
                        file.write(json.dumps(place | self.sampler.save(tree_rollout)) + "\n")

    def restore(self, folder: Path, ranks: Ranks) -> None:
        """What waited when the checkpoint was made, on however many ranks: each takes the prompts it is dealt now."""
        files = [folder / FILES.format(r) for r in range(len(list(folder.glob(FILES.format("*")))))]
        records: list[dict[str, Any]] = []
        for file in files:
            try:
                head, *lines = [json.loads(line) for line in file.read_text().splitlines()]
            except (OSError, ValueError) as error:
                raise CheckpointError(f"{file}: not the roots of a checkpoint: {error}") from error
            self.waiting = {
                s: [MinibatchShard([], []) for _ in range(self.minibatches)] for s in head["steps"]
            }
            records += [x for x in lines if x["position"] % ranks.world == ranks.rank]
        for x in sorted(records, key=lambda x: (x["step"], x["index"])):
            tree_rollout = self.sampler.restore(x)
            part, tree = self.waiting[x["step"]][x["minibatch"]], tree_rollout.tree
            ids = tree.nodes[0].token_ids
            part.prompts.append(Prompt(x["index"], x["position"], tree.task, ids, x["copy"]))
            part.tree_rollouts.append(tree_rollout)


class BackgroundTask(threading.Thread, Generic[R]):
    """Runs a function on a thread of its own. `wait` returns its result, or raises what it raised.

    The function gets a callback for its progress and must call it now and then.
    """

    def __init__(self, do: Callable[[Progress], R], threads: int | None):
        super().__init__(name="appo-roots", daemon=True)  # never keeps the process from ending
        self.seconds = 0.0
        self._do, self._threads = do, threads
        self._left: int | None = None
        self._abandoned = False
        self._result: list[R] = []  # one, when it is there
        self._error: BaseException | None = None

    def run(self) -> None:
        """On the thread itself; `start` calls it."""
        log = StepMetrics()
        try:
            with log.clock("all"), _torch_threads(self._threads):
                self._result = [self._do(self._on_progress)]
        except BaseException as error:  # raised again by `wait`
            self._error = error
        self.seconds = log.seconds["all"]

    def _on_progress(self, left: int) -> None:
        self._left = left
        if self._abandoned:
            raise InterruptedError("the step that these roots were drawn beside has failed")

    def wait(self, on_progress: Progress) -> R:
        """The result; raises what `do` raised.

        Calls on_progress(rollouts left) on the caller's thread whenever there is news.
        """
        reported = None
        while self.is_alive():
            self.join(POLL_S)
            if self._left is not None and self._left != reported:
                reported = self._left
                on_progress(reported)
        if self._error is not None:
            raise self._error
        return self._result[0]

    def abandon(self) -> None:
        """Have the function raise at its next report of progress, and give it some time to get there."""
        self._abandoned = True
        self.join(GRACE_S)


@contextmanager
def _torch_threads(number: int | None) -> Iterator[None]:
    """The calling thread computes on so many cores within the block; torch counts them by thread."""
    before = torch.get_num_threads()
    if number is not None:
        torch.set_num_threads(number)
    try:
        yield
    finally:
        if number is not None:
            torch.set_num_threads(before)


def split_threads(threads: int, on_cpu: bool) -> tuple[int, int]:
    """Cores for (learner, sampler) while both run: halves on a CPU, all for both where the learner is on a device."""
    if not on_cpu:
        return threads, threads
    theirs = max(1, threads // 2)
    return max(1, threads - theirs), theirs
