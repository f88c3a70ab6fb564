"""What ranks tell each other: one launch of two processes answers all questions; a world of one answers without a group."""

import math
import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

HERE = Path(__file__)


def test_alone_every_method_is_a_plain_function_and_torch_stays_out():
    from support.rank_runs import run

    run(1, "-c", """if 1:
        import sys
        from appo.dist.ranks import Ranks
        r = Ranks.join()
        assert (r.rank, r.world, r.local_rank, r.local_world, r.main) == (0, 1, 0, 1, True)
        assert r.sum({"a": 1.5}) == {"a": 1.5} and r.reduce({"a": 2.0}, "max") == {"a": 2.0}
        assert r.gather("x") == ["x"] and r.broadcast("x") == "x" and r.all_gather(3) == [3]
        assert r.any(True) and not r.any(False) and r.all_to_all([["a", 1]]) == ["a", 1]
        r.barrier()
        r.report_exit("done")
        assert r.exit_reasons() == {} and r.waiting is None and "torch" not in sys.modules
    """)  # fmt: skip


@pytest.mark.timeout(150)
def test_two_ranks(tmp_path):
    from support.rank_runs import run

    run(2, HERE, "questions", tmp_path, timeout=120)


@pytest.mark.timeout(150)
@pytest.mark.parametrize("end", ["killed", "leaves"])
def test_the_death_of_a_rank_ends_the_wait_of_the_other_and_names_the_cause(end, tmp_path):
    from support.rank_runs import join, start

    both = start(2, [HERE, "death", tmp_path])
    deadline = time.monotonic() + 90
    while not (tmp_path / "1").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    begin = time.monotonic()
    if end == "killed":
        os.kill(both[1].pid, signal.SIGKILL)
    else:
        (tmp_path / "go").touch()
    first, _ = join(both, 60)
    assert first.code == 1 and time.monotonic() - begin < 15
    cause = "killed from outside" if end == "killed" else "rank 1 has ended: ToolError: no"
    assert "while in 'report': " in first.err and cause in first.err, first.err
    assert "RankError" in first.err


# -- what a rank does ----------------------------------------------------------------------------


def questions(folder: Path) -> None:
    from appo.dist.ranks import Ranks

    ranks = Ranks.join()
    me, two = ranks.rank, ranks.world
    assert Ranks.join() is ranks and two == 2 and ranks.local_world == 2
    assert ranks.main == (me == 0) and ranks.local_rank == me == int(os.environ["RANK"])

    # Numbers: keys of one rank only, float64 (2^53 + 2 is lost in float32), NaN in any place.
    mine = {"both": 0.5 + me, "big": [2.0**53, 2.0][me], f"only{me}": float(me + 1)}
    assert ranks.sum(mine) == {"both": 2.0, "big": 2.0**53 + 2, "only0": 1.0, "only1": 2.0}
    assert ranks.reduce({"x": -float(me)}, "max") == {"x": 0.0}
    assert ranks.reduce({"x": -float(me)}, "min") == {"x": -1.0}
    for how in ("sum", "max", "min"):
        for sick in (0, 1):
            found = ranks.reduce({"x": math.nan if me == sick else 1.0}, how)
            assert math.isnan(found["x"]), (how, sick)
    assert ranks.any(me == 1) and ranks.any(True) and not ranks.any(False)

    # Objects, in rank order; sizes differ, and one is larger than a message of gloo.
    thing = {"rank": me, "load": b"x" * (5_000_000 if me else 3)}
    gathered = ranks.gather(thing)
    assert (gathered is None) == (me == 1)
    assert me == 1 or [(g["rank"], len(g["load"])) for g in gathered] == [(0, 3), (1, 5_000_000)]
    assert ranks.broadcast(("from", me)) == ("from", 0)
    assert ranks.all_gather(me * 2) == [0, 2]
    out = [[], ["to 1", b"\0" * 100_000]] if me == 0 else [["to 0"], ["own"]]
    assert ranks.all_to_all(out) == (["to 0"] if me == 0 else ["to 1", b"\0" * 100_000, "own"])
    assert ranks.all_to_all([[], []]) == []

    late(ranks, me)
    astray(ranks)

    # A word that is left is read by the other without a meeting.
    if me == 1:
        ranks.report_exit("ToolError: no")
    ranks.barrier()
    assert ranks.exit_reasons() == {1: "ToolError: no"}


def late(ranks, me: int) -> None:
    """One rank waits for the other, and says for what."""
    if me == 0:
        seen: list = []
        spy = threading.Timer(0.5, lambda: seen.append(ranks.waiting))
        spy.start()
        ranks.barrier("the late one")
        spy.join()
        assert seen == ["the late one"], seen
    else:
        time.sleep(1.0)
        ranks.barrier("the late one")
    assert ranks.waiting is None


def astray(ranks) -> None:
    """Another thread would meet the others in another order; it is stopped before it can."""
    failed: list = []

    def meet() -> None:
        try:
            ranks.barrier()
        except AssertionError as error:
            failed.append(str(error))

    thread = threading.Thread(target=meet)
    thread.start()
    thread.join()
    assert failed and "main thread" in failed[0]


def death(folder: Path) -> None:
    from appo.dist.ranks import Ranks

    ranks = Ranks.join()
    (folder / str(ranks.rank)).touch()
    if ranks.main:
        ranks.gather("x", "report")
    while not (folder / "go").exists():
        time.sleep(0.05)
    ranks.report_exit("ToolError: no")


if __name__ == "__main__":
    {"questions": questions, "death": death}[sys.argv[1]](Path(sys.argv[2]))
