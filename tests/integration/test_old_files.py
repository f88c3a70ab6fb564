"""What commit 9f05734 wrote is read, and a run goes on from its checkpoint.

Only public ways are used. The files lie in tests/golden/written_by_9f05734/, whose `written.json`
tells how they were made. On the processor and torch that made them, the step after the checkpoint
is the recorded one, bit for bit.
"""

import dataclasses
import importlib.util
import json
import math
import os
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml

import appo
from appo.kernels import backend_info

ROOT = Path(__file__).resolve().parents[2]
OLD = ROOT / "tests" / "golden" / "written_by_9f05734"
RUN = OLD / "run"
WRITTEN = json.loads((OLD / "written.json").read_text())
spec = importlib.util.spec_from_file_location(
    "run_digest", ROOT / "bench" / "evidence" / "run_digest.py"
)
run_digest = importlib.util.module_from_spec(spec)
sys.modules["run_digest"] = run_digest
spec.loader.exec_module(run_digest)

# Key of a recipe then → key of today. Whoever renames a key adds a row.
RENAMED_KEYS = {}


def same_machine():
    """Whether bits are promised: the recorded processor and torch, and the native library."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return False
    values = dict(line.split(":", 1) for line in lines if ":" in line)
    values = {key.strip(): value.strip() for key, value in values.items()}
    now = {"model": values.get("model name"),
           "avx512_bf16": "avx512_bf16" in values.get("flags", "").split()}  # fmt: skip
    native = backend_info()["backend"] == "cpu"
    return now == WRITTEN["processor"] and version("torch") == WRITTEN["torch"] and native


def raw(run, part):
    return [json.loads(line) for line in (run / f"{part}.jsonl").read_text().splitlines()]


def today(name):
    return run_digest.RENAMED.get(name, name)


def either(obj, name):
    """A field of a record or object that may have been renamed since."""
    if isinstance(obj, dict):
        return obj[name] if name in obj else obj[today(name)]
    return getattr(obj, name) if hasattr(obj, name) else getattr(obj, today(name))


def command(*args):
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-m", "appo", *map(str, args), "--plain"],
        capture_output=True, text=True, timeout=250,
        env=os.environ | {"PYTHONPATH": path},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


def flattened(values, prefix=""):
    for key, value in values.items():
        if isinstance(value, dict) and value and f"{prefix}{key}" != "data.params":
            yield from flattened(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


@pytest.fixture
def copy(tmp_path):
    return shutil.copytree(RUN, tmp_path / "copy")


def test_trees():
    trees = list(appo.read_trees(RUN / "trees.jsonl"))
    saved = raw(RUN, "trees")
    assert len(trees) == len(saved) == 12
    for tree, data in zip(trees, saved):
        assert (tree.step, tree.task.task_id) == (data["step"], data["task"]["task_id"])
        assert len(tree.nodes) == len(data["nodes"]) > 1
        for node, then in zip(tree.nodes, data["nodes"]):
            for name in ("token_ids", "logprobs", "entropy", "anchor", "parent", "policy_version"):
                assert either(node, name) == then[name], name
        assert [leaf.reward for leaf in tree.leaves] == [x["reward"] for x in data["leaves"]]
        for leaf, then in zip(tree.leaves, data["leaves"]):
            calls = [(c["argument"], c["output"]) for c in then["tool_calls"]]
            assert [(c.argument, c.output) for c in leaf.tool_calls] == calls
    scored = [n for tree in trees for n in tree.nodes if either(n, "anchor") is not None]
    assert len(scored) == 19  # the field is there at all, under either name


def test_metrics():
    records, saved = appo.read_metrics(RUN), raw(RUN, "metrics")
    assert [r["kind"] for r in records] == ["eval", "step", "step", "step", "eval"]
    for record, then in zip(records, saved):
        for name, value in then.items():
            assert either(record, name) == value, name
    assert {"policy/kl_anchor", "policy/log_ratio_behaviour", "branch/omega_flat"} <= set(saved[1])


@pytest.mark.parametrize("name", ["every_key.yaml", "run/config.yaml"])
def test_recipes(name):
    """Every key arrives with its value."""
    cfg = dict(flattened(dataclasses.asdict(appo.load_config(str(OLD / name)))))
    then = dict(flattened(yaml.safe_load((OLD / name).read_text())))
    assert len(then) > 70
    for key, value in then.items():
        assert cfg[RENAMED_KEYS.get(key, key)] == value, key


def test_a_key_of_then_on_the_command_line():
    for key, value in flattened(yaml.safe_load((OLD / "every_key.yaml").read_text())):
        cfg = appo.load_config(str(OLD / "every_key.yaml"), [f"{key}={json.dumps(value)}"])
        found = dict(flattened(dataclasses.asdict(cfg)))[RENAMED_KEYS.get(key, key)]
        assert found == value, key


@pytest.mark.timeout(300)
def test_a_run_goes_on_from_the_checkpoint(copy):
    """The checkpoint holds weights, moments, data cursor and the roots drawn ahead."""
    latest = copy / "checkpoints" / "step_2"
    roots = (latest / "roots_rank0.jsonl").read_text().splitlines()
    assert json.loads(roots[0]) == {"steps": [3]} and len(roots) == 5
    said = command("train", "tiny", f"resume={copy}", "steps=3")
    assert "after step 2" in said
    records = appo.read_metrics(copy)
    assert [r["step"] for r in records] == [0, 1, 2, 3, 3]
    assert len(list(appo.read_trees(copy / "trees.jsonl"))) == 12
    assert (copy / "checkpoints" / "step_3").is_dir()
    assert all(math.isfinite(v) for v in records[3].values() if isinstance(v, float))
    if same_machine():
        check_bits(copy)


def check_bits(run):
    """The step after the checkpoint is the recorded one, but for peaks since a process began."""
    for part in run_digest.PARTS:
        then = list(run_digest.read_part(RUN, part))
        now = list(run_digest.read_part(run, part))
        for records in (then, now) if part == "metrics" else ():
            for record in records:
                for name in [n for n in record if n.startswith("memory/")]:
                    del record[name]
        assert now == then, part


@pytest.mark.timeout(300)
def test_a_run_goes_on_for_longer_than_it_was_planned(copy):
    command("train", "tiny", f"resume={copy}", "steps=4")
    assert [r["step"] for r in appo.read_metrics(copy)] == [0, 1, 2, 3, 4, 4]


@pytest.mark.timeout(300)
def test_a_recorded_step_is_learned_again(copy):
    """The trees of step 3, from the weights of step 2."""
    said = command("replay", copy, "--step", 3)
    assert "bit for bit" in said or not same_machine(), said
