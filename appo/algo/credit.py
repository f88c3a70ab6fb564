"""From rewarded trees to what the learner trains on: per-token advantages, loss masks and the global denominators."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from appo.algo.advantages import group_advantage, prefix_credit, standardise
from appo.algo.presets import Algorithm
from appo.types import Counts, Credit, RolloutTree, Trajectory


@dataclass(frozen=True)
class MiniBatchCredit:
    """`credits[i]` are the trained rows of tree i; rows whose advantage is 0 everywhere are left out, but counted."""

    credits: list[list[Credit]]
    counts: Counts
    zero_groups: int  # prompts without any signal
    ungraded: int  # leaves left out because their grader failed


def assign(
    trees: Sequence[RolloutTree], algo: Algorithm, *, keep_all: bool = False
) -> MiniBatchCredit:
    """Advantages for every trained leaf of a mini-batch. keep_all: also rows without any (for an entropy bonus).

    A leaf without reward (its grader failed) is in no group and is not trained. Denominators follow the algorithm's
    definition over all graded leaves, so dropping zero rows does not change the gradient of the policy term.
    """
    kept: list[list[Credit]] = []
    tokens = rows = rollouts = 0
    zero_groups = ungraded = 0
    for tree in trees:
        graded = [i for i, leaf in enumerate(tree.leaves) if leaf.reward is not None]
        ungraded += len(tree.leaves) - len(graded)
        rule = _dual_group if algo.advantage == "dual_group" else _group
        credits = rule(tree, graded, algo)
        signal = [c for c in credits if np.any(c.advantage[c.loss_mask])]
        zero_groups += not signal
        kept.append(credits if keep_all else signal)
        tokens += sum(int(c.loss_mask.sum()) for c in credits)
        rows += len(credits)
        rollouts += len(graded)
    return MiniBatchCredit(kept, Counts(tokens, rows, rollouts), zero_groups, ungraded)


def _credit(leaf: int, view: Trajectory, advantage: np.ndarray, trained_from: int = 0) -> Credit:
    mask = view.mask.copy()
    mask[:trained_from] = False
    return Credit(leaf, np.where(mask, advantage, 0.0), mask)


def _group(tree: RolloutTree, graded: list[int], algo: Algorithm) -> list[Credit]:
    """GRPO: every leaf against all leaves of its prompt."""
    rewards = [_reward(tree, i) for i in graded]
    advantage = group_advantage(rewards, [0] * len(graded), std="sample")
    views = [tree.trajectory(i) for i in graded]
    return [
        _credit(i, v, np.full(len(v), a)) for i, v, a in zip(graded, views, advantage, strict=True)
    ]


def _dual_group(tree: RolloutTree, graded: list[int], algo: Algorithm) -> list[Credit]:
    """APPO: roots are trained with their own advantage and that of the branches which probe their prefix."""
    roots = [i for i in graded if tree.leaves[i].is_root]
    branches = [
        i for i in graded if not tree.leaves[i].is_root and tree.leaves[i].parent_leaf in roots
    ]
    views = [tree.trajectory(i) for i in roots]
    branch_rewards = [_reward(tree, i) for i in branches]
    base = prefix_credit(
        [_reward(tree, i) for i in roots],
        branch_rewards,
        [roots.index(_parent(tree, i)) for i in branches],
        [_split(tree, i) for i in branches],
        [len(v) for v in views],
        rule=algo.credit,
    )
    credits = [_credit(i, v, a) for i, v, a in zip(roots, views, base, strict=True)]
    if algo.train_branches:
        # An extension: each branch token it drew itself, with the branch's own advantage.
        for i, a in zip(branches, standardise(branch_rewards), strict=True):
            view = tree.trajectory(i)
            credits.append(_credit(i, view, np.full(len(view), a), trained_from=_split(tree, i)))
    return credits


def _reward(tree: RolloutTree, leaf: int) -> float:
    reward = tree.leaves[leaf].reward
    assert reward is not None
    return reward


def _parent(tree: RolloutTree, leaf: int) -> int:
    parent = tree.leaves[leaf].parent_leaf
    assert parent is not None
    return parent


def _split(tree: RolloutTree, leaf: int) -> int:
    split = tree.leaves[leaf].split
    assert split is not None
    return split
