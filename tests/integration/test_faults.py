"""Faults inside a run: counted and reported, and the run goes on or stops cleanly with a checkpoint."""

import subprocess
import sys
import textwrap

from appo.observability.metrics import read_metrics

PREAMBLE = """
import sys, torch
from appo.cli import main
import appo.algo.objective as objective, appo.tools.python as python_tool, appo.rollout.grade as grade

def poison(calls):
    make = objective.make_objective
    def bad(*a, **k):
        real, count = make(*a, **k), [0]
        def loss(stats, rows, counts):
            out, metrics = real(stats, rows, counts)
            count[0] += 1
            return (out * float("nan") if count[0] in calls else out), metrics
        return loss
    objective.make_objective = bad
"""
TINY = ["train", "tiny", "--plain", "threads=1", "prompts_per_step=4", "algo.roots=2", "algo.branches=1", "algo.rollouts=4",
        "eval.questions=8", "save_every=1", "learner.lr=1e-3"]  # fmt: skip


def run(code, *args, tmp_path):
    argv = ["appo", *TINY, f"output={tmp_path / 'run'}", *args]
    script = PREAMBLE + textwrap.dedent(code) + f"\nsys.argv = {argv!r}\nmain()\n"
    return subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=200
    )


def steps(tmp_path):
    return [r for r in read_metrics(tmp_path / "run") if r["kind"] == "step"]


def test_a_nan_loss_is_skipped_and_counted(tmp_path):
    done = run("poison({2, 3})", "steps=3", tmp_path=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    records = steps(tmp_path)
    assert len(records) == 3
    assert sum(r["learner/nonfinite"] for r in records) == 2
    # Two updates were skipped, so the policy version is behind by two (and by mini-batches without any signal).
    empty = sum(r["learner/empty"] for r in records)
    assert records[-1]["policy/version"] == 6 - 2 - empty


def test_too_many_nans_stop_the_run_with_a_checkpoint_that_resumes(tmp_path):
    done = run("poison(set(range(3, 99)))", "steps=8", "learner.max_nonfinite=2", tmp_path=tmp_path)
    assert done.returncode == 1 and "LearnerError" in done.stderr, done.stderr[-3000:]
    assert "Traceback" not in done.stderr
    assert "resume=" in done.stderr
    before = len(steps(tmp_path))
    assert (tmp_path / "run" / "report.md").exists()
    again = subprocess.run(
        [sys.executable, "-m", "appo", *TINY, "steps=8", "learner.max_nonfinite=2", f"resume={tmp_path / 'run'}"],
        capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert again.returncode == 0, again.stderr[-3000:]
    assert len(steps(tmp_path)) == 8 > before


def test_a_crashing_tool_is_counted_and_the_run_goes_on(tmp_path):
    done = run(
        """
        def crash(self, argument):
            raise RuntimeError("tool host is gone")
        python_tool.PythonTool.__call__ = crash
        """,
        "steps=1",
        tmp_path=tmp_path,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (record,) = steps(tmp_path)
    assert record["tool/errors"] == 1.0 and record["tool/use"] == 0.0 and record["tool/calls"] > 0


def test_a_grader_timeout_is_counted_and_never_a_zero(tmp_path):
    done = run(
        """
        from appo.reward.workers import Grade
        from appo.reward.compose import grade_item
        class Late:
            def grade(self, items):
                return [Grade(None, "timeout: 5 s", 5.0) if i % 2 else Grade(1.0 if x.answer == x.gold else 0.0, None, 0.0)
                        for i, x in enumerate(items)]
        real = grade.grade_trees
        grade.grade_trees = lambda trees, text, pool, reward: real(trees, text, Late(), reward)
        """,
        "steps=1",
        "reward.strictness=none",
        tmp_path=tmp_path,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (record,) = steps(tmp_path)
    assert (
        record["grade/errors"]
        == record["grade/error:timeout"]
        == record["group/ungraded_leaves"]
        == 8
    )
