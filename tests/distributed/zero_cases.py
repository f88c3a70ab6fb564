"""What the ranks of test_zero.py do: the same training in every arrangement of stage, mode, type, ranks and micro-batches.

Run as a script it is one rank of a launch, and writes what it saw to FOLDER/seen_by_R.json; imported, it is a world of one.
"""

from __future__ import annotations

import faulthandler
import json
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from support.learner_forest import PROBES, PlainEngine, counts_of, forest
from support.learner_forest import objective as forest_objective

from appo.config import LearnerConfig, LoraConfig, RunContext
from appo.dist.ranks import Ranks
from appo.errors import CheckpointError, LearnerError
from appo.learner import accumulate, zero
from appo.learner import learner as backend
from appo.learner.learner import Learner
from appo.learner.push_weights import push
from appo.packing.pack import PackedBatch, pack
from appo.types import Counts

STEPS, SAVED_AT, SAVED_AGAIN_AT = 6, 2, 4

# With the usual eps of 1e-8 Adam moves a weight by the sign of a gradient that is all rounding; with this one the update is
# a smooth function of the gradient, and rounding stays rounding.
EPS = 1e-3


@dataclass(frozen=True)
class Case:
    stage: int
    mode: str = "full"
    dtype: str = "float32"
    offload: str = "none"

    @property
    def name(self) -> str:
        return f"{self.mode}-{self.dtype}-stage{self.stage}-{self.offload}"

    @property
    def settings(self) -> LearnerConfig:
        return LearnerConfig(
            mode=self.mode, zero_stage=self.stage, offload=self.offload, lora=LoraConfig(r=4),
            lr=1e-3, eps=EPS, weight_decay=0.1, warmup_steps=2, schedule="cosine", max_grad_norm=0.5,
            gradient_checkpointing=self.stage % 2 == 1,
        )  # fmt: skip

    @property
    def context(self) -> RunContext:
        return RunContext(dtype=self.dtype, temperature=0.8, total_steps=10)


FLOAT32 = [Case(stage, mode) for mode in ("full", "lora") for stage in (0, 1, 2, 3)]
BFLOAT16 = [Case(stage, mode, "bfloat16") for mode in ("full", "lora") for stage in (1, 2, 3)]
OFFLOADED = [
    Case(2, "lora", offload="optimizer"),
    Case(3, offload="all"),
    Case(1, dtype="bfloat16", offload="optimizer"),  # not the optimiser it has without offloading
]
CASES = FLOAT32 + BFLOAT16 + OFFLOADED
RESUMED = FLOAT32 + BFLOAT16[:3] + BFLOAT16[-1:]
CONTINUED = [
    Case(0), Case(3), Case(1, "lora"), Case(2, "lora"), Case(1, dtype="bfloat16"),
]  # fmt: skip

# In the source of the learner: what it says, what it says with the fault in it.
FAULTS = {
    "mean over ranks": ("backward(loss * dist.get_world_size(),", "backward(loss,"),
    "denominators of one rank": (
        'Counts(**self.ranks.sum(asdict(counts), "loss denominators"))',
        "Counts(**{k: v * self.world for k, v in asdict(counts).items()})",
    ),
    "an idle stream that trains": ("loss = loss * 0.0", "loss = loss * 1.0"),
}


def deal(step: int, rank: int, world: int) -> tuple[list[PackedBatch], Counts]:
    """This rank's micro-batches of a step, and its denominators. The rows of a step are always the same eight.

    Steps 0, 3: one stream on each rank. Steps 1, 4: three on rank 0, one on rank 1. Steps 2, 5: rank 0 has nothing to do.
    Alone: one, three and two streams.
    """
    trees, credits = forest()
    rows = [(t, r) for t in range(len(trees)) for r in range(len(credits[t]))]
    if world == 1:
        mine = [[rows], [rows[:2], rows[2:5], rows[5:]], [rows[:7], rows[7:]]][step % 3]
    else:
        mine = [
            ([rows[:5]], [rows[5:]]),
            ([rows[:2], rows[2:4], rows[4:5]], [rows[5:]]),
            ([], [rows[:6], rows[6:]]),
        ][step % 3][rank]
    batches = []
    for stream in mine:
        kept = [[credits[t][r] for u, r in stream if u == t] for t in range(len(trees))]
        batches += pack(trees, kept, token_budget=1000)
    return batches, counts_of([[credits[t][r]] for stream in mine for t, r in stream])


