"""From rewarded trees to what the learner trains on.

per-token advantages, loss masks and the global denominators.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from appo.algo.algorithm import Algorithm
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
        signal = [c for c in credits if np.any(c.advantage[c.loss_mask])]
        zero_groups += not signal
        kept.append(credits if keep_all else signal)
        tokens += sum(int(c.loss_mask.sum()) for c in credits)
        rows += len(credits)
        rollouts += len(graded)
    return MiniBatchCredit(kept, Counts(tokens, rows, rollouts), zero_groups, ungraded)


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
