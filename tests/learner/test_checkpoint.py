"""Checkpoints are all or nothing, and a resumed learner is the same learner bit by bit."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from appo.config import LearnerConfig, LoraConfig, RunContext
from appo.errors import CheckpointError
from appo.learner import checkpoint
from appo.learner.checkpoint import load_latest, read_manifest, save_checkpoint
from appo.learner.learner import Learner
from appo.packing.pack import PackedBatch, pack_sequences
from appo.types import Counts

FLOAT32 = RunContext(dtype="float32")

torch.set_num_threads(1)


def writer(text: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / "zero").mkdir()
        (folder / "zero" / "weights.bin").write_bytes(text.encode() * 1000)
        (folder / "learner.json").write_text(text)

    return write


def names(run: Path) -> list[str]:
    return sorted(p.name for p in (run / "checkpoints").iterdir())


# -- all or nothing


def test_saved_and_found_again(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, 3, writer("a"), {"cursor": 17, "ids": ["x"]})
    found, state = load_latest(tmp_path)
    assert found == path == tmp_path / "checkpoints" / "step_3"
    assert state == {"cursor": 17, "ids": ["x"]}
    manifest = read_manifest(path)
    assert (manifest["step"], manifest["world_size"]) == (3, 1)
    assert manifest["versions"]["torch"] == torch.__version__
    assert set(manifest["files"]) == {"zero/weights.bin", "learner.json", "state.json"}
    assert (tmp_path / "checkpoints" / "latest").read_text() == "step_3"


def test_only_the_newest_stay(tmp_path: Path) -> None:
    for step in (1, 2, 9, 10):
        save_checkpoint(tmp_path, step, writer(str(step)), {}, keep_last=2)
    assert names(tmp_path) == ["latest", "step_10", "step_9"]


def test_the_same_step_again_replaces_it(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 4, writer("old"), {"n": 1})
    save_checkpoint(tmp_path, 4, writer("new"), {"n": 2})
    path, state = load_latest(tmp_path)
    assert state == {"n": 2}
    assert (path / "learner.json").read_text() == "new"
    assert names(tmp_path) == ["latest", "step_4"]


def truncate(path: Path) -> None:
    (path / "zero" / "weights.bin").write_bytes(b"x")


def flip(path: Path) -> None:
    data = bytearray((path / "zero" / "weights.bin").read_bytes())
    data[7] ^= 1
    (path / "zero" / "weights.bin").write_bytes(bytes(data))


def edit(change: Callable[[dict], object]) -> Callable[[Path], None]:
    """Rewrite the manifest as someone would who does not know its checksum."""

    def damage(path: Path) -> None:
        manifest = json.loads((path / "manifest.json").read_text())
        change(manifest)
        (path / "manifest.json").write_text(json.dumps(manifest, indent=1))

    return damage


def swap_and_hash(path: Path) -> None:
    """Another file, and its right hash in the manifest."""
    (path / "learner.json").write_text("mine")
    digest = hashlib.sha256(b"mine").hexdigest()
    edit(lambda m: m["files"].update({"learner.json": {"bytes": 4, "sha256": digest}}))(path)


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (truncate, "weights.bin does not match"),
        (flip, "weights.bin does not match"),
        (swap_and_hash, "was changed after it was written"),
        (edit(lambda m: m.update(world_size=8)), "was changed after it was written"),
        (edit(lambda m: m["files"].pop("learner.json")), "was changed after it was written"),
        (edit(lambda m: m.update(format=1)), "is of format 1, this version reads 2"),
        (edit(lambda m: m.pop("sha256")), "KeyError"),
        (lambda p: (p / "manifest.json").unlink(), "No such file"),
        (lambda p: (p / "manifest.json").write_text('{"files":'), "JSONDecodeError"),
        (lambda p: (p / "manifest.json").write_text("[]"), "TypeError"),
        (lambda p: (p / "learner.json").unlink(), "learner.json is missing"),
        (lambda p: (p / "zero" / "rank_1.pt").write_text("x"), "rank_1.pt is not in the manifest"),
    ],
)
def test_a_damaged_newest_is_skipped_with_a_message(
    tmp_path: Path, damage: Callable[[Path], None], why: str, caplog: pytest.LogCaptureFixture
) -> None:
    save_checkpoint(tmp_path, 1, writer("one"), {"step": 1})
    newest = save_checkpoint(tmp_path, 2, writer("two"), {"step": 2})
    damage(newest)
    with caplog.at_level(logging.WARNING):
        assert load_latest(tmp_path)[1] == {"step": 1}
    assert "step_2 is skipped" in caplog.text and why in caplog.text
    save_checkpoint(tmp_path, 2, writer("again"), {"step": 2})
    assert load_latest(tmp_path)[1] == {"step": 2}


def test_a_renamed_folder_is_not_the_step_it_claims(tmp_path: Path) -> None:
    old = save_checkpoint(tmp_path, 1, writer("one"), {"step": 1})
    old.rename(old.with_name("step_9"))
    with pytest.raises(CheckpointError, match="step_9: it is of step 1; the folder was renamed"):
        load_latest(tmp_path)


def test_nothing_usable_says_why(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no usable checkpoint in"):
        load_latest(tmp_path)
    flip(save_checkpoint(tmp_path, 1, writer("one"), {}))
    with pytest.raises(CheckpointError, match=r"step_1: zero/weights.bin does not match"):
        load_latest(tmp_path)


def test_leftovers_never_block_and_are_swept(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 1, writer("one"), {"step": 1})
    root = tmp_path / "checkpoints"
    for name in ("step_2.tmp-dead", "step_1.gone-beef"):
        (root / name).mkdir()
        (root / name / "half").write_text("x")
    (root / "latest.tmp-77").write_text("step_9")
    assert load_latest(tmp_path)[1] == {"step": 1}
    save_checkpoint(tmp_path, 2, writer("two"), {"step": 2})
    assert names(tmp_path) == ["latest", "step_1", "step_2"]


def test_a_kill_between_the_two_renames_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_checkpoint(tmp_path, 5, writer("old"), {"n": 1}, keep_last=1)
    real = os.rename

    def killed(a: Path, b: Path) -> None:
        if ".tmp-" in str(a):
            raise KeyboardInterrupt
        real(a, b)

    monkeypatch.setattr(checkpoint.os, "rename", killed)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(tmp_path, 5, writer("new"), {"n": 2}, keep_last=1)
    monkeypatch.undo()
    assert load_latest(tmp_path)[1] == {"n": 1}
    save_checkpoint(tmp_path, 6, writer("next"), {"n": 3}, keep_last=1)
    assert load_latest(tmp_path)[1] == {"n": 3}


@pytest.mark.parametrize("where", ["write", "fsync", "rename"])
def test_a_full_disk_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    save_checkpoint(tmp_path, 1, writer("one"), {"step": 1}, keep_last=1)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def write(folder: Path) -> None:
        (folder / "half").write_bytes(b"0" * 100)
        if where == "write":
            full()

    if where != "write":
        monkeypatch.setattr(checkpoint.os, where, full)
    with pytest.raises(CheckpointError, match="disk is full.*older ones are intact"):
        save_checkpoint(tmp_path, 2, write, {"step": 2}, keep_last=1)
    monkeypatch.undo()
    assert load_latest(tmp_path)[1] == {"step": 1}
    assert names(tmp_path) == ["latest", "step_1"]
    save_checkpoint(tmp_path, 2, writer("two"), {"step": 2}, keep_last=1)
    assert load_latest(tmp_path)[1] == {"step": 2}


# -- the learner's own state


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    torch.manual_seed(1)
    config = Qwen3Config(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, vocab_size=97, max_position_embeddings=256,
    )  # fmt: skip
    Qwen3ForCausalLM(config).save_pretrained(path)
    return path


def loss_fn(stats, batch: PackedBatch, counts: Counts):
    return -(stats.logp * batch.advantage).sum() / counts.tokens, {}


def train(learner: Learner, steps: range) -> list[float]:
    out = []
    for step in steps:
        batch = pack_sequences([[step + 1, 2, 3, 4, 5], [9, 8, step + 7]])
        batch.advantage += 1.0
        noise = (
            torch.rand(1).item() + np.random.rand() + random.random()
        )  # all generators must come back
        batch.advantage *= noise
        out.append(learner.train_minibatch([batch], Counts(6.0, 2.0, 2.0), loss_fn)["learner/loss"])
    return out


@pytest.mark.parametrize(
    ("mode", "dtype", "stage"),
    [("lora", "bfloat16", 1), ("full", "float32", 1), ("lora", "float32", 2)],
)
def test_resume_is_bit_exact(
    model_dir: Path, tmp_path: Path, mode: str, dtype: str, stage: int
) -> None:
    settings = LearnerConfig(
        mode=mode, lr=1e-2, lora=LoraConfig(r=4), zero_stage=stage, weight_decay=0.1,
        schedule="cosine", warmup_steps=2,
    )  # fmt: skip
    context = RunContext(dtype=dtype, total_steps=8)
    with Learner(model_dir, settings, seed=3, context=context) as learner:
        train(learner, range(3))
        save_checkpoint(tmp_path, 3, learner.save, {})
        expected = train(learner, range(3, 6))
        weights = {n: p.detach().clone() for n, p in learner.lm.named_parameters()}
    path, _ = load_latest(tmp_path)
    with Learner(model_dir, settings, seed=99, context=context) as fresh:
        fresh.load(path)
        assert fresh.step == 3
        assert train(fresh, range(3, 6)) == expected
        for name, p in fresh.lm.named_parameters():
            assert torch.equal(p, weights[name]), name
        assert fresh.step == 6


def test_a_lora_checkpoint_holds_no_base_weights(model_dir: Path, tmp_path: Path) -> None:
    settings = LearnerConfig(mode="lora", lora=LoraConfig(r=2, layers=1))
    with Learner(model_dir, settings, seed=0, context=FLOAT32) as learner:
        learner.save(tmp_path)
        trainable = learner.parameter_counts()["trainable"]
    saved = sum(p.stat().st_size for p in (tmp_path / "zero").iterdir())
    assert saved < trainable * 4 * 5 + 60_000  # weights, masters, two moments, and pickle


def test_a_foreign_checkpoint_is_refused(model_dir: Path, tmp_path: Path) -> None:
    settings = LearnerConfig(mode="lora", lora=LoraConfig(r=2))
    with Learner(model_dir, settings, seed=0, context=FLOAT32) as learner:
        learner.save(tmp_path / "ck")
        with pytest.raises(CheckpointError, match="holds no learner state"):
            learner.load(tmp_path)
    other = LearnerConfig(mode="lora", lora=LoraConfig(r=3))
    with (
        Learner(model_dir, other, seed=0, context=FLOAT32) as learner,
        pytest.raises(CheckpointError, match="lora is"),
    ):
        learner.load(tmp_path / "ck")
    lm = Qwen3ForCausalLM.from_pretrained(model_dir)
    lm.model.layers[0].mlp.up_proj.weight.data += 0.01
    lm.save_pretrained(tmp_path / "tuned")
    with (
        Learner(tmp_path / "tuned", settings, seed=0, context=FLOAT32) as learner,
        pytest.raises(CheckpointError, match="base_model is"),
    ):
        learner.load(tmp_path / "ck")
