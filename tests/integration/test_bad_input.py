"""What a user gets wrong is one paragraph with field, value and fix, exit code 2, and no model was loaded for it."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

TINY = Path(__file__).parents[2] / "appo" / "models" / "tiny_qwen3"


def appo(*args, cwd=None):
    return subprocess.run(
        [sys.executable, "-m", "appo", *args], capture_output=True, text=True, cwd=cwd, timeout=120
    )


def check(done, *words, code=2):
    assert done.returncode == code, done.stdout + done.stderr
    said = " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr and len(said) < 1500
    for word in words:
        assert word in said, said


@pytest.fixture
def model(tmp_path):
    """A copy of the tiny model that a test may break."""
    return Path(shutil.copytree(TINY, tmp_path / "model"))


def edit(path, **values):
    config = json.loads(path.read_text()) | values
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["tiny", "learnr.lr=1"], ["learnr", "did you mean learner"]),
        (["tinny"], ["tinny", "did you mean 'tiny'"]),
        (["tiny", "steps=three"], ["steps='three'", "expected int"]),
        (["tiny", "algo.rollouts=7"], ["algo.roots", "7"]),
        (["tiny", "model.name=no/such-model", "model.offline=true"], ["no/such-model", "Tried"]),
        (["tiny", "model.name=./nowhere"], ["./nowhere"]),
        (["tiny", "data.task=arithmatic"], ["arithmatic", "did you mean"]),
        (["tiny", "tools.python.level=rlimit"], ["tools.python.allow_unsafe"]),
        (["tiny", "data.task=records", "data.train=missing.jsonl"], ["missing.jsonl"]),
        (["tiny", "output=/proc/appo-run"], ["output=/proc/appo-run", "cannot write"]),
        (["tiny", "resume=/nonexistent"], ["/nonexistent", "resume"]),
        (["tiny", "rollout.max_new_tokens=4096"], ["rollout.max_new_tokens", "context"]),
    ],
)
def test_bad_settings(args, words, tmp_path):
    if not any(a.startswith(("output=", "resume=")) for a in args):
        args = [*args, f"output={tmp_path / 'run'}"]
    check(appo("train", *args, "--plain", cwd=tmp_path), *words)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_empty_data_set(tmp_path):
    (tmp_path / "empty.jsonl").write_text("")
    check(appo("train", "tiny", "data.task=records", f"data.train={tmp_path}/empty.jsonl", f"output={tmp_path}/run"),
          "empty.jsonl")  # fmt: skip


def test_model_folder_without_weights(model, tmp_path):
    (model / "model.safetensors").unlink()
    check(
        appo("train", "tiny", f"model.name={model}", f"output={tmp_path}/run"),
        "weights",
        str(model),
    )


def test_unsupported_architecture(model, tmp_path):
    edit(model / "config.json", architectures=["MambaForCausalLM"])
    check(
        appo("train", "tiny", f"model.name={model}", f"output={tmp_path}/run"),
        "MambaForCausalLM",
        "LlamaForCausalLM",
    )


def test_tokenizer_without_chat_template(model, tmp_path):
    (model / "chat_template.jinja").unlink(missing_ok=True)
    edit(model / "tokenizer_config.json", chat_template=None)
    check(appo("train", "tiny", f"model.name={model}", f"output={tmp_path}/run"), "chat template")


def test_prompt_longer_than_the_context(tmp_path):
    def row(i):
        return {"data_source": "x", "prompt": [{"role": "user", "content": f"{i} word " * 1000}], "ability": "maths",
                "reward_model": {"ground_truth": "1", "style": "rule"}, "extra_info": {}}  # fmt: skip

    for name, numbers in {"train": range(4), "eval": range(4, 8)}.items():
        (tmp_path / f"{name}.jsonl").write_text("\n".join(json.dumps(row(i)) for i in numbers))
    done = appo("train", "tiny", "data.task=records", f"data.train={tmp_path}/train.jsonl", f"output={tmp_path}/run",
                f"data.eval={tmp_path}/eval.jsonl", "--plain")  # fmt: skip
    check(done, "tokens", "context", "rollout.max_new_tokens")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_an_existing_run_is_not_overwritten(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text("steps: 1\n")
    check(appo("train", "tiny", f"output={run}"), f"resume={run}")
    assert (run / "config.yaml").read_text() == "steps: 1\n"


def test_dry_run_writes_the_resolved_config_and_prints_the_card(tmp_path):
    done = appo("train", "tiny", f"output={tmp_path}/run", "--dry-run", "--plain")
    assert done.returncode == 0, done.stderr
    text = " ".join(done.stdout.split())
    for word in (
        "4 roots × (1 + 3 branches) = 16 rollouts",
        "16 prompts × 16 = 256 rollouts",
        "sandbox level",
        "threads",
        "memory",
    ):
        assert word in text, text
    assert "lr: 0.0007" in (tmp_path / "run" / "config.resolved.yaml").read_text()
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
