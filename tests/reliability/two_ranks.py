"""One of two ranks has something that is not finite, or a full disk: both must do the same. Run by test_two_ranks.py.

python two_ranks.py FOLDER MODEL        (as rank RANK of 2)
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from appo.config import LearnerConfig, RunContext
from appo.dist.ranks import Ranks
from appo.errors import CheckpointError, LearnerError
from appo.learner import Learner
from appo.learner.checkpoint import load_latest, save_checkpoint
from appo.packing.pack import PackedBatch, pack_sequences
from appo.types import Counts

FOLDER, MODEL = Path(sys.argv[1]), sys.argv[2]
COUNTS = Counts(6.0, 2.0, 2.0)


def loss_fn(stats: Any, batch: PackedBatch, counts: Counts) -> tuple[torch.Tensor, dict]:
    logp = torch.where(batch.mask, stats.logp, 0.0)
    return -(logp * batch.advantage).sum() / counts.tokens, {}


def batch_of(rank: int) -> PackedBatch:
    batch = pack_sequences([[5 + rank, 2, 3, 4, 5], [9, 8, 7 + rank]])
    batch.advantage += 1.0
    return batch


def first_edge(name: str, value: float) -> Callable[[PackedBatch], PackedBatch]:
    def spoil(batch: PackedBatch) -> PackedBatch:
        values = getattr(batch, name).clone()
        values[0] = value
        return replace(batch, **{name: values})

    return spoil


def nan_logit(stats: Any, batch: PackedBatch, counts: Counts) -> tuple[torch.Tensor, dict]:
    """As if the forward had overflowed at one token."""
    spoiled = torch.zeros_like(stats.logp)
    spoiled[1] = float("nan")
    return loss_fn(stats._replace(logp=stats.logp + spoiled), batch, counts)


def nan_gradient(stats: Any, batch: PackedBatch, counts: Counts) -> tuple[torch.Tensor, dict]:
    """A finite loss, and the root of zero in its gradient."""
    loss, metrics = loss_fn(stats, batch, counts)
    return loss + (stats.logp.sum() * 0).abs().sqrt(), metrics


CASES: dict[str, tuple[Callable[[PackedBatch], PackedBatch], Any, str]] = {
    "advantage": (first_edge("advantage", float("nan")), loss_fn, "rank 1, micro-batch 0: advantage"),
    "log-ratio": (first_edge("behavior_logp", -float("inf")), loss_fn, "rank 1, micro-batch 0: behavior"),
    "old_logp": (first_edge("old_logp", float("inf")), loss_fn, "rank 1, micro-batch 0: old log-prob"),
    "logit": (lambda b: b, nan_logit, "rank 1, micro-batch 0: loss"),
    "gradient": (lambda b: b, nan_gradient, "gradient norm"),
}  # fmt: skip


def whole(learner: Learner) -> list[torch.Tensor]:
    return [t.detach().clone() for _, t in learner.named_weights()]


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def nonfinite(ranks: Ranks, stage: int) -> None:
    """Each fault on rank 1 only: no rank's weights move, three in a row stop both, and then all is well again."""
    settings = LearnerConfig(lr=1e-2, zero_stage=stage)  # type: ignore[arg-type]
    context = RunContext(dtype="float32", dump_dir=str(FOLDER / f"{stage}"))
    with Learner(MODEL, settings, seed=0, ranks=ranks, context=context) as learner:
        good = batch_of(ranks.rank)
        learner.train_minibatch([good], COUNTS, loss_fn)
        for name, (spoil, bad_loss, reason) in CASES.items():
            before, sick = whole(learner), ranks.rank == 1
            mine = ([spoil(good)], COUNTS, bad_loss) if sick else ([good], COUNTS, loss_fn)
            for _ in range(2):
                assert learner.train_minibatch(*mine)["learner/nonfinite"] == 1.0, name
            try:
                learner.train_minibatch(*mine)
            except LearnerError as error:
                assert "3 mini-batches in a row" in str(error) and reason in str(error), error
            else:
                raise AssertionError(f"{name}: rank {ranks.rank} went on")
            assert same(before, whole(learner)), name
            dump = FOLDER / f"{stage}" / f"nonfinite_step{learner.step}_rank{ranks.rank}.pt"
            assert reason in torch.load(dump, weights_only=False)["reason"]
            assert learner.train_minibatch([good], COUNTS, loss_fn)["learner/nonfinite"] == 0.0
            assert not same(before, whole(learner)), name
        sums = [float(t.double().sum()) for t in whole(learner)]
        assert ranks.broadcast(sums) == sums  # both ranks hold the same policy


def full_disk(ranks: Ranks) -> None:
    """The disk of rank 1 is full: the save fails on both, the older checkpoint stays, the next save works."""

    def write(folder: Path) -> None:
        (folder / f"{ranks.rank}.bin").write_bytes(b"x" * 1000)

    def no_room(folder: Path) -> None:
        write(folder)
        if ranks.rank == 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    save_checkpoint(FOLDER, 1, write, {"step": 1}, ranks=ranks)
    try:
        save_checkpoint(FOLDER, 2, no_room, {"step": 2}, ranks=ranks)
    except CheckpointError as error:
        assert "rank 1: " in str(error) and "the disk is full" in str(error)
    else:
        raise AssertionError(f"rank {ranks.rank} believes that it saved")
    path, state = load_latest(FOLDER, ranks)
    assert (path.name, state) == ("step_1", {"step": 1})
    save_checkpoint(FOLDER, 2, write, {"step": 2}, ranks=ranks)
    path, state = load_latest(FOLDER, ranks)
    assert (path.name, state) == ("step_2", {"step": 2})
    assert sorted(p.name for p in path.glob("*.bin")) == ["0.bin", "1.bin"]
    ranks.barrier()
    if ranks.main:
        for step in (1, 2):
            (FOLDER / "checkpoints" / f"step_{step}" / "1.bin").write_bytes(b"damaged")
    ranks.barrier()
    try:
        load_latest(FOLDER, ranks)
    except CheckpointError as error:
        assert "step_2: 1.bin does not match" in str(error)
    else:
        raise AssertionError(f"rank {ranks.rank} loaded a damaged checkpoint")


if __name__ == "__main__":
    ranks = Ranks.join()
    for stage in (1, 3):
        nonfinite(ranks, stage)
    full_disk(ranks)
    print("all is well")
