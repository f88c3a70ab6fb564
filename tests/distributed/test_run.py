"""`appo train` over two ranks: the same run as over one, resumable, and it ends as one program when anything goes wrong."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from support.rank_runs import ROOT, join, run, start

from appo.learner.checkpoint import verify
from appo.observability.metrics import read_metrics, strip_times

HERE = Path(__file__)
STEPS = 4
TINY = ("-m", "appo", "train", "tiny", "--plain", "threads=1")
SHORT = ("deterministic=true", "prompts_per_step=4", "algo.rollouts=4", "algo.roots=2", "algo.branches=1", f"steps={STEPS}",
         "eval.questions=17", "save_every=1", "keep_last=9", "save_trees=all")  # fmt: skip
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2")
FREE_PORT = "--standalone"


def launched(*command, **kwargs):
    """A real launcher, of this checkout, in a group of its own that a test can end as a whole."""
    env = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    }
    return subprocess.Popen(
        list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env,
        start_new_session=True, **kwargs,
    )  # fmt: skip


def said_by(process, timeout):
    """(stdout, stderr) of a process that must end within `timeout` seconds; nothing of its group is left behind."""
    try:
        return process.communicate(timeout=timeout)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The same short run on one rank and on two, the latter by torchrun."""
    folder = tmp_path_factory.mktemp("runs")
    run(1, *TINY, *SHORT, f"output={folder}/one", timeout=200)
    two = launched(*TORCHRUN, FREE_PORT, *TINY, *SHORT, f"output={folder}/two")
    out, err = said_by(two, 250)
    assert two.returncode == 0, out[-3000:] + err[-3000:]
    return folder, out, err


def trees(folder):
    return [_without_seconds(json.loads(x)) for x in open(folder / "trees.jsonl")]


def _without_seconds(value):
    if isinstance(value, dict):
        return {k: _without_seconds(v) for k, v in value.items() if k != "wall_s"}
    return [_without_seconds(v) for v in value] if isinstance(value, list) else value


def drawn(tree):
    """What was sampled and what it earned, without log-probs."""
    return (
        tree["task"]["task_id"], [n["token_ids"] for n in tree["nodes"]], [x["reward"] for x in tree["leaves"]],
    )  # fmt: skip


@pytest.mark.timeout(600)
def test_two_ranks_run_what_one_rank_runs(runs):
    folder, _, _ = runs
    one, two = trees(folder / "one"), trees(folder / "two")
    assert [t["step"] for t in one] == [s for s in range(1, STEPS + 1) for _ in range(4)]
    # Drawn before the first update, hence from the same bits: everything is equal, in the same order.
    assert one[:2] == two[:2]
    # Gradients are summed in another order from here on, so weights and log-probs agree to float32 rounding. A draw is
    # the largest of logit + noise; that it differs takes two tokens within rounding of each other.
    assert [drawn(t) for t in one] == [drawn(t) for t in two]
    branches = [[json.loads(x) for x in (folder / r / "branches.jsonl").read_text().splitlines()] for r in ("one", "two")]  # fmt: skip
    places = [[(b["step"], b["minibatch"], b["prompt_id"], [p["position"] for p in b["rows"]]) for b in x]
              for x in branches]  # fmt: skip
    assert places[0] == places[1] and len(places[0]) == 4 * STEPS

    # Depend on how the work is dealt: how evenly, checksums of rounded weights, and every rank's own probe.
    dealt = (
        "pack/imbalance",
        "pack/streams",
        "learner/micro_batches",
        "push/crc32",
        "push/probe_max",
        "push/probe_mean",
        "engine/scored_tokens",
    )
    records = [[strip_times(r) for r in read_metrics(folder / x)] for x in ("one", "two")]
    assert len(records[0]) == len(records[1]) == STEPS + 2
    for a, b in zip(*records):
        assert list(a) == list(b)
        for key in set(a) - set(dealt):
            # Counts, rewards and all that is read off trees are equal. What the learner adds up in float32 differs by
            # 1e-6 of its size in one step; ratios near 1 and KLs near 0 lose a digit or two more, and steps add up.
            rounded = key.split("/")[0] in ("policy", "learner", "push", "rollout", "pack")
            close = pytest.approx(a[key], rel=1e-4, abs=1e-6) if rounded else a[key]
            assert b[key] == close, (a["step"], key, a[key], b[key])


def test_only_rank_0_speaks_and_the_card_shows_how_work_is_dealt(runs):
    folder, out, err = runs
    for line in ("ranks      2, 2 on this machine; 1 of the 2 prompts", "threads    1 per rank"):
        assert out.count(line) == 1, out
    assert [x.split()[1] for x in out.splitlines() if x.startswith("step ")] == [f"{i}/{STEPS}" for i in range(1, STEPS + 1)]  # fmt: skip
    assert out.count("report: ") == 1 and "rank 1" not in out + err
    assert (folder / "two" / "checkpoints" / f"step_{STEPS}" / "zero" / "rank_1.pt").is_file()


