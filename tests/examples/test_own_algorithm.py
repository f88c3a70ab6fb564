"""The example of an own algorithm runs from its one command, and does what it says."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from appo import read_trees
from appo.algo.credit import assign
from appo.algo.resolve import resolve
from appo.config import AlgoConfig
from appo.types import Leaf, Node, RolloutTree, Task

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "own_algorithm.py"


def appo(*arguments, cwd):
    env = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "appo", *arguments, "--plain"]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=280)


def test_the_command_of_the_example_trains(tmp_path):
    (command,) = re.findall(r"^    appo (.*)$", EXAMPLE.read_text(), re.MULTILINE)
    small = ["prompts_per_step=4", "eval.questions=4", f"output={tmp_path}/run", "save_trees=all"]
    done = appo("train", *command.split()[1:], *small, cwd=EXAMPLE.parent)
    assert done.returncode == 0, done.stderr + done.stdout
    trees = list(read_trees(tmp_path / "run" / "trees.jsonl"))
    assert len(trees) == 4 and all(len(t.leaves) == 16 and not t.branches for t in trees)
    said = " ".join((done.stdout + done.stderr).split())
    assert "dr-grpo: 16 independent rollouts per prompt" in said and "step 1/1" in said
    assert len(EXAMPLE.read_text().splitlines()) <= 40


def test_its_rule_subtracts_the_mean_and_divides_by_nothing(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLE.parent)
    algo = resolve(AlgoConfig("own_algorithm:DR_GRPO"))
    tree = RolloutTree(Task("t", [], "1"), [Node(None, "prompt", 0, [1])])
    for leaf, reward in enumerate((1.0, 0.0, 0.0, 0.5)):
        tree.nodes.append(Node(0, "model", 1, [2, 3], [-0.5] * 2, [1.0] * 2, 0, (leaf,)))
        tree.leaves.append(Leaf(leaf + 1, leaf, reward=reward))
    credits = assign([tree], algo).credits[0]
    assert [c.advantage.tolist() for c in credits] == [
        [0.625] * 2,
        *[[-0.375] * 2] * 2,
        [0.125] * 2,
    ]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("no_such_module:X", ["algo.name", "no_such_module", "Algorithm"]),
        (
            "own_algorithm:DR_GRP",
            ["own_algorithm", "DR_GRP", "did you mean 'DR_GRPO'", "Algorithm"],
        ),
        ("own_algorithm:mean_only", ["mean_only", "signature", "without arguments"]),
    ],
)
def test_a_wrong_import_string_is_one_paragraph(name, words, tmp_path):
    done = appo("train", "tiny", f"algo={name}", "--dry-run", f"output={tmp_path}/run", cwd=EXAMPLE.parent)  # fmt: skip
    assert done.returncode == 2 and "Traceback" not in done.stderr
    said = " ".join((done.stdout + done.stderr).split())
    assert not [word for word in words if word not in said], said
