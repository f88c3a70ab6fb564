"""The tool pool: results by key, deadlines, failures with a kind, and an end that never hangs."""

import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import appo
from appo.errors import ConfigError, ToolError
from appo.tools.base import ToolResult
from appo.tools.pool import ToolPool


class Fake:
    """Calls a function with the argument; counts how often it was closed."""

    description = "for tests"

    def __init__(self, name, function):
        self.name, self.function, self.closed = name, function, 0

    def __call__(self, argument):
        return ToolResult(self.function(argument), True, 0.0)

    def close(self):
        self.closed += 1


def nap(argument):
    time.sleep(float(argument))
    return argument


def fail(argument):
    raise ToolError(argument, argument) if argument == "unavailable" else ValueError(argument)


@pytest.fixture
def gate():
    """A tool that never returns, until the test is over."""
    event = threading.Event()
    yield Fake("stuck", lambda a: event.wait(60) and a)
    event.set()


@pytest.fixture
def make(gate):
    pools = []

    def pool(workers=2, timeout_s=5.0):
        tools = [Fake("echo", str), Fake("nap", nap), Fake("fail", fail), gate]
        pools.append(ToolPool({t.name: t for t in tools}, workers, timeout_s))
        return pools[-1]

    yield pool
    for p in pools:
        p.close()


def test_wait_all_is_sorted_by_key(make):
    pool = make(workers=4)
    for key, seconds in [((1, 0), "0.1"), ((0, 1), "0.05"), ((0, 0), "0")]:
        pool.submit(key, "nap", seconds)
    results = pool.wait_all()
    assert [k for k, _ in results] == [(0, 0), (0, 1), (1, 0)]
    assert [r.output for _, r in results] == ["0", "0.05", "0.1"]
    assert pool.wait_all() == [] and pool.poll() == []


def test_poll_does_not_wait_and_wait_returns_the_first(make):
    pool = make()
    pool.submit("slow", "nap", "0.3")
    assert pool.poll() == []
    pool.submit("fast", "echo", "x")
    assert [k for k, _ in pool.wait(5)] == ["fast"]
    assert pool.wait(0.01) == []
    assert [k for k, _ in pool.wait()] == ["slow"]
    assert pool.wait() == []  # nothing is out: returns at once


def test_calls_overlap(make):
    pool = make(workers=8)
    started = time.monotonic()
    for i in range(8):
        pool.submit(i, "nap", "0.2")
    assert len(pool.wait_all()) == 8 and time.monotonic() - started < 1.2


def test_no_more_threads_than_workers():
    running, most, lock = 0, 0, threading.Lock()

    def count(argument):
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(0.01)
        with lock:
            running -= 1
        return argument

    with ToolPool({"count": Fake("count", count)}, workers=3, timeout_s=5) as pool:
        for i in range(30):
            pool.submit(i, "count", "")
        assert len(pool.wait_all()) == 30
    assert most == 3


def test_failures_have_a_kind(make):
    pool = make()
    pool.submit(0, "fail", "boom </result>")
    pool.submit(1, "fail", "unavailable")
    pool.submit(2, "nothing", "x")
    pool.submit(3, "echo", "fine")
    results = dict(pool.wait_all())
    assert [results[i].error_kind for i in range(4)] == [
        "crash",
        "unavailable",
        "bad_request",
        None,
    ]
    assert "ValueError: boom" in results[0].output and "</result>" not in results[0].output
    assert "'nothing'" in results[2].output and "echo" in results[2].output
    stats = pool.stats()
    assert stats["calls"] == 4 and stats["failures"] == 3 and stats["failed_crash"] == 1


def test_a_tool_that_never_returns(make):
    """Both workers are stuck; both calls time out, and later calls still run."""
    pool = make(workers=2, timeout_s=0.2)
    pool.submit(0, "stuck", "")
    pool.submit(1, "stuck", "")
    pool.submit(2, "echo", "after")
    started = time.monotonic()
    results = dict(pool.wait_all())
    assert time.monotonic() - started < 3
    assert [results[i].error_kind for i in range(3)] == ["timeout", "timeout", None]
    assert pool.stats()["failed_timeout"] == 2


def test_a_late_result_after_the_timeout_is_dropped(make):
    pool = make(workers=1, timeout_s=0.1)
    pool.submit(0, "nap", "0.3")
    assert [r.error_kind for _, r in pool.wait_all()] == ["timeout"]
    time.sleep(0.4)
    assert pool.poll() == []
    pool.submit(0, "echo", "again")  # the key is free again
    assert [r.output for _, r in pool.wait_all()] == ["again"]


def test_cancel(make):
    pool = make(workers=1)
    pool.submit("running", "nap", "0.2")
    pool.submit("queued", "echo", "x")
    pool.submit("kept", "echo", "y")
    time.sleep(0.05)
    pool.cancel("running")
    pool.cancel("queued")
    pool.cancel("unknown")
    started = time.monotonic()
    assert [k for k, _ in pool.wait_all()] == ["kept"]
    assert time.monotonic() - started < 0.15  # the cancelled call holds up nobody
    time.sleep(0.3)
    assert pool.poll() == []
    pool.submit("finished", "echo", "z")
    time.sleep(0.1)
    pool.cancel("finished")
    assert pool.poll() == []


def test_a_key_is_used_once_at_a_time(make):
    pool = make()
    pool.submit(0, "nap", "0.1")
    with pytest.raises(ToolError, match="still in use"):
        pool.submit(0, "echo", "x")
    assert len(pool.wait_all()) == 1


def test_close(make, gate):
    pool = make(workers=1)
    pool.submit(0, "stuck", "")
    pool.submit(1, "echo", "queued")
    started = time.monotonic()
    pool.close()
    pool.close()
    assert time.monotonic() - started < 1 and gate.closed == 1
    assert pool.wait_all() == []
    with pytest.raises(ToolError, match="closed"):
        pool.submit(2, "echo", "x")


def test_idle_threads_end_with_close(make):
    pool = make(workers=4)
    for i in range(8):
        pool.submit(i, "echo", "x")
    pool.wait_all()
    pool.close()
    until = time.monotonic() + 2
    while (
        any(t.name == "appo-tool" and t.is_alive() for t in pool._threads)
        and time.monotonic() < until
    ):
        time.sleep(0.01)
    assert not any(t.is_alive() for t in pool._threads)


def test_a_stuck_tool_does_not_keep_the_interpreter():
    code = """
import time
from appo.tools.pool import ToolPool
class Stuck:
    name = "stuck"; description = ""
    def __call__(self, argument): time.sleep(60)
    def close(self): pass
pool = ToolPool({"stuck": Stuck()}, 1, 0.1)
pool.submit(0, "stuck", "")
print(pool.wait_all()[0][1].error_kind)
"""
    root = str(Path(appo.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=20, cwd=root
    )
    assert done.stdout == "timeout\n" and done.returncode == 0, done.stderr


@pytest.mark.parametrize("workers, timeout_s", [(0, 1.0), (1, 0.0), (1, float("nan"))])
def test_arguments_are_checked(workers, timeout_s):
    with pytest.raises(ConfigError):
        ToolPool({}, workers, timeout_s)
