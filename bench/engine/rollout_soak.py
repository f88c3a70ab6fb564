"""Random forks, draws, appends, cancels and releases on one engine: nothing may leak.

The tiny model of the package, so that operations count and not arithmetic. Part of
bench/engine/growth.py.
"""

from __future__ import annotations

import random
import sys
import time
from pathlib import Path

import psutil

from appo.models.resolve import TINY
from appo.rollout.engine import SamplingParams
from appo.rollout.native import NativeEngine

sys.path.append(str(Path(__file__).resolve().parents[2]))  # the checkout, for `bench`

from bench.common import Case

LIVE, LONGEST = 48, 400  # sequences alive at most; tokens of a sequence


class Soak:
    """One random operation at a time."""

    def __init__(self, engine: NativeEngine, seed: int):
        self.engine, self.random = engine, random.Random(seed)
        self.live: list[int] = []
        self.drawing: set[int] = set()
        self.done = 0

    def operation(self) -> None:
        if len(self.live) < 2:
            self.live.append(self.engine.add_prompt(self._ids(40)))
        elif len(self.live) >= LIVE:
            self.release()
        else:
            self.random.choice(
                (self.fork, self.fork, self.draw, self.append, self.cancel, self.release)
            )()
        for event in self.engine.step():
            self.drawing.discard(event.seq)
        self.done += 1

    def fork(self) -> None:
        parent = self.random.choice(self.live)
        at = self.random.randint(1, self.engine.length(parent))
        self.live.append(self.engine.fork(parent, at))

    def draw(self) -> None:
        seq = self.random.choice(self.live)
        if seq not in self.drawing and self.engine.length(seq) < LONGEST:
            self.engine.submit(seq, SamplingParams(self.random.randint(1, 24)), seed=self.done)
            self.drawing.add(seq)

    def append(self) -> None:
        seq = self.random.choice(self.live)
        if seq not in self.drawing and self.engine.length(seq) < LONGEST:
            self.engine.append(seq, self._ids(20))

    def cancel(self) -> None:
        seq = self.random.choice(self.live)
        self.engine.cancel(seq)
        self.drawing.discard(seq)

    def release(self) -> None:
        seq = self.live.pop(self.random.randrange(len(self.live)))
        self.engine.release(seq)
        self.drawing.discard(seq)

    def _ids(self, limit: int) -> list[int]:
        draw, vocab = self.random, self.engine.config.vocab
        return [draw.randrange(vocab) for _ in range(draw.randint(1, limit))]


def soak(operations: int) -> list[Case]:
    """Raises SystemExit if a block is left over when everything was released."""
    engine = NativeEngine(TINY, dtype="float32", max_batch=32)
    run = Soak(engine, seed=0)
    begin = time.perf_counter()
    # Memory settles while the pool grows to what the live sequences need.
    while run.done < operations // 4:
        run.operation()
    early = psutil.Process().memory_info().rss
    while run.done < operations:
        run.operation()
    late, seconds = psutil.Process().memory_info().rss, time.perf_counter() - begin
    while run.live:
        run.release()
    left = engine.stats()["blocks_used"]
    if left:
        raise SystemExit(f"{left:.0f} blocks are still taken after everything was released")
    return [
        Case("operations", "1/s", operations / seconds, higher_is_better=True),
        Case("resident memory after a quarter", "MiB", early / 2**20),
        Case("at the end", "MiB", late / 2**20),
        Case("blocks left over", "blocks", left),
    ]
