"""Configuration: dataclasses ← recipe (YAML) ← dotted overrides, checked before anything is loaded.

One mechanism. Every key is a dataclass field here with its default and meaning; a recipe is a YAML file with any
subset of them; `key.sub=value` on the command line wins. An unknown key or a wrong type is a `ConfigError` that says
where it stands (file:line), the nearest spelling and what is allowed. The resolved configuration is written to the
run folder, so a run can be read without the code that started it.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Union

import yaml

from appo.errors import ConfigError

RECIPES = Path(__file__).parent / "recipes"


@dataclass
class ModelConfig:
    name: str = "HuggingFaceTB/SmolLM2-135M-Instruct"  # local folder, "tiny", or hub name
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    offline: bool = False  # never ask the hub or the package index
    family: str | None = None  # "my_module:MY_FAMILY"; null: a family that is built in


@dataclass
class DataConfig:
    task: str = "arithmetic"  # a name, "reasoning_gym:<dataset>", or "my_module:my_task"
    params: dict[str, Any] = field(default_factory=dict)  # passed to the task
    train: str | None = None  # JSONL or parquet file in the RL record format (task: records)
    eval: str | None = None
    size: int | None = None  # use only so many training tasks
    system: str | None = None  # system prompt; None: the protocol's own
    example: bool = True  # show one worked tool call in the prompt


@dataclass
class AlgoConfig:
    """None means: what the preset says (appo.algo.presets)."""

    name: str = "appo"
    variant: Literal["paper", "released"] = "paper"
    rollouts: int | None = None  # M: leaves per prompt
    roots: int | None = None  # N
    branches: int | None = None  # B per root; M = N(B+1)
    branch_by: Literal["score", "entropy", "random"] | None = None
    resample: Literal["at", "after"] | None = None
    half_life: float | None = None  # tau; gamma = 2^(-1/tau)
    score_clip: float | None = None  # eps' of clip(Omega, 1±eps')
    credit: Literal["sum", "mean", "literal"] | None = None  # A_base rule of section 1.10
    future_weight: float | None = None  # b of A(1 + b A_fut); 0 switches it off
    clip_low: float | None = None
    clip_high: float | None = None
    dual_clip: float | None = None
    aggregate: Literal["token-mean", "seq-mean-token-mean", "rollout-mean"] | None = None
    train_branches: bool = False


@dataclass
class RolloutConfig:
    engine: Literal["native", "vllm"] = "native"
    statistics: Literal["exact", "full", "top"] = (
        "exact"  # vllm only: where entropies come from (docs/vllm.md); top is approximate
    )
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    max_new_tokens: int = 160  # sampled tokens per trajectory, tool results not counted
    max_tool_calls: int = 2  # per trajectory; a branch keeps what its prefix has used
    max_batch: int = 32  # sequences decoded at once
    prefill_chunk: int = 512  # prompt tokens per forward
    max_context: int | None = None  # None: the model's own
    kv_tokens: int | None = (
        None  # most tokens with KV at a time; None: native: nothing gives way until memory ends, vllm: 90 % of the GPU
    )


@dataclass
class PythonToolConfig:
    level: Literal["auto", "strict", "landlock", "rlimit"] = "auto"
    allow_unsafe: bool = False  # needed for level rlimit (development only)
    wall_s: float = 5.0
    cpu_s: float = 5.0
    memory_mb: int = 512
    max_chars: int = 256  # of output shown to the model


@dataclass
class ToolsConfig:
    enabled: list[str] = field(default_factory=lambda: ["python"])  # or "my_module:my_tool"
    workers: int = 4
    timeout_s: float = 10.0
    python: PythonToolConfig = field(default_factory=PythonToolConfig)


@dataclass
class RewardSettings:
    grader: str | None = None  # of all tasks: a name, or "my_module:my_grader"; null: as they say
    correct: float = 1.0
    tool_bonus: float = 0.0  # added when the answer is right and a tool call succeeded
    tool_use: float = 0.0  # added when a tool call succeeded, whatever the answer, if any
    format_bonus: float = 0.0  # added when the format gate passes
    bad_format: float = 0.0  # in place of correct + format_bonus when it does not
    strictness: Literal["none", "answer", "full"] = "answer"
    workers: int = 1
    timeout_s: float = 5.0


@dataclass
class LoraConfig:
    r: int = 16
    alpha: float = 32.0
    layers: int | None = None  # the last k layers; None: all
    targets: list[str] = field(
        default_factory=lambda: [
            "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
        ]
    )  # fmt: skip


@dataclass
class LearnerConfig:
    mode: Literal["lora", "full"] = "full"
    lora: LoraConfig = field(default_factory=LoraConfig)
    lr: float = 1e-6
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: int = 0
    weight_decay: float = 0.0
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    max_grad_norm: float = 1.0
    entropy_coef: float = 0.0
    token_budget: int = 4096  # tokens of one packed micro-batch
    zero_stage: Literal[0, 1, 2, 3] = 1
    offload: Literal["none", "optimizer", "all"] = (
        "none"  # to host memory: masters and moments (stage 1+), or weights as well (stage 3)
    )
    gradient_checkpointing: bool = False
    head_backend: Literal["auto", "torch", "cpu", "triton", "cublas32"] = "auto"
    old_logprobs: Literal["learner", "engine"] = (
        "learner"  # ratios are taken against log-probs of the learner's own at the start of the step, or the engine's
    )
    importance_cap: float | None = (
        2.0  # most weight of a token for the distance of its policy to that of old_logprobs; null: no weights
    )
    max_nonfinite: int = 3  # skipped mini-batches in a row before the run stops


@dataclass
class EvalConfig:
    questions: int = 128
    every: int = 0  # steps between evaluations; 0: only before the first and after the last
    temperature: float = 1.0


@dataclass
class Config:
    seed: int = 0
    steps: int = 100
    prompts_per_step: int = 64
    minibatches: int = 2  # optimiser steps per step; APPO needs >= 2 for Omega to carry information
    staleness: int = (
        0  # steps that roots are drawn ahead, while the learner trains; branches never are
    )
    threads: int | None = None  # None: the cores this process may use
    deterministic: bool = False
    output: str | None = None  # run folder; None: runs/<recipe>-<algo>-<time>
    resume: str | None = None  # a run folder: go on where its newest checkpoint is
    save_every: int = 10  # steps between checkpoints
    keep_last: int = 2
    save_trees: int | Literal["all"] = (
        2  # trees written to the run folder per step; all: the step can be learned again (appo replay)
    )
    watchdog_s: float = (
        1800.0  # seconds without progress until the run explains itself and ends (75); 0: off
    )
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    algo: AlgoConfig = field(default_factory=AlgoConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    tools: ToolsConfig = field(default_factory=ToolsConfig)
    reward: RewardSettings = field(default_factory=RewardSettings)
    learner: LearnerConfig = field(default_factory=LearnerConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    recipe: str = "custom"  # where it came from; set by load_config


def recipe_names() -> list[str]:
    """Names that `load_config` knows without a path."""
    return sorted(p.stem for p in RECIPES.glob("*.yaml"))


def load_config(recipe: str, overrides: Sequence[str] = ()) -> Config:
    """Read a recipe (name or path of a YAML file) and apply `key.sub=value` overrides.

    >>> cfg = load_config("quickstart", ["steps=3", "algo=grpo"])

    Raises ConfigError for an unknown recipe or key, a wrong type, or values that contradict each other.
    """
    path = _recipe_path(recipe)
    run = _resumed_run(overrides)
    values, places = _read_yaml(run or path)
    # A switch of algorithm or task resets what belonged to the old one, so it goes first: nothing the user wrote is lost.
    for text in sorted(overrides, key=lambda t: t.partition("=")[0] not in ("algo", "data.task")):
        _apply_override(values, places, text)
    cfg = _build(Config, values, places, prefix="")
    cfg.recipe = path.stem
    validate(cfg)
    return cfg


def _resumed_run(overrides: Sequence[str]) -> Path | None:
    """The configuration of the run that `resume=` names: it stands in for the recipe, overrides included."""
    for text in overrides:
        key, _, value = text.partition("=")
        if key == "resume" and (Path(value) / "config.yaml").is_file():
            return Path(value) / "config.yaml"
    return None


def dump(cfg: Config) -> str:
    """The configuration as YAML that `load_config` reads back to an equal one."""
    values = dataclasses.asdict(cfg)
    values.pop("recipe")
    return yaml.safe_dump(values, sort_keys=False)


def validate(cfg: Config) -> None:
    """Checks that need no model: ranges and contradictions."""
    positive = {
        "steps": cfg.steps, "prompts_per_step": cfg.prompts_per_step, "minibatches": cfg.minibatches,
        "rollout.max_new_tokens": cfg.rollout.max_new_tokens, "rollout.max_batch": cfg.rollout.max_batch,
        "rollout.prefill_chunk": cfg.rollout.prefill_chunk, "learner.lr": cfg.learner.lr,
        "learner.token_budget": cfg.learner.token_budget, "learner.lora.r": cfg.learner.lora.r,
        "tools.workers": cfg.tools.workers, "tools.timeout_s": cfg.tools.timeout_s,
        "reward.workers": cfg.reward.workers, "reward.timeout_s": cfg.reward.timeout_s,
        "learner.max_grad_norm": cfg.learner.max_grad_norm, "learner.max_nonfinite": cfg.learner.max_nonfinite,
        "save_every": cfg.save_every, "keep_last": cfg.keep_last,
    }  # fmt: skip
    for key, value in positive.items():
        if not value > 0:
            raise ConfigError(f"{key} is {value}, but must be greater than 0")
    not_negative = {
        "staleness": cfg.staleness,
        "rollout.temperature": cfg.rollout.temperature, "eval.temperature": cfg.eval.temperature,
        "eval.questions": cfg.eval.questions, "eval.every": cfg.eval.every,
        "watchdog_s": cfg.watchdog_s, "rollout.max_tool_calls": cfg.rollout.max_tool_calls,
        "save_trees": 0 if cfg.save_trees == "all" else cfg.save_trees,
    }  # fmt: skip
    for key, value in not_negative.items():
        if value < 0:
            raise ConfigError(f"{key} is {value}, but must not be negative")
    if cfg.rollout.temperature == 0:
        raise ConfigError(
            "rollout.temperature is 0: greedy rollouts are all alike and give no learning signal; "
            "use a temperature above 0 (eval.temperature may be 0)"
        )
    if cfg.rollout.engine == "vllm" and cfg.deterministic:
        raise ConfigError(
            "deterministic is true and rollout.engine is vllm, which has no deterministic mode; use rollout.engine=native"
        )
    if cfg.rollout.engine == "vllm" and cfg.staleness:
        raise ConfigError(
            f"staleness is {cfg.staleness} and rollout.engine is vllm, whose sequences are not drawn beside the learner (and "
            "not kept in checkpoints); use staleness=0, or rollout.engine=native"
        )
    cap = cfg.learner.importance_cap
    if cap is not None and not cap >= 1:
        raise ConfigError(
            f"learner.importance_cap is {cap:g}: below 1 it would weigh down tokens whose policy has not moved; use 1 or "
            "more (2 is usual), or null for no weights"
        )
    if cfg.rollout.engine == "native" and cfg.rollout.statistics != "exact":
        raise ConfigError(
            f"rollout.statistics is {cfg.rollout.statistics}, but the native engine is always exact; remove it, or use "
            "rollout.engine=vllm"
        )
    if cfg.rollout.kv_tokens is not None:
        _check_kv_tokens(cfg)
    if len(cfg.learner.betas) != 2 or not all(0 <= b < 1 for b in cfg.learner.betas):
        raise ConfigError(
            f"learner.betas is {cfg.learner.betas}, but must be two numbers in [0, 1), e.g. [0.9,0.999]"
        )
    needed = {"none": 0, "optimizer": 1, "all": 3}[cfg.learner.offload]
    if cfg.learner.zero_stage < needed:
        raise ConfigError(
            f"learner.offload is {cfg.learner.offload} and learner.zero_stage is {cfg.learner.zero_stage}; offloading "
            f"{cfg.learner.offload} needs learner.zero_stage={needed}{' or above' if needed < 3 else ''}"
        )
    if cfg.learner.zero_stage == 0 and cfg.model.dtype == "bfloat16":
        raise ConfigError(
            "learner.zero_stage is 0 and model.dtype is bfloat16: stage 0 keeps no float32 master weights; use stage 1 "
            "(the same cost in one process) or model.dtype=float32"
        )
    total = cfg.steps * cfg.minibatches
    if cfg.learner.schedule != "constant" and cfg.learner.warmup_steps >= total:
        raise ConfigError(
            f"learner.warmup_steps is {cfg.learner.warmup_steps}, but the run has steps·minibatches = {total} updates"
        )
    if cfg.tools.timeout_s <= cfg.tools.python.wall_s:
        raise ConfigError(
            f"tools.timeout_s is {cfg.tools.timeout_s:g} and tools.python.wall_s is {cfg.tools.python.wall_s:g}: the pool "
            "would give up calls that the sandbox still runs; make timeout_s at least a few seconds longer"
        )
    if not 0 < cfg.rollout.top_p <= 1:
        raise ConfigError(f"rollout.top_p is {cfg.rollout.top_p}, but must be in (0, 1]")
    if cfg.rollout.top_p < 1 or cfg.rollout.top_k > 0:
        raise ConfigError(
            f"rollout.top_p={cfg.rollout.top_p}, rollout.top_k={cfg.rollout.top_k}: training rollouts are drawn "
            "from the full distribution, otherwise the learner's ratios are taken against another policy; "
            "leave top_p=1 and top_k=0"
        )
    if cfg.prompts_per_step % cfg.minibatches:
        raise ConfigError(
            f"prompts_per_step={cfg.prompts_per_step} does not divide into minibatches={cfg.minibatches}; "
            f"use a multiple, for example prompts_per_step={-(-cfg.prompts_per_step // cfg.minibatches) * cfg.minibatches}"
        )
    a = cfg.algo
    if a.rollouts is not None and a.roots is not None and a.branches is not None:
        if a.roots * (a.branches + 1) != a.rollouts:
            raise ConfigError(
                f"algo.roots·(algo.branches+1) = {a.roots}·({a.branches}+1) = {a.roots * (a.branches + 1)}, but "
                f"algo.rollouts is {a.rollouts}; set algo.rollouts={a.roots * (a.branches + 1)} or change the others"
            )


def _check_kv_tokens(cfg: Config) -> None:
    """One rollout must fit: here without its prompt and tool results; with them: `run.check_pool`."""
    limit, need = cfg.rollout.kv_tokens, cfg.rollout.max_new_tokens
    if limit is not None and limit <= need:
        raise ConfigError(
            f"rollout.kv_tokens is {limit}, but one rollout may take rollout.max_new_tokens={need} tokens beside its "
            "prompt; give it room for several, or remove it"
        )


def _recipe_path(recipe: str) -> Path:
    if recipe.endswith((".yaml", ".yml")) or "/" in recipe:
        path = Path(recipe)
        if not path.is_file():
            raise ConfigError(
                f"recipe file {recipe!r} does not exist; built-in recipes: {', '.join(recipe_names())}"
            )
        return path
    path = RECIPES / f"{recipe}.yaml"
    if not path.is_file():
        near = difflib.get_close_matches(recipe, recipe_names(), 1, 0.4)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigError(
            f"unknown recipe {recipe!r}{hint} Built-in recipes: {', '.join(recipe_names())}; or give the path of a "
            "YAML file"
        )
    return path


def _read_yaml(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """Values as nested dicts, and for each dotted key where it stands (file:line)."""
    try:
        root = yaml.compose(path.read_text(), Loader=yaml.SafeLoader)
        values = yaml.safe_load(path.read_text()) or {}
    except yaml.YAMLError as e:
        raise ConfigError(f"{path}: not valid YAML: {e}") from e
    if not isinstance(values, dict):
        raise ConfigError(
            f"{path}: a recipe is a mapping of keys to values, this is a {type(values).__name__}"
        )
    places: dict[str, str] = {}

    def mark(node: yaml.Node | None, prefix: str) -> None:
        if isinstance(node, yaml.MappingNode):
            for k, v in node.value:
                places[prefix + str(k.value)] = f"{path}:{k.start_mark.line + 1}"
                mark(v, f"{prefix}{k.value}.")

    mark(root, "")
    return values, places


def _apply_override(values: dict[str, Any], places: dict[str, str], text: str) -> None:
    key, eq, raw = text.partition("=")
    if not eq or not key:
        raise ConfigError(
            f"override {text!r} is not of the form key=value (for example learner.lr=1e-5)"
        )
    try:
        value = yaml.safe_load(raw)
    except yaml.YAMLError as e:
        raise ConfigError(f"override {text!r}: the value is not valid YAML: {e}") from e
    if isinstance(value, str):
        value = _number(value)
    places[key] = "command line"
    if key == "algo" and isinstance(value, str):
        _switch_algorithm(values, value)
        return
    if key == "data.task" and isinstance(values.get("data"), dict):
        if values["data"].get("task") != value:
            values["data"].pop("params", None)  # they belong to the recipe's task
    at = values
    *parents, last = key.split(".")
    for p in parents:
        at = at.setdefault(p, {})
        if not isinstance(at, dict):
            raise ConfigError(f"{key} (command line): {p!r} holds a value, not a group of keys")
    at[last] = value


def _switch_algorithm(values: dict[str, Any], name: str) -> None:
    """`algo=NAME` keeps the recipe's rollouts per prompt; its other algorithm keys belong to the old algorithm."""
    old = values.get("algo") or {}
    if old.get("name") == name:
        return
    rollouts = old.get("rollouts")
    if rollouts is None and old.get("roots"):
        rollouts = old["roots"] * (old.get("branches", 0) + 1)
    values["algo"] = {"name": name} | ({"rollouts": rollouts} if rollouts else {})


