"""SIGKILL at 20 random moments of a process that saves, and before every single file operation of a save."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from support.tiny_models import build

SAVER = Path(__file__).with_name("saver.py")


@pytest.mark.parametrize("kind", ["synthetic", "learner"])
def test_a_killed_save_leaves_a_whole_checkpoint(tmp_path: Path, kind: str) -> None:
    args = []
    if kind == "learner":
        build("qwen3", tmp_path / "model")
        args = [tmp_path / "model"]
    done = subprocess.run(
        [sys.executable, SAVER, tmp_path / "run", kind, *args],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    said = json.loads(done.stdout.splitlines()[-1])
    assert len(said["found"]) == 20 and said["found"] == sorted(set(said["found"]))
    assert all(n > 15 for n in said["places"])  # the walk went through a whole save
    assert said["left"] == ["latest", f"step_{said['last']}"]
