"""A process that saves checkpoints and is killed while it does: what is left must be whole. Run by test_kills.py.

python saver.py FOLDER synthetic|learner [MODEL]

The parent loads everything once and forks a child per kill, so that many kills cost little. Prints one JSON object:
kills by delay and by place, and what was found afterwards.
"""

from __future__ import annotations

import builtins
import itertools
import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from appo.learner.checkpoint import load_latest, save_checkpoint

RANDOM_KILLS = 20
PLACES = (  # where a process may be between two states of the disk
    (os, "fsync"), (os, "rename"), (os, "replace"), (os, "mkdir"), (os, "unlink"), (os, "rmdir"), (builtins, "open"),
)  # fmt: skip


class Synthetic:
    """Files whose bytes are the step's number."""

    def write(self, step: int) -> Callable[[Path], None]:
        def write(folder: Path) -> None:
            for i in range(4):
                (folder / f"{i}.bin").write_bytes(bytes([step % 251]) * 200_000)

        return write

    def check(self, folder: Path, step: int) -> None:
        for i in range(4):
            assert set((folder / f"{i}.bin").read_bytes()) == {step % 251}, (folder, i)


class Real:
    """A learner whose masters are all equal to the step's number; what is found is loaded into it."""

    def __init__(self, model: str):
        from appo.config import LearnerConfig, RunContext
        from appo.learner import Learner

        self.learner = Learner(model, LearnerConfig(), seed=0, context=RunContext(dtype="float32"))

    def write(self, step: int) -> Callable[[Path], None]:
        import torch

        with torch.no_grad():
            for p in self.learner.lm.parameters():
                p.fill_(step)
            for group in self.learner.engine.optimizer.param_groups:
                for flat in group["params"]:
                    flat.fill_(step)
        self.learner.step = step
        return self.learner.save

    def check(self, folder: Path, step: int) -> None:
        self.learner.load(folder)
        assert self.learner.step == step
        for name, p in self.learner.lm.named_parameters():
            assert (p == step).all(), (name, step)


def forked(work: Callable[[], None]) -> int:
    """The pid of a child that does `work` and nothing else."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
        finally:
            os._exit(1)
    return pid


def save_for_ever(run: Path, saver: Any, first: int, tell: int) -> None:
    for step in range(first, 10**6):
        save_checkpoint(run, step, saver.write(step), {"step": step}, keep_last=2)
        os.write(tell, f"{step}\n".encode())


def die_at(place: int) -> None:
    """SIGKILL at the `place`-th call of any of PLACES, before it does anything. Raises nothing: there is no after."""
    calls = 0

    def counted(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == place:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)

        return call

    for module, name in PLACES:
        setattr(module, name, counted(getattr(module, name)))


def after(run: Path, saver: Any, least: int) -> int:
    """The step of what loads now. Asserts that it is whole and at least as new as what was reported as saved."""
    folder, state = load_latest(run)
    assert folder.name.partition(".")[0] == f"step_{state['step']}", folder
    assert state["step"] >= least, (state, least)
    saver.check(folder, state["step"])
    return int(state["step"])


def kill_after_delays(run: Path, saver: Any) -> list[int]:
    """Kill RANDOM_KILLS processes that save without end, each somewhere in its second or third save."""
    rng, done, found = random.Random(0), 0, []
    for _ in range(RANDOM_KILLS):
        read, tell = os.pipe()
        pid = forked(partial(save_for_ever, run, saver, done + 1, tell))
        os.close(tell)
        with os.fdopen(read) as said:
            begin = time.monotonic()
            first = int(said.readline())
            time.sleep(rng.random() * 2 * (time.monotonic() - begin))
            os.kill(pid, signal.SIGKILL)
            reported = max([first, *map(int, said.read().split())])
        os.waitpid(pid, 0)
        done = after(run, saver, reported)
        found.append(done)
    return found


def kill_at_every_place(run: Path, saver: Any, more: int) -> int:
    """Kill a save before its first file operation, another before its second … until one lives; the number of places.

    more: 1 saves a new step each time, 0 the newest one again, as a resumed run does, which is one rename more.
    """
    step = after(run, saver, 0)
    for place in itertools.count(1):
        _, status = os.waitpid(forked(partial(save_until, run, saver, step + more, place)), 0)
        step = after(run, saver, step)
        if not os.WIFSIGNALED(status):
            assert os.WEXITSTATUS(status) == 0
            return place
    raise AssertionError


def save_until(run: Path, saver: Any, step: int, place: int) -> None:
    write = saver.write(step)
    die_at(place)
    save_checkpoint(run, step, write, {"step": step}, keep_last=1)
    os._exit(0)


def main() -> None:
    run, kind = Path(sys.argv[1]), sys.argv[2]
    saver = Synthetic() if kind == "synthetic" else Real(sys.argv[3])
    found = kill_after_delays(run, saver)
    # The order of file operations is the same whatever is written, so the walk is taken with the cheap files.
    places = [kill_at_every_place(run, saver, more) for more in (1, 0) if kind == "synthetic"]
    last = after(run, saver, 0)
    # After all that the next save works and leaves nothing but itself.
    save_checkpoint(run, last + 1, saver.write(last + 1), {"step": last + 1}, keep_last=1)
    left = sorted(p.name for p in (run / "checkpoints").iterdir())
    shutil.rmtree(run)
    print(json.dumps({"found": found, "places": places, "left": left, "last": last + 1}))


if __name__ == "__main__":
    main()
