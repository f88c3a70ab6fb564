"""A tree in the making: its record, the engine handles of its lines, and how both come back after a restart."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from appo.errors import DataError
from appo.observability.codec import decode, encode, tree_from_json, tree_to_json
from appo.rollout.agent import Line, State
from appo.rollout.engine import RolloutEngine
from appo.types import RolloutTree


@dataclass
class Growth:
    """A tree in the making and the engine handles of its roots (kept until its branches are forked)."""

    tree: RolloutTree
    prompt_seq: int
    roots: list[Line] = field(default_factory=list)
    branches: list[Line] = field(default_factory=list)
    copy: int = 0  # the same task may come twice in a step; it must not draw the same noise
    baseline: dict[int, np.ndarray] = field(default_factory=dict)  # see `Rollouts.remember`

    @property
    def roots_done(self) -> bool:
        return all(line.state is State.DONE for line in self.roots)


def growth_to_json(g: Growth) -> dict[str, Any]:
    """A growth whose roots are done and whose branches are not forked yet, as JSON types.

    Raises DataError for a task that would not come back as it is.
    """
    assert g.roots_done and not g.branches, "only roots that wait for their branches can be saved"
    tree = tree_to_json(g.tree)
    if '"$repr"' in json.dumps(tree["task"]):
        raise DataError(
            f"task {g.tree.task.task_id!r} holds a value that JSON cannot say, so its roots cannot be saved with a "
            "checkpoint; give tasks of text, numbers, lists and mappings, or use staleness=0"
        )
    baseline = [encode(g.baseline[x.seq]) for x in g.roots] if g.baseline else None
    return {"tree": tree, "copy": g.copy, "baseline": baseline}


def growth_from_json(
    data: dict[str, Any], engine: RolloutEngine, seed_of: Callable[[Growth, tuple[int, ...]], int]
) -> Growth:
    """The growth again, in an engine that knows nothing of it.

    Its sequences get the cuts they had (prompt, then root): in deterministic mode sums follow the cuts. Their KV is
    computed when they are scored, or when a branch needs it.
    """
    tree = tree_from_json(data["tree"])
    g = Growth(tree, engine.add_prompt(tree.nodes[0].token_ids), copy=data["copy"])
    for leaf in tree.roots:
        view = tree.trajectory(leaf)
        seq = engine.fork(g.prompt_seq, tree.prompt_len)
        if len(view):
            engine.append(seq, view.response_ids.tolist())
        seed = seed_of(g, tree.nodes[tree.leaves[leaf].node].path)
        line = Line(tree, leaf, seq, seed, sampled=int(view.mask.sum()), state=State.DONE)
        g.roots.append(line)
    if data["baseline"] is not None:
        values = zip(g.roots, data["baseline"], strict=True)
        g.baseline = {line.seq: decode(v) for line, v in values}
    return g
