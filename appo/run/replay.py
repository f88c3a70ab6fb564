"""One step of a run learned again from its saved trees.

No engine, no tools, no graders, and nothing is written.

The weights and the optimiser of the step before come from its checkpoint, the trees of the step
from trees.jsonl (`save_trees: all`) with rewards, log-probs and policy versions as they were.
Credit, old log-probs, packing and the updates of all mini-batches are computed anew by the code
that trained (`Trainer.learn`), so the numbers must be those of metrics.jsonl: to the last bit on
the same machine with the same number of ranks and threads, within rounding otherwise.
"""

from __future__ import annotations

import json
import math
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from appo.algo.resolve import resolve
from appo.config import Config, load_config
from appo.dist.failures import agree_or_raise, fail_together
from appo.dist.ranks import Ranks
from appo.errors import CheckpointError, ConfigError, DataError
from appo.models.resolve import check_model_folder, resolve_model
from appo.models.shape import own_family
from appo.observability.metrics import read_metrics
from appo.observability.progress import Console
from appo.rollout.store import TREES, read_step
from appo.run.build import make_learner, make_trainer
from appo.run.plan import Plan, usable_cores
from appo.types import RolloutTree

# How far a number may be from the recorded one where sums are taken in another order: |Δ| ≤ CLOSE ·
# max(1, |recorded|).
CLOSE = {"float32": 1e-6, "bfloat16": 1e-2}

# What the trees themselves say, and the record too: that they are those of the step, and that
# nobody has changed them.
SIZES = ("tokens/unique", "tokens/total", "tokens/generated")
REWARDS = ("reward/mean", "reward/roots", "reward/std")

# What depends on how a mini-batch is cut into streams, hence on the number of ranks.
CUTS = ("learner/micro_batches", "learn/tokens", "pack/")


@dataclass(frozen=True)
class Difference:
    """One number of the step that is not what metrics.jsonl says."""

    name: str
    recorded: float
    replayed: float

    @property
    def size(self) -> float:
        """|Δ| / max(1, |recorded|)."""
        return abs(self.replayed - self.recorded) / max(1.0, abs(self.recorded))


@dataclass(frozen=True)
class Replay:
    """What a replay found.

    `minibatches`: the learner's answers one by one; `compared`: names of the step's numbers.
    """

    step: int
    checkpoint: Path
    trees: int
    ranks: tuple[int, int]  # of the checkpoint, of this replay
    recorded: Mapping[str, float]
    metrics: Mapping[str, float]
    minibatches: Sequence[Mapping[str, float]]
    compared: tuple[str, ...]
    differences: tuple[Difference, ...]
    close: float

    @property
    def exact(self) -> bool:
        """Every number is the recorded one, to the last bit."""
        return not self.differences

    @property
    def agrees(self) -> bool:
        """No number is further from the recorded one than rounding takes it."""
        return all(d.size <= self.close for d in self.differences)


def replay(
    run: Path | str, step: int, console: Console | None = None, ranks: Ranks | None = None
) -> Replay:
    """Learn `step` of the run in folder `run` again.

    Collective: any number of ranks, whatever the run had.

    Raises ConfigError, CheckpointError or DataError that says what is missing and what would have
    kept it.
    """
    console, ranks, run = console or Console(), ranks or Ranks(), Path(run)
    with agree_or_raise(ranks, console):
        cfg = _config(run)
        record = _record(run, step)
        checkpoint, state = _checkpoint(run, step - 1, cfg, ranks.main)
        parts = _trees(run, step, cfg)
        found = _said_by_trees([tree for trees in parts for tree in trees])
        _same_trees(record, found, run, step)
        plan = _plan(cfg, ranks, console)
    with fail_together(ranks, console), make_learner(plan, ranks) as learner:
        learner.load(checkpoint)
        trainer = make_trainer(plan, learner, ranks, push=lambda version: {})
        trainer.version = int(state["version"])
        metrics, minibatches = trainer.learn([trees[ranks.rank :: ranks.world] for trees in parts])
    metrics |= {name: found[name] for name in REWARDS}
    world = int(json.loads((checkpoint / "learner.json").read_text())["world_size"])
    compared = tuple(k for k in metrics if k in record and _comparable(k, world == ranks.world))
    return Replay(
        step, checkpoint, sum(map(len, parts)), (world, ranks.world), record, metrics, minibatches, compared,
        tuple(Difference(k, record[k], metrics[k]) for k in compared if not _same(record[k], metrics[k], k)),
        CLOSE[cfg.model.dtype],
    )  # fmt: skip


def rows(found: Replay) -> list[tuple[str, str]]:
    """The replay as lines for a card.

    Each mini-batch, recorded against replayed, and what follows.
    """
    then, now = found.ranks
    out = [
        ("checkpoint", f"{found.checkpoint} ({_ranks(then)}); replayed on {_ranks(now)}"),
        ("trees", f"{found.trees} in {len(found.minibatches)} mini-batches"),
    ]
    for i, answer in enumerate(found.minibatches, 1):
        what = "no row to train" if answer["learner/empty"] else (
            f"loss {answer['learner/loss']:.9g}, gradient norm {answer['learner/grad_norm']:.9g}"
            + (", not finite: skipped" if answer["learner/nonfinite"] else "")
        )  # fmt: skip
        out.append((f"mini-batch {i}", what))
    for name in ("learner/loss", "learner/grad_norm"):
        if name in found.compared:
            out.append(
                (name, f"recorded {found.recorded[name]!r}, replayed {found.metrics[name]!r}")
            )
    for d in sorted(found.differences, key=lambda d: -d.size):
        if d.size > found.close:
            out.append(("differs", f"{d.name}: recorded {d.recorded!r}, replayed {d.replayed!r}"))
    return [*out, ("result", _verdict(found))]


