"""What keeps NaN out of the weights: finite checks, and the evidence when they fail."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from appo.errors import LearnerError
from appo.packing.pack import PackedBatch


class TokenStats(Protocol):
    """Per-edge statistics of the current policy."""

    @property
    def logp(self) -> Tensor:
        """Log-probability of each edge's token, nats. [E]."""

    @property
    def entropy(self) -> Tensor:
        """Entropy of the distribution each edge's token was drawn from, nats. [E]."""


CHECKED = ("advantage", "behavior log-prob", "old log-prob", "log-prob", "log-ratio", "loss")


@torch.no_grad()
def non_finite_counts(loss: Tensor, stats: TokenStats, batch: PackedBatch) -> Tensor:
    """How many values of each CHECKED kind are not finite in a micro-batch.

    int64[6], on its device, without a wait.
    """
    ratio = stats.logp - batch.old_logp
    per_edge = [batch.advantage, batch.behavior_logp, batch.old_logp, stats.logp, ratio]  # each [E]
    bad = (~torch.isfinite(torch.stack(per_edge)) & batch.mask).sum(1)
    return torch.cat([bad, (~torch.isfinite(loss)).sum()[None]])


def why_not_finite(counts: Sequence[Tensor]) -> str | None:
    """The first thing that was not finite, in words, from `non_finite_counts` of every micro-batch.

    None if all is well.
    """
    rows = torch.stack(list(counts)).tolist() if counts else []
    for i, row in enumerate(rows):
        for name, bad in zip(CHECKED, row):
            if bad:
                return f"micro-batch {i}: {name} ({bad} values not finite)"
    return None


def nan_unless_finite(loss: Tensor, stats: TokenStats, counts: Tensor) -> Tensor:
    """`loss` if all `non_finite_counts` counts are 0, else one whose gradient is NaN.

    The gradient is NaN wherever there is one: the optimiser then refuses the step on every rank
    alike.

    The log-probs are added because a clipped loss may pass no gradient on; the loss stays in so
    that the backward visits the modules that it always visits. A sound loss keeps value and
    gradient bit by bit: zeros are added to it.
    """
    factor = torch.where(counts.any(), math.nan, 0.0).to(loss.dtype)
    return loss + (loss + stats.logp.sum()) * factor


def dump_batch(folder: Path, step: int, rank: int, batches: list[PackedBatch], reason: str) -> Path:
    """Write the batches of a refused step for a later look; returns the file.

    Load it with torch.load.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"nonfinite_step{step}_rank{rank}.pt"
    rows = [dict(vars(b)) for b in batches]
    torch.save({"step": step, "reason": reason, "batches": rows}, path)
    return path


def default_dump_dir() -> Path:
    """A folder of this process in the temporary directory; made only when something is dumped."""
    return Path(tempfile.gettempdir()) / f"appo-nonfinite-{os.getpid()}"


@dataclass
class NonFiniteGuard:
    """Counts refused steps and stops the run after `limit` in a row."""

    limit: int
    dump_dir: Path
    in_a_row: int = 0
    total: int = 0

    def passed(self) -> None:
        """A step was applied: the count in a row starts again."""
        self.in_a_row = 0

    def refused(self, step: int, rank: int, batches: list[PackedBatch], reason: str) -> None:
        """Count one; raise LearnerError naming the dump when there were too many."""
        self.in_a_row += 1
        self.total += 1
        if self.in_a_row < self.limit:
            return
        path = dump_batch(self.dump_dir, step, rank, batches, reason)
        raise LearnerError(
            f"{self.in_a_row} mini-batches in a row were not finite (learner.max_nonfinite is {self.limit}), at "
            f"optimiser step {step}: {reason}. No weight was changed. The batch is in {path}. "
            "Look at rewards and behavior log-probs there; lower learner.lr or learner.max_grad_norm if they are fine"
        )
