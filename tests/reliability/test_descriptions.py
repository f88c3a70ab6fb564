"""What the pools tell a watchdog: which calls are out, and where a worker is in its code."""

from __future__ import annotations

import os
import re
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from appo.reward.workers import GradeItem, GraderPool
from appo.tools.base import ToolResult
from appo.tools.pool import ToolPool


def until(found: Callable[[], object], seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not found():
        assert time.monotonic() < end
        time.sleep(0.02)


class Slow:
    name = description = "slow"

    def __init__(self) -> None:
        self.go = threading.Event()

    def __call__(self, argument: str) -> ToolResult:
        self.go.wait()
        return ToolResult("", True, 0.0)

    def close(self) -> None: ...


def test_tool_calls_running_and_queued() -> None:
    tool = Slow()
    with ToolPool({"slow": tool}, workers=1, timeout_s=9.0) as pool:
        assert pool.describe() == ""
        pool.submit((4, 0), "slow", "")
        pool.submit((4, 1), "slow", "")
        until(lambda: "running" in pool.describe())
        with pool._changed:  # a stalled thread may hold it
            said = pool.describe()
        assert re.fullmatch(
            r"slow \(4, 0\): running for \d s of 9 s\nslow \(4, 1\): queued for \d s", said
        )
        tool.go.set()
        pool.wait_all()
        assert pool.describe() == ""


def test_a_grader_tells_its_stack_and_a_frozen_one_that_it_cannot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "slow_grader.py").write_text(
        "import time\n"
        "def deep_inside(): time.sleep(600)\n"
        "def score(answer, gold, meta): deep_inside()\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    pool = GraderPool(workers=1, timeout_s=60.0)
    item = GradeItem("slow_grader:score", "1", "1")
    thread = threading.Thread(target=lambda: pool.grade([item]), daemon=True)
    try:
        thread.start()
        until(lambda: "in deep_inside" in pool.describe())
        said = pool.describe()
        assert re.match(r"pid \d+: slow_grader:score, item 0, for \d+ s of 60 s\n", said)
        os.kill(int(said.split()[1].rstrip(":")), signal.SIGSTOP)
        assert "no stack: it is stopped" in pool.describe()
        os.kill(int(said.split()[1].rstrip(":")), signal.SIGKILL)
        thread.join(30)
        assert not thread.is_alive() and pool.describe() == ""
    finally:
        pool.close()