def _number(text: str) -> Any:
    """YAML 1.1 reads 1e-6 as a string; nobody means that."""
    try:
        return float(text)
    except ValueError:
        return text


def _build(cls: type, values: Any, places: Mapping[str, str], prefix: str) -> Any:
    if values is None:
        values = {}
    if not isinstance(values, dict):
        where = places.get(prefix[:-1], "?")
        raise ConfigError(f"{prefix[:-1]} ({where}): expected a group of keys, got {values!r}")
    hints = typing.get_type_hints(cls)
    known = {f.name for f in dataclasses.fields(cls)} - ({"recipe"} if cls is Config else set())
    out: dict[str, Any] = {}
    for key, value in values.items():
        dotted = f"{prefix}{key}"
        where = places.get(dotted, "?")
        if key not in known:
            near = difflib.get_close_matches(str(key), sorted(known), 1, 0.5)
            hint = (
                f"did you mean {prefix}{near[0]}?"
                if near
                else f"known keys: {', '.join(sorted(known))}"
            )
            raise ConfigError(f"unknown key {dotted!r} ({where}); {hint}")
        if dataclasses.is_dataclass(hints[key]):
            out[key] = _build(typing.cast(type, hints[key]), value, places, dotted + ".")
        else:
            out[key] = _check(hints[key], value, dotted, where)
    return cls(**out)


