"""A step learned again from its saved trees gives the recorded numbers, and says so when something was changed."""

import json
import os
import shutil
import subprocess
import sys

import pytest

from appo.dist.ranks import Ranks
from appo.errors import CheckpointError, ConfigError, DataError
from appo.observability.metrics import read_metrics
from appo.run.replay import replay, rows

SHORT = (
    "threads=1", "deterministic=true", "prompts_per_step=4", "eval.questions=0", "save_every=1", "keep_last=9", "steps=2",
    "save_trees=all", "algo.roots=2", "algo.branches=1", "algo.rollouts=4",
)  # fmt: skip


def appo(*args, ranks=1, timeout=200):
    launcher = ["-m", "appo"]
    if ranks > 1:
        launcher = [
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc-per-node={ranks}",
            *launcher,
        ]
    return subprocess.run(
        [sys.executable, *launcher, *map(str, args), "--plain"], capture_output=True, text=True, timeout=timeout
    )  # fmt: skip


def trained(output, *more, ranks=1):
    done = appo("train", "tiny", *SHORT, *more, f"output={output}", ranks=ranks)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return output


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("replay") / "run")


@pytest.fixture
def copy(run, tmp_path):
    return shutil.copytree(run, tmp_path / "copy")


def edit(run, change, step=2):
    """Let `change(tree, number)` alter the saved trees of a step."""
    path = run / "trees.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for number, tree in enumerate(t for t in lines if t["step"] == step):
        change(tree, number)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines if line))


def listing(run):
    return {p: (p.stat().st_size, p.stat().st_mtime_ns) for p in sorted(run.rglob("*"))}


@pytest.mark.parametrize("step", [1, 2])
def test_a_step_again_is_the_same_step_bit_for_bit(run, step):
    before = listing(run)
    found = replay(run, step)
    assert found.exact, rows(found)
    assert listing(run) == before  # it writes nothing
    record = next(r for r in read_metrics(run) if r["kind"] == "step" and r["step"] == step)
    assert {"learner/loss", "learner/grad_norm", "policy/entropy", "reward/mean"} <= {
        *found.compared
    }
    assert len(found.minibatches) == 2
    for name in ("learner/loss", "learner/grad_norm"):
        assert (
            sum(m[name] for m in found.minibatches) / 2 == found.metrics[name] == record[name] != 0
        )
    assert "bit for bit" in dict(rows(found))["result"]


def other_reward(tree, number):
    if number == 3:
        tree["leaves"][0]["reward"] += 0.5


def other_group(tree, number):
    tree["minibatch"] = 1 - tree["minibatch"]


def other_token(tree, number):
    if number == 0:
        ids = next(n for n in tree["nodes"] if n["role"] == "model")["token_ids"]
        ids[0] += 1


@pytest.mark.parametrize("change", [other_reward, other_group, other_token])
def test_a_changed_tree_is_a_difference(copy, change):
    edit(copy, change)
    found = replay(copy, 2)
    assert not found.agrees
    assert "learner/grad_norm" in {d.name for d in found.differences if d.size > found.close}
    assert dict(rows(found))["result"].startswith("NOT the same")


def test_the_command_tells_by_its_exit_code(copy):
    edit(copy, other_reward)
    bad = appo("replay", copy, "--step", 2)
    assert bad.returncode == 1, bad.stdout + bad.stderr
    assert "differs" in bad.stdout and "reward/mean" in bad.stdout


def test_what_is_missing_is_said_with_what_would_have_kept_it(run, copy, tmp_path):
    with pytest.raises(ConfigError, match="no run there"):
        replay(tmp_path / "nothing", 1)
    for step in (0, 3):
        with pytest.raises(
            ConfigError, match=f"--step {step}: .* has no such step; it has steps 1 to 2"
        ):
            replay(run, step)
    shutil.rmtree(copy / "checkpoints" / "step_1")
    with pytest.raises(
        CheckpointError, match=r"those of steps 0, 2, so steps 1, 3 can .* larger keep_last"
    ):
        replay(copy, 2)
    weights = next((copy / "checkpoints" / "step_0").rglob("rank_0*.pt"))
    data = bytearray(weights.read_bytes())
    data[len(data) // 2] ^= 1
    weights.write_bytes(data)
    with pytest.raises(CheckpointError, match="step_0 cannot be trusted"):
        replay(copy, 1)


def test_trees_must_be_all_of_the_step_and_of_this_run(run, copy):
    def of_another_step(tree, number):
        if number == 0:
            tree["nodes"][-1]["token_ids"] += [5]
            tree["nodes"][-1]["logprobs"] += [-1.0]
            tree["nodes"][-1]["entropy"] += [1.0]

    edit(copy, of_another_step)
    with pytest.raises(
        DataError, match="not the trees that step 2 was trained on: tokens/unique is"
    ):
        replay(copy, 2)
    edit(copy, lambda tree, number: tree.clear() if number == 1 else None)
    with pytest.raises(DataError, match=r"3 of the 4 trees of step 2; .* save_trees=all"):
        replay(copy, 2)
    os.remove(copy / "trees.jsonl")
    with pytest.raises(DataError, match="no such file"):
        replay(copy, 2)


@pytest.mark.timeout(500)
def test_two_ranks_replay_on_two_and_on_one(tmp_path):
    """Roots of an older policy, too: bit for bit on two ranks, within 1e-6 on one."""
    two = trained(tmp_path / "two", "staleness=1", ranks=2)
    same = appo("replay", two, "--step", 2, ranks=2)
    assert same.returncode == 0 and "bit for bit" in same.stdout, same.stdout + same.stderr
    alone = replay(two, 2, ranks=Ranks())
    assert alone.ranks == (2, 1)
    assert alone.agrees and alone.close == 1e-6, rows(alone)
    assert alone.metrics["policy/staleness"] > 0
