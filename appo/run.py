"""Where the parts are put together: configuration → checked plan → engine, rollouts, graders, learner → a training run.

`plan` finds every mistake that can be found without loading a model; `Session` loads what sampling needs; `train`
adds the learner and runs the loop of `appo.learner.trainer`.
"""

from __future__ import annotations

import importlib.util
import json
import os
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from appo.algo.presets import Algorithm, resolve
from appo.config import Config
from appo.data.datasets import TaskStream, build_tasks
from appo.data.models import (
    ModelInfo,
    ModelSource,
    check_model_folder,
    load_tokenizer,
    resolve_model,
)
from appo.data.prompts import PromptBuilder, encode_plain, result_text
from appo.errors import CheckpointError, ConfigError
from appo.obs.progress import Console
from appo.tools.sandbox import choose_level
from appo.types import RolloutTree, Task

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


def plan(cfg: Config, console: Console, *, need_output: bool = True) -> Plan:
    """Check everything that can be checked early. Raises ConfigError and its kin; loads no weights."""
    algo = resolve(cfg.algo)
    threads = cfg.threads or usable_cores()
    output = _output_folder(cfg, algo) if need_output else NO_OUTPUT
    level = "none"
    if "python" in cfg.tools.enabled:
        level = choose_level(cfg.tools.python.level, cfg.tools.python.allow_unsafe).level
    _probe_tasks(cfg)
    source = resolve_model(cfg.model.name, offline=cfg.model.offline, log=console.note)
    info = check_model_folder(source.path)
    lora = cfg.learner.lora.layers
    if cfg.learner.mode == "lora" and lora is not None and not 1 <= lora <= info.layers:
        raise ConfigError(
            f"learner.lora.layers is {lora}, but {source.name} has {info.layers} layers; use 1 to {info.layers} or null"
        )
    _check_engine(cfg, algo)
    return Plan(cfg, algo, source, info, level, threads, output, cfg.resume is not None)


def _check_engine(cfg: Config, algo: Algorithm) -> None:
    """vLLM is there if it is asked for, and says enough for what the algorithm does with it."""
    if cfg.rollout.engine != "vllm":
        return
    if importlib.util.find_spec("vllm") is None:
        raise ConfigError(
            "rollout.engine is vllm, which is not installed: pip install 'appo[vllm]' (on a CPU see docs/vllm.md), or use "
            "rollout.engine=native"
        )
    needs = not algo.flat and algo.branch_by != "random"
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


def _probe_tasks(cfg: Config) -> None:
    """Draw one task of each split: unknown names, empty or unreadable files show here."""
    for split in ("train", "eval"):
        tasks_of(cfg, split)[0]


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
        tools=tuple(cfg.tools.enabled),
    )


def memory_estimate(p: Plan) -> dict[str, float]:
    """Bytes of the large tensors: engine copy, learner copy, gradients and optimiser of what is trained."""
    width = 2 if p.cfg.model.dtype == "bfloat16" else 4
    weights = p.model.params * width
    trained = p.model.params
    if p.cfg.learner.mode == "lora":
        layers = p.cfg.learner.lora.layers or p.model.layers
        # 7 matrices a layer, (in + out)·r each; in + out ≈ 2.6 hidden on average for this family.
        trained = int(layers * 7 * 2.6 * p.model.hidden * p.cfg.learner.lora.r)
    master = 4 if width == 2 else 0
    kv_bytes = 2 * p.model.layers * _kv_width(p.source.path) * width
    tokens = (
        min(p.cfg.rollout.max_new_tokens * 2, p.model.context)
        * p.algo.rollouts
        * p.cfg.prompts_per_step
    )
    return {
        "engine weights (packed copy included)": 2 * weights,
        "learner weights": weights,
        "gradients and AdamW state": trained * (width + 8 + master),
        "KV cache (if every rollout runs to the limit)": min(
            tokens, p.cfg.rollout.kv_tokens or tokens
        )
        * kv_bytes,
    }


def _kv_width(folder: Path) -> int:
    """Numbers in the key of one token in one layer."""
    c = json.loads((folder / "config.json").read_text())
    head = c.get("head_dim") or c["hidden_size"] // c["num_attention_heads"]
    return head * (c.get("num_key_value_heads") or c["num_attention_heads"])


