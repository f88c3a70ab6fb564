"""The far end of the pipe.

An implementation loads once, then answers one JSON line per request line.

    python peer_NAME.py '{"model": "folder", "threads": 1, …}'

Request {"do": "step", "work": {…}, "rows": […], …} → {"wall", "cpu": seconds of the step's forward
and backward over these rows, "update_wall", "update_cpu": clipping and optimiser, "tokens": read by
the model, "peak_bytes", "error"}.
"""

from __future__ import annotations

import json
import os
import re
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any


class Clock:
    """Seconds of wall and CPU time since the last call."""

    def __init__(self) -> None:
        self()

    def __call__(self) -> tuple[float, float]:
        now = time.perf_counter(), time.process_time()
        before, self._last = getattr(self, "_last", now), now
        return now[0] - before[0], now[1] - before[1]


def answer(make: Callable[[dict[str, Any]], Callable[..., dict[str, Any]]]) -> None:
    """Load with `make(settings)`; the function it returns answers requests until the input ends."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints must not land between the answers
    state: dict[str, Any] = {}

    def load() -> dict[str, Any]:
        state["run"] = make(json.loads(sys.argv[1]))
        return {}

    def reply(work: Callable[[], dict[str, Any]]) -> None:
        try:
            out = work() | {"error": None}
        except Exception:
            # Whatever a foreign trainer raises is a result of the benchmark; the parent writes it
            # down.
            out = {"error": traceback.format_exc()}
        replies.write(json.dumps(out) + "\n")
        replies.flush()

    reply(load)
    for line in sys.stdin:
        reply(lambda: measured(state["run"], json.loads(line)))  # noqa: B023
    os._exit(0)  # some libraries leave threads behind that would keep the process alive


def measured(run: Callable[..., dict[str, Any]], request: dict[str, Any]) -> dict[str, Any]:
    forget = Path("/proc/self/clear_refs")
    if forget.exists():
        forget.write_text("5")  # the high-water mark falls to what is held now
    out = run(**request)
    return out | {"peak_bytes": _peak()}


def _peak() -> int:
    """The most physical memory since the mark fell.

    0 where the kernel does not tell (not Linux).
    """
    status = Path("/proc/self/status")
    found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text()) if status.exists() else None
    return int(found[1]) * 1024 if found else 0
