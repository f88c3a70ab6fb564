"""The other commands, each run as a user would."""

import json
import subprocess
import sys

from appo.models.resolve import check_model_folder
from appo.rollout.store import read_trees


def appo(*args, timeout=200):
    done = subprocess.run(
        [sys.executable, "-m", "appo", *map(str, args)],
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return done.stdout


def test_doctor_tries_what_it_reports():
    said = appo("doctor", "--plain")
    for word in ("torch", "kernels", "sandbox landlock", "sandbox auto", "GPU", "model cache"):
        assert word in said


def test_rollout_shows_and_saves_trees(tmp_path):
    said = appo("rollout", "tiny", "threads=1", "-n", 2, "--save", tmp_path / "t.jsonl", "--plain")
    assert said.count("question  What") == 2 and "branch at token" in said
    trees = list(read_trees(tmp_path / "t.jsonl"))
    assert len(trees) == 2 and all(len(t.roots) == 4 and len(t.branches) > 0 for t in trees)
    for t in trees:
        for leaf in t.leaves:
            assert leaf.finish is not None and leaf.reward is not None


def test_eval_measures_the_base_model_and_a_run(tmp_path):
    common = ["threads=1", "eval.questions=32"]
    base = appo("eval", "tiny", *common, "--plain")
    assert "accuracy" in base and "32 graded" in base
    run = tmp_path / "run"
    appo("train", "tiny", *common, "steps=2", "prompts_per_step=8", f"output={run}", "--plain")
    trained = appo("eval", "tiny", *common, "--run", run, "--plain")
    last = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()][-1]
    # The same weights, questions and noise: the command repeats the run's last evaluation.
    assert f"{last['eval/accuracy']:.3f}" in trained and "policy version" in trained


def test_sft_makes_a_model_that_can_be_sampled(tmp_path):
    appo("sft", "tiny", "--steps", 3, "--batch", 8, "--threads", 1, "-o", tmp_path / "m", "--plain")
    info = check_model_folder(tmp_path / "m")
    assert info.arch == "Qwen3ForCausalLM" and 5e5 < info.params < 1e6
    appo(
        "rollout",
        "tiny",
        "threads=1",
        f"model.name={tmp_path / 'm'}",
        "rollout.max_new_tokens=8",
        "--plain",
    )
