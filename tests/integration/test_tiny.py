"""The main job on the tiny model: it learns, it repeats itself bit by bit, and it survives being killed."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest

from appo.observability.metrics import read_metrics, strip_times


def command(*args):
    return [sys.executable, "-m", "appo", "train", "tiny", "--plain", "threads=1", *map(str, args)]


def train(*args, timeout=900):
    done = subprocess.run(command(*args), capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def evals(run):
    return {r["step"]: r for r in read_metrics(run) if r["kind"] == "eval"}


@pytest.mark.timeout(1000)  # one to three minutes on a quiet core
@pytest.mark.parametrize("algo", ["appo", "grpo"])
def test_learns_to_use_the_tool(algo, tmp_path):
    said = train(f"algo={algo}", f"output={tmp_path}/run")
    ev = evals(tmp_path / "run")
    assert ev[0]["eval/accuracy"] < 0.5 and ev[30]["eval/accuracy"] >= 0.9, ev
    assert ev[30]["eval/questions"] >= 200
    for name in (
        "metrics.jsonl",
        "trees.jsonl",
        "report.md",
        "curve.png",
        "tree.txt",
        "config.yaml",
    ):
        assert (tmp_path / "run" / name).stat().st_size > 0
    assert len(re.findall(r"^step +\d+/30", said, re.M)) == 30, said
    steps = [r for r in read_metrics(tmp_path / "run") if r["kind"] == "step"]
    for key in ("reward/mean", "tool/use", "tokens/unique", "tokens/total", "policy/entropy", "time/rollout", "time/score",
                "time/branch", "time/reward", "time/learn", "time/push"):  # fmt: skip
        assert all(key in s for s in steps), key
    if algo == "appo":
        # Half of the mini-batches are drawn from unmoved weights: there Omega is flat by definition, and only there.
        assert all(
            0.45 <= s["branch/omega_uninformative"] <= 0.75
            for s in steps
            if not (s["learner/nonfinite"] or s["learner/empty"])
        )
        assert "branch" in (tmp_path / "run" / "report.md").read_text().lower()
    else:
        assert all("branch/omega_uninformative" not in s for s in steps)


SHORT = ("deterministic=true", "prompts_per_step=4", "eval.questions=16", "save_every=1", "algo.roots=2", "algo.branches=1",
         "algo.rollouts=4")  # fmt: skip


def records(run):
    return [strip_times(r) for r in read_metrics(run)]


AHEAD = (
    "staleness=1",
    "model.dtype=bfloat16",
)  # roots wait in checkpoints, with scores of the weights that drew them


@pytest.mark.timeout(600)
@pytest.mark.parametrize("more", [(), AHEAD], ids=["strict", "staleness-1"])
def test_deterministic_runs_agree_and_a_killed_run_resumes_bit_by_bit(more, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    settings = (*SHORT, *more, "steps=6")
    train(*settings, f"output={whole}")

    process = subprocess.Popen(
        command(*settings, f"output={killed}"),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        lines = (
            (killed / "metrics.jsonl").read_text().splitlines()
            if (killed / "metrics.jsonl").exists()
            else []
        )
        if len(lines) >= 4:  # evaluation + 3 steps
            break
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert process.returncode == -signal.SIGKILL, "the run ended before it could be killed"

    train(*settings, f"resume={killed}")
    assert records(killed) == records(whole)
    trees = [(run / "trees.jsonl").read_text().splitlines() for run in (whole, killed)]
    strip = lambda line: json.dumps(_without_seconds(json.loads(line)), sort_keys=True)  # noqa: E731
    assert [strip(x) for x in trees[0]] == [strip(x) for x in trees[1]]


def _without_seconds(value):
    if isinstance(value, dict):
        return {k: _without_seconds(v) for k, v in value.items() if k != "wall_s"}
    return [_without_seconds(v) for v in value] if isinstance(value, list) else value