def objective(stats: Any, batch: PackedBatch, counts: Counts) -> Any:
    """That of the forest and a term that also an idle stream has: one that trained would be seen."""
    loss, metrics = forest_objective(stats, batch, counts)
    return loss - stats.entropy.sum() / counts.rows, metrics


def train(learner: Learner, steps: Sequence[int]) -> list[dict[str, float]]:
    """Metrics of each step."""
    out = []
    for step in steps:
        batches, counts = deal(step, learner.rank, learner.world)
        out.append(learner.train_minibatch(batches, counts, objective))
    return out


def weights(learner: Learner) -> dict[str, torch.Tensor]:
    return {n: t.clone() for n, t in learner.named_weights()}


def start(model: Path, case: Case, seed: int = 0, kind: type[Learner] = Learner) -> Learner:
    return kind(model, case.settings, seed, context=case.context)


@contextmanager
def everything_partitioned() -> Iterator[None]:
    """Stage 3 splits the smallest tensor, and buckets hold less than a large tensor: as with a model a million times as large."""
    before = zero.KEPT_WHOLE, zero.BUCKET
    zero.KEPT_WHOLE, zero.BUCKET = 0, 1_000
    try:
        yield
    finally:
        zero.KEPT_WHOLE, zero.BUCKET = before


def faulty_learner(fault: str) -> type[Learner]:
    """The learner with one mistake in it, or in how it accumulates."""
    right, wrong = FAULTS[fault]
    sources = {m: Path(m.__file__).read_text() for m in (accumulate, backend)}
    assert sum(s.count(right) for s in sources.values()) == 1, f"{fault}: no single {right!r}"
    made = {}
    for original, source in sources.items():
        module = types.ModuleType(f"{original.__name__}_faulty")
        sys.modules[module.__name__] = module
        exec(compile(source.replace(right, wrong), fault, "exec"), vars(module))
        made[original] = module
    made[backend].accumulate = made[accumulate].accumulate
    made[backend].means = made[accumulate].means
    return made[backend].Learner


# -- what the ranks of a launch check among themselves


def check_not_finite(model: Path, ranks: Ranks) -> None:
    """NaN on one rank refuses the step on all, changes nothing, and every rank says where it was."""
    for stage in (0, 3):
        with start(model, Case(stage)) as learner:
            batches, counts = deal(1, ranks.rank, ranks.world)
            if ranks.rank == 1:
                batches[0].advantage[batches[0].mask] = float("nan")
            before = weights(learner)
            for _ in range(2):
                assert learner.train_minibatch(batches, counts, objective)["learner/nonfinite"]
            try:
                learner.train_minibatch(batches, counts, objective)
                raise AssertionError("a third NaN was let through")
            except LearnerError as error:
                assert "rank 1, micro-batch 0: advantage" in str(error), error
            after = weights(learner)
            assert all(torch.equal(after[n], t) for n, t in before.items())
            assert learner.train_minibatch([], Counts(0, 0, 0), objective)["learner/empty"]


def check_old_logp(model: Path, ranks: Ranks) -> None:
    """Ranks with different numbers of batches, and with none, score under stage 3."""
    with start(model, Case(3)) as learner:
        for step in range(3):
            batches, _ = deal(step, ranks.rank, ranks.world)
            found = learner.old_logprobs(batches)
            for batch, old_logp in zip(batches, found, strict=True):
                assert old_logp.shape == batch.mask.shape and bool((old_logp[batch.mask] < 0).all())