def _check(hint: Any, value: Any, key: str, where: str) -> Any:
    """Return `value` as the hinted type (int → float, numeric string → float) or raise."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        inner = [a for a in args if a is not type(None)]
        words = [w for a in inner[1:] for w in typing.get_args(a)]  # int | Literal["all"]
        if value in words:
            return value
        try:
            return _check(inner[0], value, key, where)
        except ConfigError as error:
            if not words:
                raise
            raise ConfigError(f"{error}, or {' or '.join(map(repr, words))}") from error
    if origin is Literal:
        if value not in args:
            near = difflib.get_close_matches(str(value), [str(a) for a in args], 1, 0.5)
            hint_text = f" (did you mean {near[0]!r}?)" if near else ""
            raise ConfigError(
                f"{key}={value!r} ({where}): must be one of {', '.join(map(str, args))}{hint_text}"
            )
        return value
    if origin is list:
        if not isinstance(value, list):
            raise ConfigError(
                f"{key}={value!r} ({where}): expected a list, for example {key}=[a,b]"
            )
        return [_check(args[0], v, key, where) for v in value]
    if origin is dict:
        if not isinstance(value, dict):
            raise ConfigError(f"{key}={value!r} ({where}): expected a mapping")
        return value
    if hint is float and isinstance(value, str):
        value = _number(value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is int and isinstance(value, float) and value.is_integer():
        return int(value)
    if hint is str and isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)
    if hint is Any or (isinstance(value, hint) and not (hint is int and isinstance(value, bool))):
        return value
    raise ConfigError(
        f"{key}={value!r} ({where}): expected {hint.__name__}, got {type(value).__name__}"
    )