def card_rows(p: Plan) -> list[tuple[str, str]]:
    """The start-up card: what will happen, in words."""
    cfg, a = p.cfg, p.algo
    per_step = cfg.prompts_per_step * a.rollouts
    size = cfg.prompts_per_step // cfg.minibatches
    trained = (
        "roots only" if a.advantage == "dual_group" and not a.train_branches else "all rollouts"
    )
    memory = memory_estimate(p)
    lora = cfg.learner.lora
    learner = (
        f"LoRA r={lora.r} on the last {lora.layers} layers" if cfg.learner.mode == "lora" and lora.layers
        else f"LoRA r={lora.r}" if cfg.learner.mode == "lora" else "full fine-tuning"
    )  # fmt: skip
    return [
        ("model", f"{p.source.name} ({p.model.params / 1e6:.1f}M parameters, {p.model.arch}, {cfg.model.dtype}; "
                  f"from {p.source.origin})"),
        ("algorithm", f"{a.name}: {a.describe()}; trained: {trained}"),
        ("one step", f"{cfg.prompts_per_step} prompts × {a.rollouts} = {per_step} rollouts, in {cfg.minibatches} "
                     f"mini-batch{'es' if cfg.minibatches > 1 else ''} of {size} prompts; "
                     f"{cfg.steps} steps = {cfg.steps * per_step} rollouts, {cfg.steps * cfg.minibatches} updates"),
        ("limits", f"{cfg.rollout.max_new_tokens} sampled tokens and {cfg.rollout.max_tool_calls} tool calls a rollout"),
        ("learner", f"{learner}, lr {cfg.learner.lr:g}, ZeRO stage {cfg.learner.zero_stage}"),
        ("memory", f"tensors about {sum(memory.values()) / 2**30:.1f} GiB, Python and PyTorch 1 to 2 GiB more (" +
                   ", ".join(f"{k} {v / 2**20:.0f} MiB" for k, v in memory.items()) + ")"),
        ("tools", f"{', '.join(cfg.tools.enabled) or 'none'}; sandbox level: {p.tool_level}"),
        ("threads", f"{p.threads}{' · deterministic mode' if cfg.deterministic else ''}"),
        *([("output", str(p.output))] if p.output != NO_OUTPUT else []),
    ]  # fmt: skip


def card_warnings(p: Plan) -> list[str]:
    """What a user would regret not having been told."""
    out = []
    if p.tool_level == "rlimit":
        out.append(
            "sandbox level rlimit: model-written code can read and write your files. Development only."
        )
    if p.algo.name == "appo" and p.cfg.minibatches < 2 and not p.algo.flat:
        out.append("minibatches=1: all branch points are chosen with unmoved weights, so Omega is 1 everywhere and "
                   "branching falls back to entropy; use minibatches >= 2")  # fmt: skip
    return out


def make_engine(p: Plan) -> Any:
    """The rollout engine of the configuration, with the model loaded."""
    r = p.cfg.rollout
    common: dict[str, Any] = dict(
        dtype=p.cfg.model.dtype,
        max_batch=r.max_batch,
        prefill_chunk=r.prefill_chunk,
        max_context=r.max_context,
    )
    if r.engine == "vllm":
        from appo.rollout.vllm import VLLMEngine

        return VLLMEngine(p.source.path, statistics=r.statistics, **common)
    from appo.rollout.native import NativeEngine

    return NativeEngine(
        p.source.path, deterministic=p.cfg.deterministic, kv_tokens=r.kv_tokens, **common
    )


