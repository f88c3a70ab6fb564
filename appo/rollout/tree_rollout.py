"""A tree in the making.

Its record, the engine handles of its rollouts, and how both come back after a restart.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from appo.errors import DataError
from appo.observability.codec import decode, encode, tree_from_json, tree_to_json
from appo.observability.renamed import ROOTS, in_todays_words
from appo.rollout.agent import ActiveRollout, RolloutState
from appo.rollout.engine import RolloutEngine
from appo.types import RolloutTree


@dataclass
class TreeRollout:
    """A tree in the making and the engine handles of its roots.

    Kept until its branches are forked.
    """

    tree: RolloutTree
    prompt_seq: int
    roots: list[ActiveRollout] = field(default_factory=list)
    branches: list[ActiveRollout] = field(default_factory=list)
    copy: int = 0  # the same task may come twice in a step; it must not draw the same noise
    reference_logp: dict[int, np.ndarray] = field(
        default_factory=dict
    )  # see `Rollouts.score_reference`

    @property
    def roots_done(self) -> bool:
        """Whether every root has ended, so that branches may be chosen."""
        return all(rollout.state is RolloutState.DONE for rollout in self.roots)


def tree_rollout_to_json(g: TreeRollout) -> dict[str, Any]:
    """A tree rollout whose roots are done and whose branches are not forked yet, as JSON types.

    Raises DataError for a task that would not come back as it is.
    """
    assert g.roots_done and not g.branches, "only roots that wait for their branches can be saved"
    tree = tree_to_json(g.tree)
    if '"$repr"' in json.dumps(tree["task"]):
        raise DataError(
            f"task {g.tree.task.task_id!r} holds a value that JSON cannot say, so its roots cannot be saved with a "
            "checkpoint; give tasks of text, numbers, lists and mappings, or use staleness=0"
        )
    reference_logp = (
        [encode(g.reference_logp[x.seq]) for x in g.roots] if g.reference_logp else None
    )
    return {"tree": tree, "copy": g.copy, "reference_logp": reference_logp}


def tree_rollout_from_json(
    data: dict[str, Any],
    engine: RolloutEngine,
    seed_of: Callable[[TreeRollout, tuple[int, ...]], int],
) -> TreeRollout:
    """The tree rollout again, in an engine that knows nothing of it.

    Its sequences get the cuts they had (prompt, then root): in deterministic mode sums follow the
    cuts. Their KV is computed when they are scored, or when a branch needs it.
    """
    tree = tree_from_json(data["tree"])
    g = TreeRollout(tree, engine.add_prompt(tree.nodes[0].token_ids), copy=data["copy"])
    for leaf in tree.roots:
        view = tree.trajectory(leaf)
        seq = engine.fork(g.prompt_seq, tree.prompt_len)
        if len(view):
            engine.append(seq, view.response_ids.tolist())
        seed = seed_of(g, tree.nodes[tree.leaves[leaf].node].path)
        rollout = ActiveRollout(
            tree, leaf, seq, seed, sampled=int(view.mask.sum()), state=RolloutState.DONE
        )
        g.roots.append(rollout)
    reference = in_todays_words(data, ROOTS)["reference_logp"]
    if reference is not None:
        values = zip(g.roots, reference, strict=True)
        g.reference_logp = {rollout.seq: decode(v) for rollout, v in values}
    return g
