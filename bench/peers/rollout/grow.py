"""One loop that grows a workload on anything that can fork, append and draw.

And the cost of a single fork on it.

Engines with continuous batching differ in what is behind `Backend`, never in when a tool answers or
a branch starts.
"""

from __future__ import annotations

import heapq
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, Protocol

sys.path.append(str(Path(__file__).resolve().parents[3]))  # the checkout, for `bench`

from bench.peers.rollout.workload import Rollout, Workload


@dataclass
class Drawn:
    """What a rollout drew; logprobs stays empty where the engine gives none."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)


class Backend(Protocol):
    """Handles are ints. `rows`: rows of the model run so far, prefill and decode together."""

    rows: int
    fork_is_call: (
        bool  # False: fork() only remembers; the work is done when the sequence first runs
    )

    def prompt(self, ids: Sequence[int]) -> int: ...

    def fork(self, seq: int, at: int) -> int: ...

    def append(self, seq: int, ids: Sequence[int]) -> None: ...

    def draw(self, seq: int, count: int) -> None:
        """Start to draw `count` tokens."""

    def step(self) -> dict[int, Drawn]:
        """Move all that draw on; → those that have their count, with what they drew since `draw`."""

    def busy(self) -> bool: ...

    def release(self, seq: int) -> None: ...


class Growing:
    """A tree in the making."""

    def __init__(self, backend: Backend, work: Workload):
        self.backend, self.work = backend, work
        self.lines = work.rollouts()
        self.drawn = [Drawn() for _ in self.lines]
        self.base = backend.prompt(work.prompt_ids())
        self.seq_of: dict[int, int] = {}  # by rollout
        self.rollout_of: dict[int, int] = {}  # by handle
        self.unfinished: set[int] = set()
        self.waiting: list[tuple[float, int]] = []  # (when the tool answers, rollout)

    def start(self, index: int) -> None:
        line = self.lines[index]
        parent = self.base if line.parent is None else self.seq_of[line.parent]
        seq = self.backend.fork(parent, line.at)
        self.seq_of[index], self.rollout_of[seq] = seq, index
        self.unfinished.add(index)
        self.backend.draw(seq, line.parts[0])

    def run(self) -> None:
        """Until every started rollout is done."""
        while self.unfinished:
            now = time.perf_counter()
            while self.waiting and self.waiting[0][0] <= now:
                self._answer(heapq.heappop(self.waiting)[1])
            if self.backend.busy():
                for seq, drawn in self.backend.step().items():
                    self._stopped(self.rollout_of[seq], drawn)
            elif self.waiting:
                time.sleep(max(0.0, self.waiting[0][0] - time.perf_counter()))

    def _stopped(self, index: int, drawn: Drawn) -> None:
        line, so_far = self.lines[index], self.drawn[index]
        first = not so_far.tokens
        so_far.tokens += drawn.tokens
        so_far.logprobs += drawn.logprobs
        if line.cut and first:
            heapq.heappush(self.waiting, (time.perf_counter() + self.work.wait_s, index))
        else:
            self.unfinished.discard(index)

    def _answer(self, index: int) -> None:
        seq, line = self.seq_of[index], self.lines[index]
        self.backend.append(seq, line.result)
        self.backend.draw(seq, line.parts[1])

    def release(self) -> None:
        for seq in (*self.seq_of.values(), self.base):
            self.backend.release(seq)


def grow(backend: Backend, work: Workload) -> list[Drawn]:
    """Grow the whole tree.

    The branches start when the last root is done. → what each rollout drew.
    """
    growing = Growing(backend, work)
    grow_alive(growing)
    growing.release()
    return growing.drawn


def grow_alive(growing: Growing) -> None:
    """The same with every handle still held at the end."""
    lines: list[Rollout] = growing.lines
    for level in (
        [i for i, line in enumerate(lines) if line.parent is None],
        [i for i, line in enumerate(lines) if line.parent is not None],
    ):
        for index in level:
            growing.start(index)
        growing.run()


class Fork(NamedTuple):
    """What one fork took.

    call_us: the fork call, None if it only remembers · first_ms: fork and first drawn token · rows:
    run for that
    """

    call_us: float | None
    first_ms: float
    rows: int


class Trunk:
    """A sequence that was computed (prefill_ms) and is forked at its end again and again."""

    def __init__(self, backend: Backend, ids: Sequence[int]):
        self.backend, self.length = backend, len(ids)
        begin = time.perf_counter()
        self.base = backend.prompt(ids)
        self.seq = backend.fork(self.base, len(ids))
        # One token more than the prefill: continuous batching forgets the pages of a request that
        # ends with it.
        _finish(backend, self.seq, 2)
        self.prefill_ms = (time.perf_counter() - begin) * 1e3

    def fork(self) -> Fork:
        rows, begin = self.backend.rows, time.perf_counter()
        child = self.backend.fork(self.seq, self.length)
        call = time.perf_counter() - begin
        _finish(self.backend, child, 1)
        first = time.perf_counter() - begin
        rows = self.backend.rows - rows
        self.backend.release(child)
        return Fork(call * 1e6 if self.backend.fork_is_call else None, first * 1e3, rows)

    def release(self) -> None:
        for seq in (self.seq, self.base):
            self.backend.release(seq)


def _finish(backend: Backend, seq: int, count: int) -> None:
    backend.draw(seq, count)
    while backend.busy():
        backend.step()