@pytest.mark.timeout(300)
def test_resuming_on_two_ranks_is_bit_exact(runs, tmp_path):
    import torch

    whole, cut = runs[0] / "two", tmp_path / "cut"
    shutil.copytree(whole, cut)
    for step in (3, 4):
        shutil.rmtree(cut / "checkpoints" / f"step_{step}")
    run(2, *TINY, *SHORT, f"resume={cut}", timeout=250)
    assert [strip_times(r) for r in read_metrics(cut)] == [strip_times(r) for r in read_metrics(whole)]  # fmt: skip
    assert trees(cut) == trees(whole)
    assert (cut / "branches.jsonl").read_text() == (whole / "branches.jsonl").read_text()
    for r in (0, 1):
        name = Path("checkpoints", f"step_{STEPS}", "zero", f"rank_{r}.pt")
        mine, theirs = (list(_tensors(torch.load(x / name))) for x in (cut, whole))
        assert len(mine) > 3 and all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


def _tensors(value):
    import torch

    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict | list | tuple):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _tensors(inner)


# -- mistakes and deaths -------------------------------------------------------------------------


@pytest.mark.timeout(120)
def test_a_mistake_is_told_once_and_the_deepspeed_launcher_returns_its_exit_code():
    launcher = Path(sys.executable).with_name("deepspeed")
    process = launched(sys.executable, launcher, "--num_gpus", "2", "--master_port", _port(), "--module", *TINY[1:],
                       "learnr.lr=1")  # fmt: skip
    out, err = said_by(process, 100)
    assert process.returncode == 2, out + err
    assert (out + err).count("unknown key 'learnr'") == 1, out + err
    assert "Traceback" not in out + err


def _port():
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return str(s.getsockname()[1])


@pytest.mark.timeout(120)
def test_a_mistake_that_only_another_rank_sees_is_told_once_and_ends_all(tmp_path):
    places = [tmp_path / "here", tmp_path / "there"]
    for place in places:
        place.mkdir()
    ends = join(start(2, [*TINY, "output=run"], folders=places), 100)
    assert [e.code for e in ends] == [2, 2], ends
    told = "".join(e.out + e.err for e in ends)
    assert told.count("does not see it") == 1 and "rank 1: output=run" in ends[0].err, told
    assert not (places[0] / "run" / "config.yaml").exists()


@pytest.mark.timeout(300)
def test_a_rank_that_is_killed_ends_the_run_within_seconds_and_leaves_whole_checkpoints(tmp_path):
    launcher = launched(*TORCHRUN, FREE_PORT, *TINY, *SHORT, "steps=100000", "eval.questions=0", "keep_last=2",
                        "save_trees=0", f"output={tmp_path}/run")  # fmt: skip
    try:
        deadline = time.monotonic() + 150
        while len(read_metrics(tmp_path / "run")) < 3:
            assert launcher.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)
        ranks = {p.environ()["RANK"]: p for p in psutil.Process(launcher.pid).children() if "RANK" in p.environ()}  # fmt: skip
        ranks["1"].kill()
        begin = time.monotonic()
    finally:
        _out, err = said_by(launcher, 60)
    assert launcher.returncode != 0 and time.monotonic() - begin < 30
    assert f"rank 1 ({_host()}, pid {ranks['1'].pid}) has gone without a word" in err, err
    assert "goes on from step" in err and "Traceback" not in err.split("torch/distributed")[0]
    whole = sorted((tmp_path / "run" / "checkpoints").glob("step_*[0-9]"))
    assert whole and all(
        verify(path, int(path.name.removeprefix("step_"))) is None for path in whole
    )
    assert not [p for p in ranks.values() if p.is_running() and p.status() != "zombie"]


def _host():
    import socket

    return socket.gethostname()


@pytest.mark.timeout(200)
@pytest.mark.parametrize("end", ["same", "one"])
def test_the_cause_is_told_by_the_rank_that_has_it(end):
    ends = join(start(2, [HERE, end]), 100)
    assert [e.code for e in ends] == [1, 1], ends
    if end == "same":
        assert ends[0].err.count("the same on all ranks") == 1 and ends[1].err == "", ends
    else:
        assert "rank 1: error: LearnerError: only here" in ends[1].err
        assert "error: RankError: rank 1 has ended: LearnerError: only here" in ends[0].err, ends


def fate(end: str) -> None:
    """Both ranks meet the same error, or one meets it while the other waits in a collective of the learner's."""
    import torch
    import torch.distributed as dist

    from appo.dist.failures import fail_together
    from appo.dist.ranks import Ranks
    from appo.errors import AppoError, LearnerError
    from appo.observability.progress import Console

    ranks = Ranks.join()
    try:
        with fail_together(ranks, Console(plain=True, rank=ranks.rank)):
            if end == "same":
                raise LearnerError("the same on all ranks")
            if ranks.rank == 1:
                raise LearnerError("only here")
            dist.all_reduce(torch.zeros(1))
    except AppoError as error:
        assert error.reported
        sys.exit(error.exit_code)


if __name__ == "__main__":
    fate(sys.argv[1])
