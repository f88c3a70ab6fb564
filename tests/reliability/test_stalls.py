"""A run in which something is frozen explains who and where, and ends with exit code 75."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from support import rank_runs
from support.tiny_runs import ROOT, SMALL, finish, start, steps, until

from appo.learner.checkpoint import load_latest

# Whatever the model writes, its program sleeps.
SLEEPER = """
import appo.tools.python as python_tool
python_tool.clean = lambda argument: "import time; time.sleep(3000)"
"""


def gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


@pytest.mark.timeout(200)
def test_a_frozen_tool_process_is_named(tmp_path: Path) -> None:
    """The pool's own deadline (a counted tool failure) comes first, unless it is longer than the watchdog's."""
    run = tmp_path / "run"
    process = start(
        f"output={run}", "eval.questions=0", "steps=1", "watchdog_s=10", "deterministic=false",
        "tools.timeout_s=3600", "tools.python.wall_s=3000", "tools.python.cpu_s=3000", code=SLEEPER,
    )  # fmt: skip
    beat = run / "heartbeat" / "rank_0.json"
    until(lambda: beat.exists() and "rollout" in beat.read_text(), process)
    children = lambda: psutil.Process(process.pid).children(recursive=True)  # noqa: E731
    until(children, process)
    time.sleep(1)  # the sandboxes are up
    sandboxes = children()
    for sandbox in sandboxes:
        sandbox.send_signal(signal.SIGSTOP)
    status, said = finish(process)
    assert status == 75, said[-3000:]
    (file,) = run.glob("stall-rank0-*.txt")
    explained = file.read_text()
    assert explained in said
    for words in (
        r"rank 0 \(pid \d+\) has not moved for \d+ s \(watchdog_s is 10\), in phase 'step 1/1: rollout'",
        rf"pid {sandboxes[0].pid}, parent {process.pid}: stopped",
        r"python \S+: running for \d+ s of 3600 s",
        "-- thread MainThread",
        "-- thread appo-tool",
        r"in run_python|in wait|in poll",
    ):
        assert re.search(words, explained), words + explained
    assert all(gone(p.pid) for p in sandboxes), "it left processes behind"


@pytest.mark.timeout(400)
def test_a_launcher_hands_sigterm_on_and_a_frozen_rank_is_named(tmp_path: Path) -> None:
    """Two ranks: SIGTERM to torchrun ends the run after its step, with a checkpoint; resumed, one rank freezes."""
    run = tmp_path / "run"
    torchrun = subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "appo",
         *SMALL, "steps=200", "eval.questions=0", f"output={run}"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"},
    )  # fmt: skip
    until(lambda: steps(run) >= 2, torchrun, 150)
    torchrun.send_signal(signal.SIGTERM)
    status, said = finish(torchrun)
    done = steps(run)
    assert said.count(f"stopped after step {done}") == 1 and status != 0, said[-3000:]
    assert load_latest(run)[1]["step"] == done

    ranks = rank_runs.start(2, ["-m", "appo", *SMALL[:3], f"resume={run}", "watchdog_s=15"])
    try:
        until(lambda: steps(run) > done, ranks[0], 150)
        ranks[1].send_signal(signal.SIGSTOP)
        status, said = finish(ranks[0], 100)
    finally:
        ranks[1].kill()
        ranks[1].communicate()
    assert status == 75, said[-3000:]
    (file,) = run.glob("stall-rank0-*.txt")
    explained = file.read_text()
    assert re.search(
        rf"rank 1 \(pid {ranks[1].pid} on \S+\): FROZEN OR DEAD, silent for", explained
    )
    assert re.search(r"== collective[^=]*\n\w+", explained), explained  # which one rank 0 waits in
    assert load_latest(run)[1]["step"] >= done
    assert json.loads((run / "heartbeat" / "rank_1.json").read_text())["pid"] == ranks[1].pid
