"""Ours: the native engine behind the protocol that rollouts use."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import appo
from appo.rollout.engine import SamplingParams
from appo.rollout.native import NativeEngine

sys.path.append(str(Path(__file__).resolve().parents[3]))  # the checkout, for `bench`

from bench.peers.rollout.grow import Drawn, Growing, grow_alive
from bench.peers.rollout.serve import Stepwise, serve
from bench.peers.rollout.workload import Workload


class Ours:
    fork_is_call = True

    def __init__(self, engine: Any):
        self.engine, self._seeds = engine, 0

    @property
    def rows(self) -> int:
        stats = self.engine.stats()
        return int(stats["prefill_tokens"] + stats["decode_tokens"])

    def prompt(self, ids: Sequence[int]) -> int:
        return self.engine.add_prompt(ids)

    def fork(self, seq: int, at: int) -> int:
        return self.engine.fork(seq, at)

    def append(self, seq: int, ids: Sequence[int]) -> None:
        self.engine.append(seq, ids)

    def draw(self, seq: int, count: int) -> None:
        self._seeds += 1
        self.engine.submit(seq, SamplingParams(count), seed=self._seeds)

    def step(self) -> dict[int, Drawn]:
        return {e.seq: Drawn(e.token_ids, e.logprobs) for e in self.engine.step()}

    def busy(self) -> bool:
        return self.engine.has_work()

    def release(self, seq: int) -> None:
        self.engine.release(seq)


class OurPeer(Stepwise):
    """Answers one request more than the others: what a tree holds while all of it is alive."""

    def hold(self, work: Workload) -> dict[str, Any]:
        """Grow the tree and keep it.

        → seconds, rows, and the engine's stats with every handle still held.
        """
        engine = self.backend.engine
        rows, begin = self.rows, time.perf_counter()
        growing = Growing(self.backend, work)
        grow_alive(growing)
        seconds, stats = time.perf_counter() - begin, engine.stats()
        growing.release()
        return {"wall": seconds, "rows": self.rows - rows, "stats": stats}


def make(settings: dict[str, Any]) -> OurPeer:
    torch.set_num_threads(settings["threads"])
    batch = max(32, settings["sequences"])
    engine = NativeEngine(Path(settings["model"]), dtype="bfloat16", max_batch=batch)
    version = f"appo {appo.__version__}"
    return OurPeer(Ours(engine), "log-prob and entropy of every drawn token", version)


if __name__ == "__main__":
    serve(make)
