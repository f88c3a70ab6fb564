"""Our learner, with the tree packed or every row for itself.

Layout "rows" is the latter, in the same streams and kernels.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import torch

from appo.algo.objective import make_objective
from appo.algo.resolve import resolve
from appo.config import AlgoConfig, LearnerConfig, RunContext
from appo.learner import Learner
from appo.learner import learner as backend
from appo.learner.push_weights import ChecksumStream

sys.path.append(str(Path(__file__).resolve().parents[3]))  # the checkout, for `bench`

from bench.peers.learner.answer import Clock, answer
from bench.peers.learner.trees import Work, batches


def make(settings: dict[str, Any]):
    torch.set_num_threads(settings["threads"])
    context = RunContext(dtype="bfloat16", threads=settings["threads"])
    learner = Learner(settings["model"], LearnerConfig(lr=1e-6), seed=0, context=context)
    objective = make_objective(resolve(AlgoConfig()), version=lambda: 0)
    guards = Guards()

    def checksum() -> dict[str, Any]:
        """What the CRC of a push adds to walking over all weights."""
        clock = Clock()
        for _ in learner.named_weights():
            pass
        _, walk = clock()
        for _ in ChecksumStream(learner.named_weights()):
            pass
        return {"cpu": clock()[1] - walk}

    def step(work: dict[str, Any], layout: str, rows: list[int]) -> dict[str, Any]:
        """rows: which ones, for layout "rows"; the tree has all that train."""
        w, clock = Work.of(work), Clock()
        only = rows if layout == "rows" else None
        streams, counts = batches(w, settings["budget"], only)
        _, packing = clock()
        guards.seconds = 0.0
        learner.accumulate(streams, counts, objective, len(streams))
        wall, cpu = clock()
        norm = learner._apply()[1]
        update = clock()
        return {
            "wall": wall, "cpu": cpu, "update_wall": update[0], "update_cpu": update[1],
            "tokens": sum(b.unique_tokens for b in streams), "streams": len(streams), "packing_cpu": packing,
            "guards_cpu": guards.seconds, "grad_norm": norm,
        }  # fmt: skip

    def run(do: str, **request: Any) -> dict[str, Any]:
        return step(**request) if do == "step" else checksum()

    return run


class Guards:
    """CPU seconds spent in the finite checks that the learner calls."""

    def __init__(self) -> None:
        self.seconds = 0.0
        for name in ("non_finite_counts", "nan_unless_finite", "why_not_finite"):
            setattr(backend, name, self._timed(getattr(backend, name)))

    def _timed(self, function: Any) -> Any:
        def call(*args: Any) -> Any:
            begin = time.process_time()
            try:
                return function(*args)
            finally:
                self.seconds += time.process_time() - begin

        return call


if __name__ == "__main__":
    answer(make)
