"""The start-up card of a run.

What will happen, in words, and what its user should know before it does.
"""

from __future__ import annotations

from appo.run.memory import card_row
from appo.run.plan import NO_OUTPUT, Plan
from appo.run.user_code import describe
from appo.tools.table import tool_specs


def card_rows(p: Plan) -> list[tuple[str, str]]:
    """The start-up card: what will happen, in words."""
    cfg, a = p.cfg, p.algo
    per_step = cfg.prompts_per_step * a.rollouts
    size = cfg.prompts_per_step // cfg.minibatches
    trained = (
        "roots only" if a.advantage == "dual_group" and not a.train_branches else "all rollouts"
    )
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
                     f"{cfg.steps} steps = {cfg.steps * per_step} rollouts, {cfg.steps * cfg.minibatches} updates"
                     + (f"; roots drawn {cfg.staleness} step{'s' * (cfg.staleness > 1)} ahead" if cfg.staleness else "")),
        ("limits", f"{cfg.rollout.max_new_tokens} sampled tokens and {cfg.rollout.max_tool_calls} tool calls a rollout"),
        ("learner", f"{learner}, lr {cfg.learner.lr:g}, ZeRO stage {cfg.learner.zero_stage}"),
        card_row(p),
        ("tools", f"{', '.join(tool_specs(cfg.tools)) or 'none'}; sandbox level: {p.tool_level}"),
        *([("imports", describe(list(p.imports)))] if p.imports else []),
        *_rank_rows(p, size),
        ("threads", f"{p.threads}{' per rank' if p.ranks > 1 else ''}{' · deterministic mode' if cfg.deterministic else ''}"),
        *([("output", str(p.output))] if p.output != NO_OUTPUT else []),
    ]  # fmt: skip


def _rank_rows(p: Plan, size: int) -> list[tuple[str, str]]:
    """How the work is dealt; `size` prompts per mini-batch."""
    if p.ranks == 1:
        return []
    each = f"{size // p.ranks}" + (f" or {size // p.ranks + 1}" if size % p.ranks else "")
    return [
        ("ranks", f"{p.ranks}, {p.machine_ranks} on this machine; {each} of the {size} prompts of a mini-batch each, "
                  f"{each} × {p.algo.rollouts} rollouts; a rollout engine, tools and graders each"),
    ]  # fmt: skip


def card_warnings(p: Plan) -> list[str]:
    """What a user would regret not having been told."""
    out = []
    if p.tool_level == "rlimit":
        out.append(
            "sandbox level rlimit: model-written code can read and write your files. Development only."
        )
    if p.algo.has_branches and p.cfg.minibatches < 2 and not p.cfg.staleness:
        out.append("minibatches=1: all branch points are chosen with unmoved weights, so Omega is 1 everywhere and "
                   "branching falls back to entropy; use minibatches >= 2")  # fmt: skip
    size = p.cfg.prompts_per_step // p.cfg.minibatches
    if size % p.ranks:
        out.append(
            f"{size} prompts per mini-batch do not divide by {p.ranks} ranks, so some ranks wait for others; use "
            f"prompts_per_step={-(-size // p.ranks) * p.ranks * p.cfg.minibatches}, or another number of ranks"
        )
    return out
