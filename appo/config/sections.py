"""The sections of a configuration but the learner's.

One dataclass each, and its check beside it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from appo.config.marks import Free, Rounding
from appo.config.ranges import above_zero, not_negative
from appo.errors import ConfigError
from appo.types import Aggregate, BranchBy, CreditRule, Resample


@dataclass
class ModelConfig:
    """The policy: where its weights come from."""

    # A local folder, "tiny", or a name on the hub.
    name: str = "HuggingFaceTB/SmolLM2-135M-Instruct"
    # Of the weights, in engine and learner.
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    # Never ask the hub or the package index.
    offline: Free[bool] = False
    # "my_module:MY_FAMILY"; null: a family that is built in.
    family: str | None = None


@dataclass
class DataConfig:
    """The tasks, and how they are put to the model."""

    # A name in appo.data.tasks.TASKS, "reasoning_gym:<dataset>", "records", or
    # "my_module:my_task".
    task: str = "arithmetic"
    # Passed to the task.
    params: dict[str, Any] = field(default_factory=dict)
    # JSONL or parquet file in the RL record format (task: records). Its content is part of a
    # checkpoint; the file may move.
    train: Free[str | None] = None
    # The same for evaluation.
    eval: Free[str | None] = None
    # Use only so many training tasks; null: all.
    size: int | None = None
    # System prompt; null: the protocol's own.
    system: str | None = None
    # Show one worked tool call in the prompt.
    example: bool = True


@dataclass
class AlgoConfig:
    """null means: what the preset says. The keys are fields of `appo.algo.algorithm.Algorithm`."""

    # A name in appo.algo.presets.ALGORITHMS, or module:attribute of an Algorithm of your own.
    name: str = "appo"
    # released: the published code's variant (docs/algorithms.md, section 8); no preset runs it.
    variant: Literal["paper", "released"] = "paper"
    # M: leaves per prompt; M = N(B+1).
    rollouts: int | None = None
    # N: roots per prompt.
    roots: int | None = None
    # B: branches per root.
    branches: int | None = None
    # What ranks positions (Eq. 5): the score, entropy alone, or chance.
    branch_by: BranchBy | None = None
    # at: the chosen token is drawn again; after: it is kept.
    resample: Resample | None = None
    # τ in tokens; γ = 2^(-1/τ) of Eq. 4 and Eq. 7.
    half_life: float | None = None
    # ε' of clip(Ω, 1 ± ε') in Eq. 5.
    score_clip: float | None = None
    # The reading of A_base in Eq. 6.
    credit: CreditRule | None = None
    # b of A(1 + b f) in Eq. 7; 0 switches the factor off.
    future_weight: float | None = None
    # ε_low of Eq. 8: the ratio is clipped from below at 1 - ε_low.
    clip_low: float | None = None
    # ε_high of Eq. 8: the ratio is clipped from above at 1 + ε_high.
    clip_high: float | None = None
    # c: the loss is at most -A·c where A < 0; 0 switches it off.
    dual_clip: float | None = None
    # The denominator of Eq. 8.
    aggregate: Aggregate | None = None
    # Train what a branch drew itself, with the branch's own advantage (an extension).
    train_branches: bool | None = None


def check_algo(c: AlgoConfig) -> None:
    """M = N(B+1), where all three are given.

    The rest is checked with the preset: `appo.algo.resolve`.
    """
    if c.rollouts is None or c.roots is None or c.branches is None:
        return
    product = c.roots * (c.branches + 1)
    if product != c.rollouts:
        raise ConfigError(
            f"algo.roots·(algo.branches+1) = {c.roots}·({c.branches}+1) = {product}, but "
            f"algo.rollouts is {c.rollouts}; set algo.rollouts={product} or change the others"
        )


@dataclass
class RolloutConfig:
    """Sampling."""

    # What samples: the engine of this package, or vLLM.
    engine: Literal["native", "vllm"] = "native"
    # vllm only: where entropies come from (docs/vllm.md); top is approximate.
    statistics: Literal["exact", "full", "top"] = "exact"
    # Of training rollouts.
    temperature: float = 1.0
    # Must be 1: training rollouts are drawn from the full distribution.
    top_p: float = 1.0
    # Must be 0, for the same reason.
    top_k: int = 0
    # Sampled tokens per trajectory, tool results not counted.
    max_new_tokens: int = 160
    # Tool calls per trajectory; a branch keeps what its prefix has used.
    max_tool_calls: int = 2
    # Sequences decoded at once.
    max_batch: Rounding[int] = 32
    # Prompt tokens per forward.
    prefill_chunk: Rounding[int] = 512
    # Tokens of a context; null: the model's own.
    max_context: int | None = None
    # Most tokens with KV at a time; null: native: nothing gives way until memory ends,
    # vllm: 90 % of the GPU.
    kv_tokens: Free[int | None] = None


def check_rollout(c: RolloutConfig) -> None:
    """Ranges, and what an engine does not have."""
    above_zero(c, "max_new_tokens max_batch prefill_chunk", "rollout.")
    not_negative(c, "temperature max_tool_calls", "rollout.")
    if c.temperature == 0:
        raise ConfigError(
            "rollout.temperature is 0: greedy rollouts are all alike and give no learning signal; "
            "use a temperature above 0 (eval.temperature may be 0)"
        )
    if c.engine == "native" and c.statistics != "exact":
        raise ConfigError(
            f"rollout.statistics is {c.statistics}, but the native engine is always exact; remove it, or use "
            "rollout.engine=vllm"
        )
    # One rollout must fit, here without prompt and tool results; with them: `session.check_pool`.
    if c.kv_tokens is not None and c.kv_tokens <= c.max_new_tokens:
        raise ConfigError(
            f"rollout.kv_tokens is {c.kv_tokens}, but one rollout may take rollout.max_new_tokens={c.max_new_tokens} "
            "tokens beside its prompt; give it room for several, or remove it"
        )
    if not 0 < c.top_p <= 1:
        raise ConfigError(f"rollout.top_p is {c.top_p}, but must be in (0, 1]")
    if c.top_p < 1 or c.top_k > 0:
        raise ConfigError(
            f"rollout.top_p={c.top_p}, rollout.top_k={c.top_k}: training rollouts are drawn "
            "from the full distribution, otherwise the learner's ratios are taken against another policy; "
            "leave top_p=1 and top_k=0"
        )


@dataclass
class PythonToolConfig:
    """The python tool and its sandbox."""

    # auto: the strictest level that this machine offers.
    level: Literal["auto", "strict", "landlock", "rlimit"] = "auto"
    # Needed for level rlimit (development only).
    allow_unsafe: bool = False
    # Seconds by the clock of one call.
    wall_s: float = 5.0
    # Seconds of processor time of one call.
    cpu_s: float = 5.0
    # Memory of one call, in MB.
    memory_mb: int = 512
    # Characters of output shown to the model.
    max_chars: int = 256


@dataclass
class ToolsConfig:
    """Which tools the model may call, and the pool that runs them."""

    # Tools that the model may call: names in appo.tools.table.TOOLS, or "my_module:my_tool".
    enabled: list[str] = field(default_factory=lambda: ["python"])
    # Calls that run at once.
    workers: Free[int] = 4
    # Seconds after which the pool gives a call up.
    timeout_s: Free[float] = 10.0
    python: PythonToolConfig = field(default_factory=PythonToolConfig)


def check_tools(c: ToolsConfig) -> None:
    """Ranges; the pool waits longer than the sandbox."""
    above_zero(c, "workers timeout_s", "tools.")
    if c.timeout_s <= c.python.wall_s:
        raise ConfigError(
            f"tools.timeout_s is {c.timeout_s:g} and tools.python.wall_s is {c.python.wall_s:g}: the pool "
            "would give up calls that the sandbox still runs; make timeout_s at least a few seconds longer"
        )


@dataclass
class RewardSettings:
    """What an answer is worth, and the processes that grade."""

    # Of all tasks: a name, or "my_module:my_grader"; null: as the tasks say.
    grader: str | None = None
    # A right answer.
    correct: float = 1.0
    # Added when the answer is right and a tool call succeeded.
    tool_bonus: float = 0.0
    # Added when a tool call succeeded, whatever the answer, if any.
    tool_use: float = 0.0
    # Added when the format gate passes.
    format_bonus: float = 0.0
    # In place of correct + format_bonus when it does not.
    bad_format: float = 0.0
    # What the format gate asks for.
    strictness: Literal["none", "answer", "full"] = "answer"
    # Processes that grade.
    workers: Free[int] = 1
    # Seconds of one grading.
    timeout_s: Free[float] = 5.0


def check_reward(c: RewardSettings) -> None:
    """Ranges."""
    above_zero(c, "workers timeout_s", "reward.")


@dataclass
class EvalConfig:
    """Accuracy on held-out questions."""

    # Held-out questions of an evaluation.
    questions: int = 128
    # Steps between evaluations; 0: only before the first and after the last.
    every: int = 0
    # 0: greedy.
    temperature: float = 1.0


def check_eval(c: EvalConfig) -> None:
    """Ranges."""
    not_negative(c, "temperature questions every", "eval.")
