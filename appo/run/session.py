"""What sampling and grading need, put together from a checked plan: engine, tools, rollouts, graders.

`appo.run.plan` finds every mistake that can be found without loading a model; `Session` loads; `appo.run.build`
adds what learning needs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Literal, cast

from appo.config import Config
from appo.data.prompts import PromptBuilder, encode_plain, result_text
from appo.dist.ranks import Ranks
from appo.errors import ConfigError
from appo.models.resolve import load_tokenizer
from appo.observability.progress import Console
from appo.run.plan import Plan, tasks_of
from appo.tools.base import ToolSpec
from appo.tools.table import TOOLS, tool_specs
from appo.types import RolloutTree, Task

if TYPE_CHECKING:  # it loads torch, and a mistake of the user is found sooner without
    from appo.rollout.native import NativeEngine
    from appo.rollout.sampler import Rollouts
    from appo.rollout.vllm import VLLMEngine

Level = Literal["auto", "strict", "landlock", "rlimit"]


def make_engine(p: Plan) -> NativeEngine | VLLMEngine:
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

        kv_bytes = None
        if r.kv_tokens is not None:  # else vLLM takes nearly all of the device's memory
            width = 2 if p.cfg.model.dtype == "bfloat16" else 4
            kv_bytes = r.kv_tokens * 2 * p.model.layers * p.model.kv_dim * width
        return VLLMEngine(p.source.path, statistics=r.statistics, kv_bytes=kv_bytes, **common)
    from appo.rollout.native import NativeEngine

    return NativeEngine(
        p.source.path,
        deterministic=p.cfg.deterministic,
        kv_tokens=r.kv_tokens,
        family=p.family,
        **common,
    )


class Session:
    """Everything that sampling and grading need, loaded: tokenizer, engine, tools, graders. Use as a context manager.

    Every rank has its own. Making one is not collective; `evaluate` is.
    """

    def __init__(self, p: Plan, console: Console, ranks: Ranks | None = None):
        import torch

        from appo.reward.workers import GraderPool
        from appo.rollout.tags import TokenText
        from appo.tools.pool import ToolPool

        torch.set_num_threads(p.threads)
        cfg = p.cfg
        self.plan, self.console, self.ranks = p, console, ranks or Ranks()
        self._stack = ExitStack()
        self.tokenizer = load_tokenizer(p.source.path)
        self.text = TokenText(self.tokenizer, p.model.vocab)
        self.engine = make_engine(p)
        room = self.engine.max_context - cfg.rollout.max_new_tokens
        if room <= 0:
            raise ConfigError(
                f"rollout.max_new_tokens={cfg.rollout.max_new_tokens} leaves no room for a prompt in a context of "
                f"{self.engine.max_context} tokens; lower it"
            )
        specs = _tool_specs(p)
        self.builder = PromptBuilder(
            self.tokenizer,
            cfg.data.system,
            cfg.data.example,
            max_prompt_tokens=room,
            tools=specs,
        )
        tools = {name: spec.make() for name, spec in specs.items()}
        self.pool = ToolPool(tools, workers=cfg.tools.workers, timeout_s=cfg.tools.timeout_s)
        self._stack.callback(self.pool.close)
        self.graders = GraderPool(workers=cfg.reward.workers, timeout_s=cfg.reward.timeout_s)
        self._stack.callback(self.graders.close)
        self.rollouts = self.make_rollouts(cfg.rollout.temperature)

    def make_rollouts(self, temperature: float) -> Rollouts:
        """A sampler at a temperature, on the shared engine and tool pool."""
        from appo.rollout.agent import AgentSettings
        from appo.rollout.sampler import Rollouts

        cfg = self.plan.cfg
        settings = AgentSettings(
            max_new_tokens=cfg.rollout.max_new_tokens,
            max_tool_calls=cfg.rollout.max_tool_calls,
            temperature=temperature,
            tools=tuple(tool_specs(cfg.tools)),
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

    def evaluate(
        self, step: int, on_progress: Callable[[int], None] = lambda left: None
    ) -> dict[str, Any]:
        """Accuracy and tool use on the held-out questions, over all ranks; → metrics record. Collective."""
        from appo.run.evaluate import evaluate_policy

        cfg = self.plan.cfg
        source = tasks_of(cfg, "eval")
        tasks = [source[i] for i in range(min(cfg.eval.questions, len(source)))]
        mine = len(tasks[self.ranks.rank :: self.ranks.world])
        with self.console.phase(f"evaluating {len(tasks)} questions", mine) as bar:

            def progress(left: int) -> None:
                bar.update(mine - left)
                on_progress(left)

            result = evaluate_policy(
                self.make_rollouts(cfg.eval.temperature), tasks, self.prompts(tasks), self.grade,
                on_progress=progress, ranks=self.ranks,
            )  # fmt: skip
        return {"step": step, "kind": "eval"} | result.metrics

    def describe(self) -> dict[str, str]:
        """What is under way, for the watchdog: which ranks, tools and graders are waited for. From any thread."""
        return {
            "collective": self.ranks.waiting or "none",
            "tool calls": self.pool.describe(),
            "graders": self.graders.describe(),
        }

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
    from appo.rollout.native.tree.block_list import BLOCK

    limit, r = cfg.rollout.kv_tokens, cfg.rollout
    if limit is None:
        return
    outputs = {name: spec.max_chars for name, spec in tool_specs(cfg.tools).items()}
    longest = max(outputs, key=lambda name: outputs[name], default="")
    results = r.max_tool_calls * (outputs[longest] + frame) if outputs else 0
    need = min(prompt + r.max_new_tokens + results, context)
    blocks = -(-need // BLOCK) + 3
    if limit // BLOCK < blocks:
        raise ConfigError(
            f"rollout.kv_tokens is {limit}, but one rollout may need {blocks * BLOCK}: {need} for the longest prompt "
            f"({prompt}), rollout.max_new_tokens={r.max_new_tokens} and rollout.max_tool_calls={r.max_tool_calls} results "
            f"({results}) in a context of {context}, and blocks of {BLOCK} that are not full; use "
            f"rollout.kv_tokens={blocks * BLOCK} or more, or lower {_max_chars_of(longest)} or rollout.max_new_tokens"
        )


def _max_chars_of(tool: str) -> str:
    """Where the user sets how long the output of a tool is."""
    return f"tools.{tool}.max_chars" if tool in TOOLS else f"max_chars of the tool {tool}"


def _tool_specs(p: Plan) -> dict[str, ToolSpec]:
    """The enabled tools, with the sandbox level that the plan has found to work."""
    cfg, python = p.cfg.tools, p.cfg.tools.python
    if "python" in cfg.enabled:
        python = dataclasses.replace(python, level=cast("Level", p.tool_level))
    return tool_specs(dataclasses.replace(cfg, python=python))
