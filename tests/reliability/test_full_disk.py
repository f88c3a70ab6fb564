"""A disk that is full, at any file operation of a save, costs that save and nothing else."""

from __future__ import annotations

import builtins
import errno
import itertools
import os
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from support.tiny_models import build

from appo.config import LearnerConfig, RunContext
from appo.errors import CheckpointError
from appo.learner import Learner
from appo.learner.checkpoint import load_latest, save_checkpoint

# What needs room on the disk: new names, new content, and the promise that it is there.
NEEDS_ROOM = ((os, "fsync"), (os, "rename"), (os, "replace"), (os, "mkdir"), (builtins, "open"))


@contextmanager
def full_at(place: int) -> Iterator[list[int]]:
    """ENOSPC at the `place`-th call of NEEDS_ROOM; yields a list that holds the number of calls."""
    calls = [0]

    def failing(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if real is not builtins_open or "w" in str(kwargs.get("mode", args[1:])):
                calls[0] += 1
                if calls[0] == place:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return real(*args, **kwargs)

        return call

    builtins_open = builtins.open
    with pytest.MonkeyPatch.context() as patch:
        for module, name in NEEDS_ROOM:
            patch.setattr(module, name, failing(getattr(module, name)))
        yield calls


def write(folder: Path) -> None:
    for i in range(2):
        with open(folder / f"{i}.bin", "wb") as file:
            file.write(bytes([i]) * 1000)


@pytest.mark.parametrize("more", [1, 0])
def test_at_every_place_of_a_save(tmp_path: Path, more: int) -> None:
    """more: 0 saves the step that is there already once more."""
    save_checkpoint(tmp_path, 1, write, {"step": 1, "attempt": 0}, keep_last=1)
    for place in itertools.count(1):
        before = load_latest(tmp_path)[1]
        new = {"step": before["step"] + more, "attempt": place}
        with full_at(place) as calls:
            try:
                save_checkpoint(tmp_path, new["step"], write, new, keep_last=1)
            except CheckpointError as error:
                assert "the disk is full" in str(error) and "older ones are intact" in str(error)
        assert load_latest(tmp_path)[1] in (before, new)
        assert not list((tmp_path / "checkpoints").glob("step_*.tmp-*"))
        if calls[0] < place:
            break
    assert place > 12  # it was full everywhere before it was full nowhere
    assert load_latest(tmp_path)[1] == new


@pytest.fixture(scope="module")
def learner(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Learner]:
    model = tmp_path_factory.mktemp("model")
    build("qwen3", model)
    float32 = RunContext(dtype="float32")
    with Learner(model, LearnerConfig(), seed=0, context=float32) as learner:
        yield learner


def test_the_kernel_says_so_while_the_learner_writes(tmp_path: Path, learner: Learner) -> None:
    """/dev/full stands for the file that does not fit: every write to it fails as on a full disk."""
    save_checkpoint(tmp_path, 1, learner.save, {"step": 1})

    def write(folder: Path) -> None:
        (folder / "zero").mkdir()
        (folder / "zero" / "rank_0.pt").symlink_to("/dev/full")
        learner.save(folder)

    with pytest.raises(CheckpointError, match="checkpoint of step 2 .* failed: .*older ones are"):
        save_checkpoint(tmp_path, 2, write, {"step": 2})
    folder, state = load_latest(tmp_path)
    learner.load(folder)
    assert state == {"step": 1} and Path("/dev/full").exists()
    assert sorted(p.name for p in folder.parent.iterdir()) == ["latest", "step_1"]


def test_a_limit_on_the_size_of_files(tmp_path: Path, learner: Learner) -> None:
    save_checkpoint(tmp_path, 1, learner.save, {"step": 1})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(CheckpointError, match="older ones are intact"):
            save_checkpoint(tmp_path, 2, learner.save, {"step": 2})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert load_latest(tmp_path)[1] == {"step": 1}
    save_checkpoint(tmp_path, 2, learner.save, {"step": 2})
    assert load_latest(tmp_path)[1] == {"step": 2}


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("a file where the folder should be")
    with pytest.raises(CheckpointError, match="checkpoint of step 1 .* failed: .*File exists"):
        save_checkpoint(tmp_path, 1, write, {})
    with pytest.raises(CheckpointError, match="checkpoint of step 1 .* failed"):
        save_checkpoint("/proc/nowhere", 1, write, {})
