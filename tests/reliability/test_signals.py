"""One signal is a request, two are an order, also when the main thread hears nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from appo.dist.signals import SAME_S, RunStopped, StopRequest

SCRIPT = """
import ctypes, sys, time
from appo.dist.signals import StopRequest
with StopRequest() as stop:
    print("ready", flush=True)
    {body}
print("left", stop.signum)
sys.exit(128 + stop.signum)
"""
LOOP = "while not stop.asked: time.sleep(0.05)"
DEAF = "ctypes.CDLL(None).sleep(1) ; [ctypes.CDLL(None).sleep(60) for _ in range(9)]"


def start(body: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(SCRIPT).format(body=body)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_once_is_a_request(signum: int, code: int) -> None:
    process = start(LOOP)
    process.send_signal(signum)
    said, warned = process.communicate(timeout=30)
    assert (process.returncode, said) == (code, f"left {signum}\n")
    assert "the step is finished and saved" in warned and "Traceback" not in warned


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_twice_ends_it_although_the_main_thread_is_deaf(signum: int, code: int) -> None:
    process = start(DEAF)
    process.send_signal(signum)
    time.sleep(SAME_S + 0.2)
    process.send_signal(signum)
    _, warned = process.communicate(timeout=20)
    assert process.returncode == code and "again: leaving now" in warned


def test_the_same_wish_forwarded_by_a_launcher_counts_once() -> None:
    left: list[int] = []
    with StopRequest(say=lambda text: None, leave=left.append) as stop:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.2)
        assert stop.asked and stop.signum in (signal.SIGINT, signal.SIGTERM)
        time.sleep(SAME_S)
        assert not left
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.2)
        assert left == [143]


def test_afterwards_signals_mean_what_they_meant_before() -> None:
    ours = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores it
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with StopRequest(say=lambda text: None) as stop:
        assert not stop.asked
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
    assert signal.set_wakeup_fd(-1) == -1
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)
    signal.signal(signal.SIGINT, ours)


def test_the_exit_code_is_that_of_a_shell() -> None:
    assert RunStopped("…", signal.SIGINT).exit_code == 130
    assert RunStopped("…", signal.SIGTERM).exit_code == 143
