"""A pool of grader processes with a deadline per item.

Graders run foreign code (sympy, a user's function) on text that a policy under optimisation
pressure wrote. A worker that hangs, dies or eats memory is killed and replaced, its item becomes an
error that is counted, and the others go on. An error is `Grade.score is None`; it is never a 0.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from appo.errors import ConfigError, GraderError
from appo.imports import is_import, split
from appo.reward import GRADERS
from appo.reward.maths import quick_maths
from appo.reward.own import EXPECTED

STACK_S = 0.5  # patience for answers to SIGUSR1
LOAD_S = 60.0  # patience for a new worker to import its libraries
IN_PROCESS = ("exact", "qa_em", "qa_f1", "paper")  # linear in the length of their input


@dataclass(frozen=True)
class GradeItem:
    """One answer to grade.

    `answer` None means that there was none: score 0.0 without asking the grader.
    """

    grader: str  # name in GRADERS or "module:function"
    answer: str | None
    gold: Any
    meta: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Grade:
    """score is None exactly when error is not. wall_s: seconds spent on this item."""

    score: float | None
    error: str | None = None
    wall_s: float = 0.0


class GraderPool:
    r"""Grades items in `workers` processes; use it as a context manager or call `close`.

    >>> with GraderPool(workers=1, timeout_s=5.0) as pool:
    ...     pool.grade([GradeItem("maths", "\\frac{1}{2}", "0.5")])[0].score
    1.0

    Processes start on first need; verdicts that need no algebra are reached in this process.
    """

    def __init__(self, workers: int = 1, timeout_s: float = 5.0):
        if workers < 1 or not timeout_s > 0:
            raise ConfigError(
                f"reward.workers={workers}, reward.timeout_s={timeout_s}: both must be positive"
            )
        self.size, self.timeout_s = workers, timeout_s
        self._workers: list[_Worker] = []
        self._lock = threading.Lock()
        self._closed = False
        self.stats = {"graded": 0, "in_process": 0, "errors": 0, "timeouts": 0, "restarts": 0}

    def grade(self, items: Sequence[GradeItem]) -> list[Grade]:
        """One Grade per item, in order. Safe to call from several threads (calls take turns).

        Raises ConfigError for an unknown grader name and GraderError when no worker can be started.
        """
        out: list[Grade | None] = [None] * len(items)
        todo: deque[int] = deque()
        for i, item in enumerate(items):
            check_grader(item.grader)
            out[i] = _in_process(item)
            if out[i] is None:
                todo.append(i)
        self.stats["in_process"] += len(items) - len(todo)
        with self._lock:
            if self._closed:
                raise GraderError("the grader pool is closed")
            if todo:
                self._run(items, todo, out)
        grades = [g for g in out if g is not None]
        assert len(grades) == len(items)
        self.stats["graded"] += len(grades)
        self.stats["errors"] += sum(g.error is not None for g in grades)
        return grades

    def describe(self) -> str:
        """What each busy worker does, with its Python stack.

        Takes no lock: a watchdog asks when all else stands still.
        """
        busy = [w for w in list(self._workers) if w.item is not None]
        places = [w.ask_stack() for w in busy]
        if busy:
            time.sleep(STACK_S)
        return "\n".join(w.describe(place) for w, place in zip(busy, places))

    def close(self) -> None:
        """Kill and reap every worker. May be called twice."""
        with self._lock:
            self._closed = True
            while self._workers:
                self._workers.pop().kill()

    def __enter__(self) -> GraderPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run(self, items: Sequence[GradeItem], todo: deque[int], out: list[Grade | None]) -> None:
        while len(self._workers) < min(self.size, len(todo)):
            self._workers.append(_Worker())
        try:
            while todo or any(w.item is not None for w in self._workers):
                for worker in self._workers:
                    if worker.item is None and todo:
                        index = todo.popleft()
                        worker.begin(index, items[index], self.timeout_s)
                for worker in _ready_or_late(self._workers):
                    self._collect(worker, out)
        except BaseException:
            # A reply that belongs to an abandoned call must not be read by the next one.
            while self._workers:
                self._workers.pop().kill()
            raise

    def _collect(self, worker: _Worker, out: list[Grade | None]) -> None:
        """Take what the worker has to say; replace it when it is late or dead."""
        index = worker.item
        assert index is not None
        reply = worker.read()
        wall = time.monotonic() - worker.began
        if reply is not None:
            if reply.get("ready"):
                worker.send_item()
                return
            out[index] = Grade(reply.get("score"), reply.get("error"), wall)
            worker.item = None
            return
        if worker.alive and time.monotonic() < worker.deadline:
            return  # half a line
        late = worker.alive
        tail = worker.kill()
        if worker.loading:  # libraries could not be imported: the next worker would do no better
            self._workers.remove(worker)
            raise GraderError(
                f"a grader process did not start within {LOAD_S:.0f} s or died: {tail or 'no output'}"
            )
        self._workers[self._workers.index(worker)] = _Worker()
        self.stats["restarts"] += 1
        self.stats["timeouts"] += late
        reason = (
            f"timeout: no verdict within {self.timeout_s:g} s"
            if late
            else f"crash: worker died ({worker.how})"
        )
        out[index] = Grade(None, reason, wall)


def check_grader(name: str, where: str = "grader") -> None:
    """ConfigError unless `name` is in GRADERS or has the form `module:function`."""
    if name in GRADERS:
        return
    if not is_import(name):
        raise ConfigError(
            f"{where} {name!r} is unknown; use one of {', '.join(GRADERS)} or 'module:function'"
        )
    split(name, where, EXPECTED)


def _in_process(item: GradeItem) -> Grade | None:
    """The verdict when it cannot hang, else None."""
    if item.answer is None and item.grader != "paper":
        return Grade(0.0)
    began = time.monotonic()
    try:
        if item.grader == "maths":
            score = quick_maths(item.answer or "", item.gold)
        elif item.grader in IN_PROCESS:
            score = GRADERS[item.grader](item.answer or "", item.gold, item.meta)
        else:
            return None
    except GraderError as error:
        return Grade(None, f"GraderError: {error}", time.monotonic() - began)
    return None if score is None else Grade(score, None, time.monotonic() - began)


class _Worker:
    """One process, its pipes and the item it works on."""

    def __init__(self) -> None:
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115 — lives as long as the worker
        env = dict(os.environ)
        env |= {
            "PYTHONPATH": os.pathsep.join(p or str(Path.cwd()) for p in sys.path),
            "PYTHONUNBUFFERED": "1",
        }
        env |= dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "appo.reward.worker"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._stderr, env=env, start_new_session=True,
        )  # fmt: skip
        self._buffer = b""
        self._loaded: set[str] = set()
        self._message: dict[str, Any] = {}
        self.item: int | None = None
        self.began = self.deadline = 0.0
        self.loading = False
        self.how = ""

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def fileno(self) -> int:
        assert self._process.stdout is not None
        return self._process.stdout.fileno()

    def begin(self, index: int, item: GradeItem, timeout_s: float) -> None:
        self.item, self.began = index, time.monotonic()
        self._message = {
            "grader": item.grader, "answer": item.answer, "gold": item.gold, "meta": item.meta, "timeout_s": timeout_s,
        }  # fmt: skip
        if item.grader in self._loaded:
            self.send_item()
            return
        self.loading, self.deadline = True, time.monotonic() + LOAD_S
        self._loaded.add(item.grader)
        self._send({"load": item.grader, "timeout_s": LOAD_S})

    def send_item(self) -> None:
        self.loading, self.began = False, time.monotonic()
        self.deadline = self.began + self._message["timeout_s"]
        self._send(self._message)

    def _send(self, message: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(message, default=str).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            self.deadline = 0.0  # it is dead; the next look at it says so

    def read(self) -> dict[str, Any] | None:
        """The reply if a whole line is there. Never blocks."""
        while _wait([self], 0.0):
            block = os.read(self.fileno(), 1 << 16)
            if not block:
                self._end()
                break
            self._buffer += block
        line, newline, rest = self._buffer.partition(b"\n")
        if not newline:
            return None
        self._buffer = rest
        reply: dict[str, Any] = json.loads(line)
        return reply

    def ask_stack(self) -> int | None:
        """Have it write its Python stack to its stderr.

        Where that will begin, None if it cannot be asked.
        """
        if (
            self.loading or not self.alive
        ):  # one that still starts has no handler, and the signal would end it
            return None
        begin = os.fstat(self._stderr.fileno()).st_size
        self._process.send_signal(signal.SIGUSR1)
        return begin

    def describe(self, stack_at: int | None) -> str:
        """Item, seconds, and the stack that it was asked for."""
        limit = LOAD_S if self.loading else self._message["timeout_s"]
        head = (
            f"pid {self._process.pid}: {'loading ' if self.loading else ''}{self._message['grader']}, item {self.item}, "
            f"for {time.monotonic() - self.began:.0f} s of {limit:g} s"
        )
        if stack_at is None:
            return head
        # pread: the worker writes where its file position is, which is ours as well.
        stack = os.pread(self._stderr.fileno(), 1 << 16, stack_at).decode(errors="replace").strip()
        return f"{head}\n{stack or 'no stack: it is stopped, or it does not come back from the kernel'}"

    def _end(self) -> None:
        """It closed its output, so it is going: wait for the exit code, but not for ever."""
        try:
            self._process.wait(1.0)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def kill(self) -> str:
        """End the process and its children, reap it, and return the last line it wrote to stderr."""
        code = self._process.poll()
        with contextlib.suppress(ProcessLookupError):  # its group is gone already: what we want
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self.how = f"exit {code}" if code is not None else "killed"
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                try:
                    pipe.close()
                except BrokenPipeError:
                    continue  # unsent bytes for a dead reader
        self._stderr.seek(0)
        lines = self._stderr.read().decode(errors="replace").strip().splitlines()
        self._stderr.close()
        return lines[-1][:300] if lines else ""


def _ready_or_late(workers: list[_Worker]) -> list[_Worker]:
    """Busy workers that have written, died or missed their deadline.

    Waits for the first of them.
    """
    busy = [w for w in workers if w.item is not None]
    ready = _wait(busy, max(0.0, min(w.deadline for w in busy) - time.monotonic()))
    now = time.monotonic()
    return [w for w in busy if w in ready or now >= w.deadline]


def _wait(workers: list[_Worker], timeout_s: float) -> list[_Worker]:
    """Those with something to read. poll, not select: a trainer may hold more than 1024 files."""
    poll = select.poll()
    by_file = {w.fileno(): w for w in workers}
    for file in by_file:
        poll.register(file, select.POLLIN)
    return [by_file[file] for file, _ in poll.poll(math.ceil(timeout_s * 1000))]
