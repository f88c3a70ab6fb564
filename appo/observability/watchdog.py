"""A run that does not move explains itself and ends, instead of holding a machine for a night.

The loop calls `beat` whenever something has been done. A thread of its own looks at the beats; when
there was none for `timeout_s` it writes down what every thread, child process and rank was doing
(`appo.observability.stall`) and leaves with exit code 75. Every rank also keeps a small heartbeat
file in the run folder: one that stopped changing belongs to a process that is frozen or gone, and
the other ranks name it. While any rank moves, none ends: the others wait for it.
"""

from __future__ import annotations

import faulthandler
import json
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TextIO

from appo.observability import stall

EXIT_STALLED = 75  # EX_TEMPFAIL: nothing is wrong with the input, try again (here: with resume=)
FOLDER = "heartbeat"  # in the run folder: rank_N.json
EXPLAIN_S = 30.0  # the explanation must not hang where the run does (a lock, a file system)
STDERR = 2

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Beat:
    """The last thing that a rank is known to have begun."""

    phase: str
    detail: str = ""


class Watchdog:
    """Ends the process when `beat` was not called for `timeout_s` seconds; 0 switches it off.

    A context manager.

    folder    the run folder: heartbeats and the file stall-rankN-TIME.txt go there
    describe  more about the present moment (title → text): the collective waited for, tool calls in
              flight … Called from another thread, only when the run stalls, and given up if it
              hangs itself.
    world     number of ranks whose heartbeats are looked at
    leave     what ends the process; os._exit, since a stalled thread cannot be asked to unwind

    >>> with Watchdog(run, rank=0, timeout_s=1800, describe=session.describe) as watchdog:
    ...     watchdog.beat("learn", "micro-batch 3")

    Time during which this process itself was stopped (Ctrl-Z, a suspended job) does not count, as
    long as it is shorter than twice `timeout_s`. A call into C that never gives the interpreter
    lock back silences the thread as well: then the C watchdog of faulthandler prints the stacks
    after twice the time and ends the process with exit code 1. It cannot tell such a call from a
    longer stop.
    """

    def __init__(
        self,
        folder: Path | str,
        rank: int = 0,
        timeout_s: float = 1800.0,
        describe: Callable[[], dict[str, str]] = dict,
        *,
        world: int = 1,
        leave: Callable[[int], object] = os._exit,
    ):
        self.folder, self.rank, self.timeout_s = Path(folder), rank, timeout_s
        self.describe, self.world, self.leave = describe, world, leave
        self.interval = min(5.0, timeout_s / 10)
        self._beat = Beat("start")
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None
        self._unwritten = ""  # why the last heartbeat could not be written

    def beat(self, phase: str, detail: str = "") -> None:
        """Something was done; now comes `phase`.

        Costs nothing: call it as often as you like, from any thread.
        """
        self._beat = Beat(phase, detail)

    def start(self) -> None:
        """Begin to watch."""
        if self.timeout_s > 0 and self._thread is None:
            self._write_heartbeat(0.0)
            self._thread = threading.Thread(target=self._watch, name="appo-watchdog", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """Watch no longer; may be called twice."""
        self._stopped.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
            faulthandler.cancel_dump_traceback_later()

    def __enter__(self) -> Watchdog:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _watch(self) -> None:
        seen, idle, before = self._beat, 0.0, time.monotonic()
        while not self._stopped.wait(self.interval):
            now = time.monotonic()
            # A gap means that we did not run either: a stopped process must not be ended for having
            # been stopped.
            passed, before = min(now - before, 2 * self.interval), now
            idle = idle + passed if self._beat is seen else 0.0
            seen = self._beat
            self._write_heartbeat(idle)
            faulthandler.dump_traceback_later(2 * self.timeout_s, exit=True, file=STDERR)
            if idle >= self.timeout_s and not self._others_move():
                self._end(idle)
                return

    def _others_move(self) -> bool:
        """Whether another rank has made progress lately."""
        if self.world == 1:
            return False
        found = stall.beats(self.folder / FOLDER, self.world).values()
        return any(
            b["idle_s"] < self.timeout_s and not b["frozen"]
            for b in found
            if b["rank"] != self.rank
        )

    # -- heartbeats

    def _write_heartbeat(self, idle: float) -> None:
        """Replace this rank's file. A full disk is no reason to end the run here."""
        path = self.folder / FOLDER / f"rank_{self.rank}.json"
        beat = {
            "rank": self.rank, "pid": os.getpid(), "host": socket.gethostname(), "phase": self._beat.phase,
            "detail": self._beat.detail, "idle_s": round(idle, 1), "written": time.time(), "every_s": self.interval,
        }  # fmt: skip
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            scratch = path.with_suffix(".tmp")
            scratch.write_text(json.dumps(beat))
            scratch.replace(path)
            self._unwritten = ""
        except OSError as error:
            if not self._unwritten:
                log.warning("the heartbeat %s cannot be written: %s", path, error)
            self._unwritten = str(error)

    # -- the end

    def _end(self, idle: float) -> None:
        """Explain, then leave.

        In a thread, because whatever holds the run may hold the explanation.
        """
        faulthandler.cancel_dump_traceback_later()
        writer = threading.Thread(
            target=self._explain, args=(idle,), name="appo-stall", daemon=True
        )
        writer.start()
        writer.join(EXPLAIN_S)
        stall.kill_children()
        self.leave(EXIT_STALLED)

    def _explain(self, idle: float) -> None:
        name = f"stall-rank{self.rank}-{time.strftime('%Y%m%d-%H%M%S')}.txt"
        outputs: list[TextIO] = [sys.stderr]
        try:
            # closed by the end of the process
            outputs.append(open(self.folder / name, "w"))  # noqa: SIM115
        except OSError as error:
            print(f"{name} cannot be written: {error}", file=sys.stderr)
        for part in self._parts(idle):  # one by one: what hangs must not take the others with it
            for output in outputs:
                output.write(part + "\n")
                output.flush()
        sys.stdout.flush()

    def _parts(self, idle: float) -> Iterator[str]:
        beat = self._beat
        yield (
            f"\nappo: rank {self.rank} (pid {os.getpid()}) has not moved for {idle:.0f} s (watchdog_s is "
            f"{self.timeout_s:g}), in phase {beat.phase!r}{f' ({beat.detail})' if beat.detail else ''}. "
            f"It ends now with exit code {EXIT_STALLED}; resume={self.folder} goes on from the newest checkpoint."
        )
        yield stall.section(
            "ranks", lambda: stall.ranks(self.folder / FOLDER, self.rank, self.world)
        )
        yield stall.section("child processes", stall.children)
        yield stall.section("threads of this process", stall.threads)
        try:
            described = self.describe()
        except (
            Exception
        ) as error:  # written by others and read in a moment when anything may be broken
            described = {"more": f"cannot be described: {type(error).__name__}: {error}"}
        for title, text in described.items():
            yield stall.section(title, partial(str, text))
