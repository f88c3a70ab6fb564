"""Each example runs by the command in its docstring, as a user would run it, and stays short."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "examples"
FILES = sorted(FOLDER.glob("own_*.py"))
COMMAND = re.compile(r"^    (?!cd examples$)(\S.*)$", re.MULTILINE)


def commands(file):
    """The indented lines of the docstring behind `cd examples`."""
    said = ast.get_docstring(ast.parse(file.read_text()), clean=False) or ""
    assert "\n    cd examples\n" in said, f"{file.name} says no command"
    return COMMAND.findall(said)


def test_every_example_is_listed_and_short():
    listed = set(re.findall(r"\]\((own_\w+\.py)\)", (FOLDER / "README.md").read_text()))
    assert listed == {f.name for f in FILES} and len(FILES) >= 4
    for file in FILES:
        assert len(file.read_text().splitlines()) < 40, file.name


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.stem)
def test_its_command_runs(file, tmp_path):
    """As the console script `appo` does: without the current folder on the path."""
    here = Path(shutil.copytree(FOLDER, tmp_path / "examples"))
    words = {"appo": f"{sys.executable} -P -m appo", "python": sys.executable}
    lines = [f"{words[c.split()[0]]} {c.partition(' ')[2]}" for c in commands(file)]
    done = subprocess.run(
        ["bash", "-ec", "\n".join(lines)], cwd=here, capture_output=True, text=True, timeout=300,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{file.stem}:" in done.stdout  # listed on the card
    (metrics,) = here.glob("runs/*/metrics.jsonl")
    (step,) = [r for r in map(json.loads, metrics.read_text().splitlines()) if r["kind"] == "step"]
    assert step["grade/errors"] == 0
    if file.stem == "own_tool":
        assert step["tool/calls"] > 0 and step["tool/errors"] < 0.5
