"""What the trainer needs of a sampler and of a learner: it knows neither room, `appo.run` hands it both."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

from torch import Tensor

from appo.algo.algorithm import Algorithm
from appo.algo.branching import BranchPlan
from appo.algo.objective import Objective
from appo.packing.pack import PackedBatch
from appo.types import Counts, RolloutTree, Task


class PendingTree(Protocol):
    """A tree in the making, as its sampler knows it."""

    @property
    def tree(self) -> RolloutTree:
        """What was sampled so far."""


T = TypeVar("T", bound=PendingTree)


class TreeSampler(Protocol[T]):
    """Samples trees: roots, then branches (implemented by `appo.rollout.sampler.Rollouts`)."""

    tool_wait_s: float

    def start(
        self, task: Task, prompt_ids: Sequence[int], roots: int, step: int, copy: int = 0
    ) -> T:
        """A tree whose roots begin to grow at the next `run`."""

    def score_reference(self, tree_rollouts: Sequence[T]) -> None:
        """Score roots under the weights that drew them, for `grow_branches` after an update."""

    def run(
        self,
        on_roots_done: Callable[[T], None] | None = None,
        on_progress: Callable[[int], None] | None = None,
    ) -> None:
        """Grow until nothing is left to do; on_progress gets the number of rollouts left."""

    def grow_branches(self, tree_rollouts: Sequence[T], algo: Algorithm) -> list[BranchPlan]:
        """Choose branch points under the weights of now, and fork."""

    def release(self, tree_rollout: T) -> None:
        """Give back the roots of a tree that gets no branches."""

    def finish(self, tree_rollouts: Sequence[T]) -> list[RolloutTree]:
        """The finished trees; what the engine held of them is given back."""

    def save(self, tree_rollout: T) -> dict[str, Any]:
        """Complete roots as JSON types."""

    def restore(self, data: dict[str, Any]) -> T:
        """What `save` wrote, in a sampler that may be another."""


class MinibatchLearner(Protocol):
    """Learns from packed trees (implemented by `appo.learner.learner.Learner`). Collective."""

    def train_minibatch(
        self, batches: Sequence[PackedBatch], counts: Counts, loss_fn: Objective
    ) -> dict[str, float]:
        """One optimiser step; → metrics."""

    def old_logprobs(self, batches: Sequence[PackedBatch]) -> list[Tensor]:
        """Log-probs of every edge under the weights of now: one float32[E] per batch."""
