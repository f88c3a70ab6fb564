"""The learner's keys, what it takes from the rest of a run, and the checks of both. No torch.

`check_learner` runs when a configuration is loaded, and again where a `Learner` is made, so that a
program which makes a `Learner` itself is protected by the same checks.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from appo.config.convert import check_types
from appo.config.marks import Free, Rounding
from appo.config.ranges import above_zero, not_negative
from appo.errors import ConfigError

LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass
class LoraConfig:
    """Low-rank adapters (mode: lora)."""

    # Rank.
    r: int = 16
    # Adapters are scaled by alpha / r.
    alpha: float = 32.0
    # The last k layers; null: all.
    layers: int | None = None
    # Linear layers of a block that get an adapter.
    targets: list[str] = field(default_factory=lambda: list(LORA_TARGETS))


@dataclass
class LearnerConfig:
    """How to train."""

    # All weights, or adapters on frozen ones.
    mode: Literal["lora", "full"] = "full"
    lora: LoraConfig = field(default_factory=LoraConfig)
    # Peak learning rate of AdamW.
    lr: float = 1e-6
    # After the warm-up: constant, or to 0 by a line or half a cosine.
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    # Updates of a linear warm-up.
    warmup_steps: int = 0
    # Of AdamW.
    weight_decay: float = 0.0
    # Decay of AdamW's two moments.
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    # AdamW's ε, added to the root of the second moment.
    eps: float = 1e-8
    # Norm that a larger gradient is scaled down to; 0: no clipping.
    max_grad_norm: float = 1.0
    # Weight of the entropy bonus; 0: none.
    entropy_coef: float = 0.0
    # Tokens of one packed micro-batch.
    token_budget: Rounding[int] = 4096
    # What is split between ranks: 1: optimizer state, 2: gradients too, 3: weights too.
    zero_stage: Rounding[Literal[0, 1, 2, 3]] = 1
    # Moved to host memory between uses: masters and moments (stage 1+), or weights too (stage 3).
    offload: Rounding[Literal["none", "optimizer", "all"]] = "none"
    # Compute activations twice instead of keeping them.
    gradient_checkpointing: Rounding[bool] = False
    # Kernel of the language-model head.
    head_backend: Rounding[Literal["auto", "torch", "cpu", "triton", "cublas32"]] = "auto"
    # Ratios are taken against the learner's log-probs at the start of the step, or the engine's.
    old_logprobs: Literal["learner", "engine"] = "learner"
    # Most weight of a token for the distance of its policy to that of old_logprobs;
    # null: no weights.
    importance_cap: float | None = 2.0
    # Skipped mini-batches in a row before the run stops.
    max_nonfinite: Free[int] = 3


@dataclass(frozen=True)
class RunContext:
    """What a learner needs to know of the run around it, beside `LearnerConfig`.

    dtype        of the weights
    temperature  that tokens were sampled at: log-probs are taken at it
    total_steps  optimizer steps of the whole run; for a schedule that ends
    threads      for torch; None leaves its number alone
    dump_dir     folder for batches that are not finite; None: one in the temporary directory
    """

    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    temperature: float = 1.0
    total_steps: int = 0
    threads: int | None = None
    dump_dir: str | None = None


def check_learner(c: LearnerConfig, run: RunContext) -> None:
    """Types, ranges and contradictions of the learner's settings. Raises ConfigError."""
    check_types(c, "learner.")
    check_types(run, "")
    above_zero(run, "temperature")
    above_zero(c, "lr eps token_budget max_nonfinite", "learner.")
    above_zero(c.lora, "r", "learner.lora.")
    not_negative(c, "max_grad_norm", "learner.")
    _check_optimizer(c, run)
    _check_zero(c, run)


def _check_optimizer(c: LearnerConfig, run: RunContext) -> None:
    cap = c.importance_cap
    if cap is not None and not cap >= 1:
        raise ConfigError(
            f"learner.importance_cap is {cap:g}: below 1 it would weigh down tokens whose policy has not moved; use 1 or "
            "more (2 is usual), or null for no weights"
        )
    if len(c.betas) != 2 or not all(0 <= b < 1 for b in c.betas):
        raise ConfigError(
            f"learner.betas is {c.betas}, but must be two numbers in [0, 1), e.g. [0.9,0.999]"
        )
    if c.schedule != "constant" and c.warmup_steps >= run.total_steps:
        raise ConfigError(
            f"learner.schedule is {c.schedule} and learner.warmup_steps is {c.warmup_steps}, but the run has "
            f"steps·minibatches = {run.total_steps} updates; use fewer warm-up steps, a longer run, or "
            "learner.schedule=constant"
        )


def _check_zero(c: LearnerConfig, run: RunContext) -> None:
    needed = {"none": 0, "optimizer": 1, "all": 3}[c.offload]
    if c.zero_stage < needed:
        raise ConfigError(
            f"learner.offload is {c.offload} and learner.zero_stage is {c.zero_stage}; offloading "
            f"{c.offload} needs learner.zero_stage={needed}{' or above' if needed < 3 else ''}"
        )
    if c.zero_stage == 0 and run.dtype == "bfloat16":
        raise ConfigError(
            "learner.zero_stage is 0 and model.dtype is bfloat16: stage 0 keeps no float32 master weights; use stage 1 "
            "(the same cost in one process) or model.dtype=float32"
        )