def _ranks(n: int) -> str:
    return f"{n} rank{'s' if n > 1 else ''}"


def _verdict(found: Replay) -> str:
    n = len(found.compared)
    if found.exact:
        return f"the same, bit for bit: all {n} numbers of the step"
    largest = max(d.size for d in found.differences)
    if found.agrees:
        return f"the same within rounding: {len(found.differences)} of {n} numbers differ, by {largest:.1g} at most"
    return (
        f"NOT the same: {sum(d.size > found.close for d in found.differences)} of {n} numbers differ by more than "
        f"{found.close:g}. The trees or the checkpoint were changed, or the code computes something else now"
    )


# -- what is needed --------------------------------------------------------------------------------


def _config(run: Path) -> Config:
    path = run / "config.yaml"
    if not path.is_file():
        raise ConfigError(f"{run}: no run there (config.yaml is missing); give a run folder")
    return load_config(str(path))


def _record(run: Path, step: int) -> dict[str, float]:
    """The step's line of metrics.jsonl."""
    lines = {r["step"]: r for r in read_metrics(run) if r["kind"] == "step"}
    if step not in lines:
        done = f"it has steps 1 to {max(lines)}" if lines else "it has no step yet"
        raise ConfigError(f"--step {step}: metrics.jsonl of {run} has no such step; {done}")
    return lines[step]


def _checkpoint(run: Path, step: int, cfg: Config, check: bool) -> tuple[Path, dict[str, Any]]:
    """Folder and state of the checkpoint of exactly `step`.

    check: its files are those that were written.
    """
    from appo.learner.checkpoint import FOLDER
    from appo.learner.manifest import STATE, verify

    folder = run / FOLDER / f"step_{step}"
    if not folder.is_dir():
        names = (re.fullmatch(r"step_(\d+)", p.name) for p in (run / FOLDER).glob("step_*"))
        have = sorted(int(m[1]) for m in names if m)
        can = (
            f"so steps {', '.join(str(s + 1) for s in have)} can be replayed"
            if have
            else "so no step can"
        )
        raise CheckpointError(
            f"--step {step + 1}: it starts from the checkpoint of step {step}, but {run} has those of steps "
            f"{', '.join(map(str, have)) or 'none'}, {can}. The run kept the newest {cfg.keep_last} of every "
            f"{cfg.save_every} steps; train with save_every=1 and a larger keep_last to keep more"
        )
    wrong = verify(folder, step) if check else None
    if wrong is not None:
        raise CheckpointError(f"{folder} cannot be trusted: {wrong}; restore it from a copy")
    return folder, json.loads((folder / STATE).read_text())


def _trees(run: Path, step: int, cfg: Config) -> list[list[RolloutTree]]:
    """The trees of the step by mini-batch, in the order of their prompts."""
    parts = read_step(run / TREES, step)
    count = sum(map(len, parts.values()))
    if count != cfg.prompts_per_step or list(parts) != list(range(cfg.minibatches)):
        raise DataError(
            f"{run / TREES} has {count} of the {cfg.prompts_per_step} trees of step {step}; a step can be replayed if all "
            f"were saved: train with save_trees=all (the run had save_trees={cfg.save_trees})"
        )
    return list(parts.values())


def _said_by_trees(trees: Sequence[RolloutTree]) -> dict[str, float]:
    """Numbers of a step's record that follow from its trees alone."""
    from appo.trainer.step_metrics import MetricSums, count_trees

    sums = MetricSums()
    count_trees(sums, trees)
    return sums.over(Ranks())


def _same_trees(
    record: Mapping[str, float], found: Mapping[str, float], run: Path, step: int
) -> None:
    for name in SIZES:
        if name in record and record[name] != found[name]:
            raise DataError(
                f"{run / TREES}: these are not the trees that step {step} was trained on: {name} is {found[name]:g} of "
                f"them and {record[name]:g} in metrics.jsonl; put back the file that the run wrote"
            )


def _plan(cfg: Config, ranks: Ranks, console: Console) -> Plan:
    """A plan of learning alone.

    Data, tools and engine need not be there, and nothing is written into the run.
    """
    family = own_family(cfg.model.family)
    source = resolve_model(
        cfg.model.name, offline=cfg.model.offline, log=console.note, family=family
    )
    return Plan(
        cfg, resolve(cfg.algo), source, check_model_folder(source.path, family), tool_level="none",
        threads=cfg.threads or max(1, usable_cores() // ranks.local_world), output=Path(tempfile.gettempdir()),
        resume=False, ranks=ranks.world, machine_ranks=ranks.local_world, family=family,
    )  # fmt: skip


# -- comparing -------------------------------------------------------------------------------------


def _comparable(name: str, same_ranks: bool) -> bool:
    return not name.startswith("time/") and (same_ranks or not name.startswith(CUTS))


def _same(recorded: Any, replayed: float, name: str) -> bool:
    """NaN was recorded as null.

    Rewards are added up here in the order of the file, there by rank.
    """
    if recorded is None:
        return not math.isfinite(replayed)
    if name in REWARDS:
        return math.isclose(recorded, replayed, rel_tol=1e-12, abs_tol=1e-12)
    return recorded == replayed
