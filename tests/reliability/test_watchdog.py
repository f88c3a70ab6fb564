"""A process that does not move says what it was doing and leaves with exit code 75; one that moves is left alone."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from appo.observability.watchdog import EXIT_STALLED, Watchdog

PREAMBLE = """
import ctypes, subprocess, sys, threading, time
from appo.observability import watchdog
from appo.observability.watchdog import Watchdog
def stuck_here(seconds):
    ctypes.CDLL(None).sleep(seconds)  # in C, without the interpreter lock
"""


def stalled(tmp_path: Path, code: str, timeout: float = 60) -> tuple[int, str]:
    """(exit code, stderr) of a process that runs `code`."""
    done = subprocess.run(
        [sys.executable, "-c", PREAMBLE + textwrap.dedent(code), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    return done.returncode, done.stderr


def alive(pid: int) -> bool:
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


def test_a_main_thread_stuck_in_c_is_explained(tmp_path: Path) -> None:
    """Threads by name with their lines, a stopped child, a frozen rank, what the owner describes."""
    (tmp_path / "heartbeat").mkdir()
    host = socket.gethostname()
    frozen = {"rank": 1, "pid": 77, "host": host, "phase": "learn", "detail": "micro-batch 3", "idle_s": 2.0,
              "written": time.time() - 50, "every_s": 0.1}  # fmt: skip
    (tmp_path / "heartbeat" / "rank_1.json").write_text(json.dumps(frozen))
    # Without progress as well, and on a machine whose clock and shared disk may lag behind: not frozen yet.
    elsewhere = frozen | {"rank": 3, "pid": 78, "host": "b"}
    (tmp_path / "heartbeat" / "rank_3.json").write_text(json.dumps(elsewhere))
    code, said = stalled(
        tmp_path,
        """
        child = subprocess.Popen(["sleep", "98765"], start_new_session=True)
        child.send_signal(19)  # SIGSTOP
        print(child.pid, file=sys.stderr)
        threading.Thread(target=stuck_here, args=(60,), name="grader-7", daemon=True).start()
        watchdog = Watchdog(sys.argv[1], 0, 1.0, lambda: {"collective": "barrier of step 3"}, world=4)
        with watchdog:
            watchdog.beat("rollout", "12 of 64")
            stuck_here(60)
        """,
    )
    assert code == EXIT_STALLED == 75
    for words in (
        "rank 0 (pid", "has not moved for", "in phase 'rollout' (12 of 64)", "exit code 75",
        f"rank 1 (pid 77 on {host}): FROZEN OR DEAD, silent for 5", "was in phase 'learn' (micro-batch 3)",
        "rank 2: no heartbeat here", "rank 3 (pid 78 on b): alive, without progress for 2 s",
        "stopped", "sleep 98765", "thread MainThread", "thread grader-7", "in stuck_here",
        "== collective\nbarrier of step 3",
    ):  # fmt: skip
        assert words in said, said
    (file,) = tmp_path.glob("stall-rank0-*.txt")
    assert file.read_text() in said
    assert not alive(int(said.splitlines()[0])), "the stopped child outlived the run"


def test_a_call_that_keeps_the_interpreter_lock_is_explained_by_the_c_watchdog(
    tmp_path: Path,
) -> None:
    code, said = stalled(
        tmp_path,
        """
        def holds_the_lock():
            ctypes.PyDLL(None).sleep(60)
        watchdog = Watchdog(sys.argv[1], 0, 1.0)
        with watchdog:
            time.sleep(0.5)  # it has begun to watch
            holds_the_lock()
        """,
    )
    assert code == 1 and "in holds_the_lock" in said, said


def test_an_explanation_that_hangs_does_not_keep_the_process(tmp_path: Path) -> None:
    code, said = stalled(
        tmp_path,
        """
        watchdog.EXPLAIN_S = 1.0
        lock = threading.Lock()
        def describe():
            lock.acquire()
        with lock, Watchdog(sys.argv[1], 3, 0.5, describe):
            stuck_here(60)
        """,
    )
    assert code == 75 and "rank 3" in said and "in describe" not in said


def test_a_description_that_fails_is_no_reason_to_stay(tmp_path: Path) -> None:
    code, said = stalled(
        tmp_path,
        """
        with Watchdog("/proc/nowhere", 0, 0.5, lambda: {}["gone"]):  # and no folder to write to
            stuck_here(60)
        """,
    )
    assert code == 75
    assert "cannot be described: KeyError" in said and "cannot be written" in said, said


def test_a_process_that_was_itself_stopped_goes_on(tmp_path: Path) -> None:
    """Ctrl-Z or a suspended job for longer than the limit is no stall."""
    code = """
        with Watchdog(sys.argv[1], 0, 2.0) as watchdog:
            print("ready", flush=True)
            for _ in range(20):
                time.sleep(0.1)
                watchdog.beat("rollout")
        print("done")
        """
    with subprocess.Popen(
        [sys.executable, "-c", PREAMBLE + textwrap.dedent(code), str(tmp_path)],
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        os.kill(process.pid, signal.SIGSTOP)
        time.sleep(3.0)
        os.kill(process.pid, signal.SIGCONT)
        said, _ = process.communicate(timeout=60)
    assert (process.returncode, said) == (0, "done\n")


def test_beats_keep_it_quiet_and_the_heartbeat_tells_the_phase(tmp_path: Path) -> None:
    left: list[int] = []
    with Watchdog(tmp_path, 2, 0.5, leave=left.append) as watchdog:
        for i in range(12):
            watchdog.beat("learn", f"micro-batch {i}")
            time.sleep(0.1)
        beat = json.loads((tmp_path / "heartbeat" / "rank_2.json").read_text())
    assert not left and not list(tmp_path.glob("stall-*"))
    assert (beat["rank"], beat["pid"], beat["phase"]) == (2, os.getpid(), "learn")
    assert beat["detail"].startswith("micro-batch ")


def test_a_rank_that_waits_for_one_that_moves_stays(tmp_path: Path) -> None:
    """Until the other one stands still as well."""
    left: list[float] = []
    stay = Watchdog(tmp_path, 1, 0.5, world=2, leave=lambda code: left.append(time.monotonic()))
    with Watchdog(tmp_path, 0, 30.0, world=2) as other:
        other.interval = 0.1
        stay.start()
        for i in range(15):
            other.beat("learn", str(i))
            time.sleep(0.1)
        assert not left
        stopped = time.monotonic()
        while not left and time.monotonic() < stopped + 20:
            time.sleep(0.02)
        stay.stop()
    assert left[0] > stopped + 0.2


def test_zero_switches_it_off(tmp_path: Path) -> None:
    left: list[int] = []
    with Watchdog(tmp_path, 0, 0.0, leave=left.append) as watchdog:
        watchdog.beat("learn")
        time.sleep(0.3)
    assert not left and not list(tmp_path.iterdir())


@pytest.mark.parametrize("timeout_s", [0.3, 1.0])
def test_it_ends_once_and_not_early(tmp_path: Path, timeout_s: float) -> None:
    left: list[float] = []
    began = time.monotonic()
    watchdog = Watchdog(tmp_path, 0, timeout_s, leave=lambda code: left.append(time.monotonic()))
    watchdog.start()
    while not left and time.monotonic() < began + 20:
        time.sleep(0.02)
    watchdog.stop()
    (when,) = left
    assert when - began >= timeout_s