def check_push(model: Path, ranks: Ranks) -> None:
    """Every rank fills its own engine; what fails on one ends all, with the same words."""
    for case in (Case(3), Case(2, "lora")):
        with start(model, case) as learner:
            train(learner, range(2))
            metrics = push(learner, PlainEngine(model), 1, PROBES)
            assert metrics["push/probe_max"] < 1e-3
            assert len(set(ranks.all_gather(metrics["push/crc32"]))) == 1
            skip = "v_proj" if ranks.rank == 1 else ""
            lag = 1 if ranks.rank == 1 else 0
            early = ranks.rank == 1
            for engine, words in (
                (PlainEngine(model, skip=skip), "rank 1: engine and learner disagree"),
                (
                    PlainEngine(model, version_lag=lag),
                    "rank 1: push of policy version 2: the engine reports version 1",
                ),
                (
                    PlainEngine(model, stop_early=early),
                    "rank 1: push of policy version 2: the engine stopped reading",
                ),
                (Broken(model) if early else PlainEngine(model), "rank 1: ValueError: no room"),
            ):
                try:
                    push(learner, engine, 2, PROBES)
                    raise AssertionError(f"not noticed: {words}")
                except LearnerError as error:
                    assert words in str(error), (words, str(error))
            if case.mode == "full":
                learner.named_weights = partial(disturbed, learner.named_weights, ranks.rank)
                try:
                    push(learner, PlainEngine(model), 2, PROBES)
                    raise AssertionError("ranks with different weights were not noticed")
                except LearnerError as error:
                    assert "ranks do not hold the same weights" in str(error), error


def disturbed(
    named: Callable[..., Any], by: float, *args: Any, **more: Any
) -> Iterator[tuple[str, torch.Tensor]]:
    return ((name, tensor + by) for name, tensor in named(*args, **more))


class Broken(PlainEngine):
    def load_weights(self, named_tensors: Any, version: int) -> None:
        for i, _ in enumerate(named_tensors):
            if i == 2:
                raise ValueError("no room")


def check_one_layer_at_a_time(model: Path, ranks: Ranks) -> None:
    """A push under stage 3 never has more gathered than one layer's worth: each tensor is closed before the next."""
    for mode in ("full", "lora"):
        with start(model, Case(3, mode)) as learner:
            learner.logprobs(
                PROBES
            )  # a forward leaves parameters gathered; the push must not add to them
            parameters = list(learner.lm.parameters())
            largest = max(p.ds_numel for p in parameters)
            for name, tensor in learner.named_weights():
                whole = [p for p in parameters if p.numel() == p.ds_numel]
                assert sum(p.numel() for p in whole) <= largest + 2 * 4 * 96, name
                assert tensor.numel() <= largest
            assert not any(p.numel() for p in parameters)


def check_missing_shard(model: Path, folder: Path, ranks: Ranks) -> None:
    with start(model, Case(2)) as learner:
        learner.save(folder / "torn")
        ranks.barrier()
        if ranks.main:
            (folder / "torn" / "zero" / "rank_1.pt").unlink()
        ranks.barrier()
        try:
            learner.load(folder / "torn")
            raise AssertionError("a checkpoint without a shard was loaded")
        except CheckpointError as error:
            assert "written by 2 ranks, and zero/rank_1.pt is missing" in str(error), error


# -- one rank of a launch


def main(model: Path, folder: Path) -> None:
    faulthandler.dump_traceback_later(
        480, exit=True
    )  # before the caller gives up, and with the place
    ranks = Ranks.join()
    torch.set_num_threads(1)
    seen: dict[str, Any] = {}
    with everything_partitioned():
        for case in CASES:
            with start(model, case) as learner:
                seen[case.name] = train(learner, range(STEPS))
                found = weights(learner)
                if ranks.main:
                    torch.save(found, folder / f"{case.name}.pt")
        for case in RESUMED:
            with start(model, case, seed=99) as learner:
                learner.load(folder / "one" / case.name)
                learner.save(folder / "loaded" / case.name)
                if case in CONTINUED:
                    seen["resumed " + case.name] = train(learner, range(SAVED_AT, SAVED_AGAIN_AT))
                    learner.save(folder / "two" / case.name)
        for fault in FAULTS:
            with start(model, Case(2), kind=faulty_learner(fault)) as learner:
                seen["faulty " + fault] = train(learner, range(STEPS))
        check_not_finite(model, ranks)
        check_old_logp(model, ranks)
        check_push(model, ranks)
        check_one_layer_at_a_time(model, ranks)
        check_missing_shard(model, folder, ranks)
    (folder / f"seen_by_{ranks.rank}.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
