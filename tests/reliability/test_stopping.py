"""A run that is asked to stop, told to stop, or has no disk left goes on later as if nothing had happened.

One run is never disturbed; another one is stopped in every way there is and resumed each time. Metrics, trees and
weights must be equal in the end, bit by bit. The data set has 10 questions and a step takes 4, so the stops lie on
both sides of the edges between epochs.
"""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest
import torch
from support.tiny_runs import finish, records, start, steps, train, until, weights, written

from appo.dist.signals import SAME_S
from appo.learner.checkpoint import load_latest

SLOW_TOOL = """
import time, appo.tools.python as python_tool
def slow(self, argument):
    time.sleep(300)
python_tool.PythonTool.__call__ = slow
"""

# The third record does not fit: half of its line reaches the disk.
FULL_DISK = """
import errno, os, appo.observability.metrics as metrics
real, count = metrics.append_lines, [0]
def full(path, lines):
    count[0] += 1
    if count[0] == 3:
        with open(path, "a") as f:
            f.write(lines[0][: len(lines[0]) // 2])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
    real(path, lines)
metrics.append_lines = full
"""


@pytest.mark.timeout(400)
def test_stopped_in_every_way_and_resumed_each_time(tmp_path: Path) -> None:
    data = [f"data.train={records(tmp_path / 'train.jsonl', 10)}", "data.task=records",
            f"data.eval={records(tmp_path / 'eval.jsonl', 8, first=30)}", "eval.questions=8"]  # fmt: skip
    whole, run = tmp_path / "whole", tmp_path / "run"
    train(*data, "steps=12", f"output={whole}")

    process = start(*data, "steps=12", f"output={run}")
    until(lambda: steps(run) >= 2, process)
    process.send_signal(signal.SIGTERM)
    status, said = finish(process)
    done = steps(run)
    assert status == 143 and 2 <= done < 10, said
    assert f"stopped after step {done}" in said and f"resume={run}" in said
    assert "Traceback" not in said and (run / "report.md").exists()
    assert load_latest(run)[1]["step"] == done  # the step was finished and saved

    beat = run / "heartbeat" / "rank_0.json"
    beat.unlink()  # of the process before
    process = start(f"resume={run}", "tools.timeout_s=400", code=SLOW_TOOL)
    until(lambda: beat.exists() and "rollout" in beat.read_text(), process)
    process.send_signal(signal.SIGINT)
    time.sleep(SAME_S + 1)
    assert process.poll() is None  # it finishes its step, which takes long
    process.send_signal(signal.SIGINT)
    begin = time.monotonic()
    status, said = finish(process)
    assert status == 130 and "again: leaving now" in said, said
    assert time.monotonic() - begin < 20
    assert load_latest(run)[1]["step"] == done

    status, said = finish(start(f"resume={run}", code=FULL_DISK))
    assert status == 1 and "No space left on device" in said and "Traceback" not in said, said
    # What was written last is half a line; the checkpoint may be of a step before it.
    assert not (run / "metrics.jsonl").read_bytes().endswith(b"\n")
    assert load_latest(run)[1]["step"] == steps(run) == done + 2

    (tmp_path / "train.jsonl").write_text((tmp_path / "train.jsonl").read_text().replace("7", "8"))
    status, said = finish(start(f"resume={run}"))
    assert status == 2 and "is not the data this run was started with" in said, said
    assert "sha256 of train file: was" in said
    records(tmp_path / "train.jsonl", 10)
    status, said = finish(start(f"resume={run}", "learner.lr=0.5", "seed=3"))
    assert status == 2 and "seed: 0 -> 3" in said and "learner.lr: 0.0007 -> 0.5" in said, said

    said = train(f"resume={run}", "watchdog_s=77")
    assert "changed on resume: watchdog_s: 1800.0 -> 77.0" in said
    assert written(run) == written(whole)
    ours, theirs = weights(run), weights(whole)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)
