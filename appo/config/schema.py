"""The whole configuration, and what must hold between its sections."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from appo.config.learner import LearnerConfig, RunContext, check_learner
from appo.config.marks import Free, Hidden
from appo.config.ranges import above_zero, not_negative
from appo.config.sections import (
    AlgoConfig,
    DataConfig,
    EvalConfig,
    ModelConfig,
    RewardSettings,
    RolloutConfig,
    ToolsConfig,
    check_algo,
    check_eval,
    check_reward,
    check_rollout,
    check_tools,
)
from appo.errors import ConfigError


@dataclass
class Config:
    """One run."""

    # Of everything that is drawn: tasks, tokens, adapters.
    seed: int = 0
    # Steps of the run.
    steps: Free[int] = 100
    # Prompts of a step, over all ranks and mini-batches.
    prompts_per_step: int = 64
    # Optimizer steps per step; APPO needs 2 or more for Ω to carry information.
    minibatches: int = 2
    # Steps that roots are drawn ahead, while the learner trains; branches never are.
    staleness: int = 0
    # null: the cores this process may use.
    threads: Free[int | None] = None
    # The same bits on the same machine, at some cost in speed.
    deterministic: bool = False
    # Run folder; null: runs/<recipe>-<algo>-<time>.
    output: Hidden[str | None] = None
    # A run folder: go on where its newest checkpoint is.
    resume: Hidden[str | None] = None
    # Steps between checkpoints.
    save_every: Free[int] = 10
    # Checkpoints kept.
    keep_last: Free[int] = 2
    # Trees written to the run folder per step; all: the step can be learned again (appo replay).
    save_trees: Free[int | Literal["all"]] = 2
    # Seconds without progress until the run explains itself and ends (exit code 75); 0: off.
    watchdog_s: Free[float] = 1800.0
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    algo: AlgoConfig = field(default_factory=AlgoConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    tools: ToolsConfig = field(default_factory=ToolsConfig)
    reward: RewardSettings = field(default_factory=RewardSettings)
    learner: LearnerConfig = field(default_factory=LearnerConfig)
    eval: Free[EvalConfig] = field(default_factory=EvalConfig)
    # Where the configuration came from; set by load_config, no key of a recipe.
    recipe: Hidden[str] = "custom"


def run_context(cfg: Config, threads: int | None = None, dump_dir: str | None = None) -> RunContext:
    """What the learner takes from outside its section."""
    return RunContext(
        dtype=cfg.model.dtype,
        temperature=cfg.rollout.temperature,
        total_steps=cfg.steps * cfg.minibatches,
        threads=threads,
        dump_dir=dump_dir,
    )


def validate(cfg: Config) -> None:
    """Checks that need no model: ranges and contradictions. Raises ConfigError."""
    above_zero(cfg, "steps prompts_per_step minibatches save_every keep_last")
    not_negative(cfg, "staleness watchdog_s")
    if cfg.save_trees != "all":
        not_negative(cfg, "save_trees")
    check_rollout(cfg.rollout)
    check_tools(cfg.tools)
    check_reward(cfg.reward)
    check_eval(cfg.eval)
    _check_engine(cfg)
    check_learner(cfg.learner, run_context(cfg))
    if cfg.prompts_per_step % cfg.minibatches:
        fitting = -(-cfg.prompts_per_step // cfg.minibatches) * cfg.minibatches
        raise ConfigError(
            f"prompts_per_step={cfg.prompts_per_step} does not divide into minibatches={cfg.minibatches}; "
            f"use a multiple, for example prompts_per_step={fitting}"
        )
    check_algo(cfg.algo)


def _check_engine(cfg: Config) -> None:
    """What vLLM does not offer."""
    if cfg.rollout.engine != "vllm":
        return
    if cfg.deterministic:
        raise ConfigError(
            "deterministic is true and rollout.engine is vllm, which has no deterministic mode; use rollout.engine=native"
        )
    if cfg.staleness:
        raise ConfigError(
            f"staleness is {cfg.staleness} and rollout.engine is vllm, whose sequences are not drawn beside the learner (and "
            "not kept in checkpoints); use staleness=0, or rollout.engine=native"
        )
