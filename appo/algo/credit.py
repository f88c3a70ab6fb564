"""From rewarded trees to what the learner trains on.

per-token advantages, loss masks and the global denominators.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from appo.algo.algorithm import Algorithm
from appo.errors import ConfigError
from appo.types import Counts, Credit, RolloutTree, Trajectory


@dataclass(frozen=True)
class MiniBatchCredit:
    """`credits[i]` are the trained rows of tree i.

    Rows whose advantage is 0 everywhere are left out, but counted.
    """

    credits: list[list[Credit]]
    counts: Counts
    zero_groups: int  # prompts without any signal
    ungraded: int  # leaves left out because their grader failed


def assign(
    trees: Sequence[RolloutTree], algo: Algorithm, *, keep_all: bool = False
) -> MiniBatchCredit:
    """Advantages for every trained leaf of a mini-batch.

    keep_all: also rows without any (for an entropy bonus).

    A leaf without reward (its grader failed) is in no group and is not trained. Denominators follow
    the algorithm's definition over all graded leaves, so dropping zero rows does not change the
    gradient of the policy term.
    """
    kept: list[list[Credit]] = []
    tokens = rows = rollouts = 0
    zero_groups = ungraded = 0
    for tree in trees:
        graded = [i for i, leaf in enumerate(tree.leaves) if leaf.reward is not None]
        ungraded += len(tree.leaves) - len(graded)
        credits = algo.advantage(tree, graded, algo)
        _check_credits(credits, graded, algo.name)
        signal = [c for c in credits if np.any(c.advantage[c.loss_mask])]
        zero_groups += not signal
        kept.append(credits if keep_all else signal)
        tokens += sum(int(c.loss_mask.sum()) for c in credits)
        rows += len(credits)
        rollouts += len(graded)
    return MiniBatchCredit(kept, Counts(tokens, rows, rollouts), zero_groups, ungraded)


def _check_credits(credits: Any, graded: Sequence[int], name: str) -> None:
    """Refuse what the learner could not read, or would train twice. Raises ConfigError."""
    if not isinstance(credits, list) or not all(isinstance(c, Credit) for c in credits):
        kinds = sorted({type(c).__name__ for c in credits}) if isinstance(credits, list) else []
        found = f"a list of {', '.join(kinds)}" if kinds else type(credits).__name__
        raise ConfigError(f"the advantage rule of {name!r} returned {found}; return list[Credit]")
    leaves = [c.leaf for c in credits]
    if len(set(leaves)) < len(leaves) or not set(leaves) <= set(graded):
        raise ConfigError(
            f"the advantage rule of {name!r} returned credits for the leaves {leaves}, of the graded "
            f"leaves {list(graded)}; return at most one Credit for each of them"
        )


def token_credit(
    leaf: int, view: Trajectory, advantage: NDArray[np.float64] | float, trained_from: int = 0
) -> Credit:
    """The credit of one trained leaf: `advantage` on the tokens that the policy drew, 0 elsewhere.

    advantage: one number, or one per response position; trained_from: the first position that is
    trained.
    """
    mask = view.mask.copy()
    mask[:trained_from] = False
    return Credit(leaf, np.where(mask, advantage, 0.0), mask)


def reward_of(tree: RolloutTree, leaf: int) -> float:
    """The reward of a graded leaf."""
    reward = tree.leaves[leaf].reward
    assert reward is not None, f"leaf {leaf} was not graded"
    return reward
