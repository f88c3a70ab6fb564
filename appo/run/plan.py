"""Configuration → checked plan.

Every mistake that can be found without loading a model is found here, in seconds.
"""

from __future__ import annotations

import importlib.util
import os
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from appo.algo.algorithm import Algorithm
from appo.algo.resolve import resolve
from appo.config import Config
from appo.data.tasks import TaskStream, build_tasks
from appo.dist.failures import agree_or_raise
from appo.dist.ranks import Ranks
from appo.errors import CheckpointError, ConfigError
from appo.models.resolve import ModelInfo, ModelSource, check_model_folder, resolve_model
from appo.models.shape import ModelFamily, ModelShape, own_family, read_shape
from appo.observability.progress import Console
from appo.run.user_code import check_graders, describe, import_strings
from appo.tools.sandbox import choose_level
from appo.tools.table import tool_specs
from appo.types import Task

NO_OUTPUT = Path()  # of a plan that writes nothing


@dataclass(frozen=True)
class Plan:
    """A run that has passed every check which needs no model in memory."""

    cfg: Config
    algo: Algorithm
    source: ModelSource
    model: ModelInfo
    tool_level: str  # sandbox level, "none" without the python tool
    threads: int
    output: Path
    resume: bool
    ranks: int = 1
    machine_ranks: int = 1  # of these on this machine
    imports: tuple[tuple[str, str], ...] = ()  # (import string, key) of the user's own code
    family: ModelFamily | None = None  # of the user's own

    @property
    def shape(self) -> ModelShape:
        """The sizes of the model."""
        return read_shape(self.source.path, self.family)


def plan(
    cfg: Config, console: Console, *, need_output: bool = True, ranks: Ranks | None = None
) -> Plan:
    """Check everything that can be checked early. Raises ConfigError and its kin; loads no weights.

    Collective. Rank 0 goes first: it chooses the folder and fetches the model; then the first rank
    of each other machine, whose model cache may be another one; then all others, which find the
    model there.
    """
    ranks = ranks or Ranks()
    mine = 0 if ranks.main else 1 if ranks.local_rank == 0 else 2
    p: Plan | None = None
    folder = None
    for turn in range(3 if ranks.world > 1 else 1):
        with agree_or_raise(ranks, console):
            if turn == mine:
                p = _plan(cfg, console, need_output, ranks, folder)
        if turn == 0:
            folder = ranks.broadcast(p.output if p else None, "the run folder")
    assert p is not None
    return p


def _plan(
    cfg: Config, console: Console, need_output: bool, ranks: Ranks, folder: Path | None
) -> Plan:
    """This rank's plan; `folder` is the one that rank 0 has chosen."""
    imports = import_strings(cfg)
    if imports and ranks.main:  # told before anything of it runs
        console.note(f"imports: {describe(imports)}")
    algo = resolve(cfg.algo)
    family = own_family(cfg.model.family)
    tool_specs(cfg.tools)
    imports += check_graders(cfg, _probe_tasks(cfg))
    threads = cfg.threads or max(1, usable_cores() // ranks.local_world)
    output = NO_OUTPUT
    if need_output:
        output = _output_folder(cfg, algo) if folder is None else _shared_folder(folder)
    level = "none"
    if "python" in cfg.tools.enabled:
        level = choose_level(cfg.tools.python.level, cfg.tools.python.allow_unsafe).level
    cached = ranks.local_rank > 0
    source = resolve_model(
        cfg.model.name, offline=cfg.model.offline or cached, log=console.note, family=family
    )
    info = check_model_folder(source.path, family)
    lora = cfg.learner.lora.layers
    if cfg.learner.mode == "lora" and lora is not None and not 1 <= lora <= info.layers:
        raise ConfigError(
            f"learner.lora.layers is {lora}, but {source.name} has {info.layers} layers; use 1 to {info.layers} or null"
        )
    _check_engine(cfg, algo)
    return Plan(
        cfg, algo, source, info, level, threads, output, cfg.resume is not None, ranks.world, ranks.local_world,
        tuple(imports), family,
    )  # fmt: skip


def _check_engine(cfg: Config, algo: Algorithm) -> None:
    """vLLM is there if it is asked for, and says enough for what the algorithm does with it."""
    if cfg.rollout.engine != "vllm":
        return
    if cfg.model.family is not None:
        raise ConfigError(
            f"model.family is {cfg.model.family} and rollout.engine is vllm, which runs the families it knows itself; "
            "use rollout.engine=native"
        )
    if importlib.util.find_spec("vllm") is None:
        raise ConfigError(
            "rollout.engine is vllm, which is not installed: pip install 'appo[vllm]' (on a CPU see docs/vllm.md), or use "
            "rollout.engine=native"
        )
    needs = algo.has_branches and algo.branch_by != "random"
    if needs and cfg.rollout.statistics == "top":
        raise ConfigError(
            f"rollout.statistics is top: entropies are approximate, and {algo.name} chooses branch points by them; use "
            "rollout.statistics=exact"
        )


def usable_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _output_folder(cfg: Config, algo: Algorithm) -> Path:
    """The run folder, made and writable; an existing run is refused unless it is resumed."""
    if cfg.resume is not None:
        folder = Path(cfg.resume)
        if not (folder / "config.yaml").is_file():
            raise CheckpointError(
                f"resume={cfg.resume}: no run there (config.yaml is missing); give a run folder"
            )
        return folder
    stamp = time.strftime("%m%d-%H%M%S")
    folder = Path(cfg.output) if cfg.output else Path("runs") / f"{cfg.recipe}-{algo.name}-{stamp}"
    if (folder / "config.yaml").exists():
        raise ConfigError(
            f"output={folder}: a run is already there; continue it with resume={folder}, or choose another output"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".write-probe"
        probe.write_text("x")
        probe.unlink()
    except OSError as e:
        raise ConfigError(
            f"output={folder}: cannot write there ({e.strerror or e}); choose a folder that you may write to"
        ) from e
    return folder


def _shared_folder(folder: Path) -> Path:
    """Rank 0's folder, which every rank writes its part of a checkpoint to."""
    if not folder.is_dir():
        raise ConfigError(
            f"output={folder}: rank 0 has made this folder, and this rank on {socket.gethostname()} does not see it; "
            "use a folder on a file system that all machines share, and start all ranks in the same directory"
        )
    return folder


def _probe_tasks(cfg: Config) -> list[Task]:
    """Draw one task of each split: unknown names, empty or unreadable files show here."""
    return [tasks_of(cfg, "train")[0], tasks_of(cfg, "eval")[0]]


def tasks_of(cfg: Config, split: Literal["train", "eval"]) -> TaskStream:
    """The tasks of a split as configured."""
    params = dict(cfg.data.params)
    files = {"train": cfg.data.train, "eval": cfg.data.eval}
    params |= {k: v for k, v in files.items() if v is not None}
    size = cfg.data.size if split == "train" else None
    return build_tasks(
        cfg.data.task,
        split=split,
        seed=cfg.seed,
        size=size,
        params=params,
        tools=tuple(tool_specs(cfg.tools)),
    )