class Session:
    """Everything that sampling and grading need, loaded: tokenizer, engine, tools, graders. Use as a context manager."""

    def __init__(self, p: Plan, console: Console):
        import torch

        from appo.reward.workers import GraderPool
        from appo.rollout.protocol import TokenText
        from appo.tools.pool import ToolPool

        torch.set_num_threads(p.threads)
        cfg = p.cfg
        self.plan, self.console, self._stack = p, console, ExitStack()
        self.tokenizer = load_tokenizer(p.source.path)
        self.text = TokenText(self.tokenizer, p.model.vocab)
        self.engine = make_engine(p)
        room = self.engine.max_context - cfg.rollout.max_new_tokens
        if room <= 0:
            raise ConfigError(
                f"rollout.max_new_tokens={cfg.rollout.max_new_tokens} leaves no room for a prompt in a context of "
                f"{self.engine.max_context} tokens; lower it"
            )
        self.builder = PromptBuilder(
            self.tokenizer, cfg.data.system, cfg.data.example, max_prompt_tokens=room
        )
        self.pool = ToolPool(_tools(p), workers=cfg.tools.workers, timeout_s=cfg.tools.timeout_s)
        self._stack.callback(self.pool.close)
        self.graders = GraderPool(workers=cfg.reward.workers, timeout_s=cfg.reward.timeout_s)
        self._stack.callback(self.graders.close)
        self.rollouts = self.make_rollouts(cfg.rollout.temperature)

    def make_rollouts(self, temperature: float) -> Any:
        """A sampler at a temperature, on the shared engine and tool pool."""
        from appo.rollout.agent import AgentSettings
        from appo.rollout.tree import Rollouts

        cfg = self.plan.cfg
        settings = AgentSettings(
            max_new_tokens=cfg.rollout.max_new_tokens,
            max_tool_calls=cfg.rollout.max_tool_calls,
            temperature=temperature,
            tools=tuple(cfg.tools.enabled),
        )
        return Rollouts(
            self.engine,
            self.text,
            self.pool,
            settings,
            run_seed=cfg.seed,
            deterministic=cfg.deterministic,
        )

    def grade(self, trees: Sequence[RolloutTree]) -> dict[str, float]:
        """Rewards onto the leaves; → error counters."""
        from appo.rollout.grade import grade_trees

        return grade_trees(trees, self.text.text, self.graders, self.plan.cfg.reward)

    def prompts(self, tasks: Sequence[Task]) -> list[list[int]]:
        """Prompt ids, each checked against the context."""
        return [self.builder.ids(t) for t in tasks]

    def check_prompts(self, most: int = 512) -> None:
        """Render the first prompts of each split, so that one that is too long is found before the first step.

        Too long for the context, or for rollout.kv_tokens.
        """
        longest = 0
        for split in ("train", "eval"):
            source = tasks_of(self.plan.cfg, split)
            wanted = self.plan.cfg.eval.questions if split == "eval" else most
            prompts = self.prompts([source[i] for i in range(min(wanted, most, len(source)))])
            longest = max(longest, *map(len, prompts), 0)
        frame = len(encode_plain(self.tokenizer, result_text("")))
        check_pool(self.plan.cfg, longest, frame, self.engine.max_context)

    def evaluate(self, step: int) -> dict[str, Any]:
        """Accuracy and tool use on the held-out questions."""
        from appo.evals.runner import evaluate_policy

        cfg = self.plan.cfg
        source = tasks_of(cfg, "eval")
        tasks = [source[i] for i in range(min(cfg.eval.questions, len(source)))]
        with self.console.phase(f"evaluating {len(tasks)} questions", len(tasks)) as bar:
            result = evaluate_policy(
                self.make_rollouts(cfg.eval.temperature), tasks, self.prompts(tasks), self.grade,
                on_progress=lambda left: bar.update(len(tasks) - left),
            )  # fmt: skip
        self.last_eval_trees = result.trees
        return {"step": step, "kind": "eval"} | result.metrics

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()


def check_pool(cfg: Config, prompt: int, frame: int, context: int) -> None:
    """One rollout fits rollout.kv_tokens: the longest prompt, all it may sample, and its tool results.

    A result takes about a token per character, and `frame` around it. There is no bound on that (a character can be
    several tokens), so the agent ends a rollout whose results are longer and do not fit. Up to three nodes of a path end
    inside a block: those of a shared prompt, of a prompt, of a root.
    """
    from appo.rollout.native.layout import BLOCK

    limit, r = cfg.rollout.kv_tokens, cfg.rollout
    if limit is None:
        return
    results = r.max_tool_calls * (cfg.tools.python.max_chars + frame) if cfg.tools.enabled else 0
    need = min(prompt + r.max_new_tokens + results, context)
    blocks = -(-need // BLOCK) + 3
    if limit // BLOCK < blocks:
        raise ConfigError(
            f"rollout.kv_tokens is {limit}, but one rollout may need {blocks * BLOCK}: {need} for the longest prompt "
            f"({prompt}), rollout.max_new_tokens={r.max_new_tokens} and rollout.max_tool_calls={r.max_tool_calls} results "
            f"({results}) in a context of {context}, and blocks of {BLOCK} that are not full; use "
            f"rollout.kv_tokens={blocks * BLOCK} or more, or lower tools.python.max_chars or rollout.max_new_tokens"
        )


def _tools(p: Plan) -> dict[str, Any]:
    from appo.tools.python import PythonTool
    from appo.tools.sandbox import SandboxLimits

    out: dict[str, Any] = {}
    t = p.cfg.tools.python
    for name in p.cfg.tools.enabled:
        if name != "python":
            raise ConfigError(f"tools.enabled: {name!r} is not available; this version has: python")
        limits = SandboxLimits(wall_s=t.wall_s, cpu_s=t.cpu_s, memory_mb=t.memory_mb)
        out[name] = PythonTool(p.tool_level, t.allow_unsafe, limits=limits, max_chars=t.max_chars)
    return out
