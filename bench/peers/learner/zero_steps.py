"""Seconds of a step per ZeRO stage.

Run by torchrun on any number of ranks, each with the same tree.

    torchrun --nproc-per-node 2 zero_steps.py '{"model": "folder", "work": {…}, "repeats": 3}'

Rank 0 prints one JSON line: {stage: median seconds}.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from pathlib import Path

import torch

from appo.algo.objective import make_objective
from appo.algo.resolve import resolve
from appo.config import AlgoConfig, LearnerConfig, RunContext
from appo.learner import Learner

sys.path.append(str(Path(__file__).resolve().parents[3]))  # the checkout, for `bench`

from bench.peers.learner.trees import Work, batches


def main() -> None:
    settings = json.loads(sys.argv[1])
    torch.set_num_threads(1)
    streams, counts = batches(Work.of(settings["work"]), 8192)
    objective = make_objective(resolve(AlgoConfig()), version=lambda: 0)
    found = {}
    for stage in (1, 2, 3):
        cfg, context = LearnerConfig(zero_stage=stage), RunContext(threads=1)
        with Learner(settings["model"], cfg, seed=0, context=context) as learner:
            seconds = []
            for _ in range(settings["repeats"] + 1):  # the first warms up
                begin = time.perf_counter()
                learner.train_minibatch(streams, counts, objective)
                seconds.append(time.perf_counter() - begin)
            found[stage] = statistics.median(seconds[1:])
            rank = learner.rank
    if not rank:
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
