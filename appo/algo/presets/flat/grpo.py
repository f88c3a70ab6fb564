"""GRPO: every rollout against all rollouts of its prompt. docs/algorithms.md, section 9.

DeepSeekMath, section 4.1.
"""

from __future__ import annotations

from appo.algo.advantages import group_advantage
from appo.algo.algorithm import Algorithm
from appo.algo.credit import reward_of, token_credit
from appo.types import Credit, RolloutTree


def group_credit(tree: RolloutTree, graded: list[int], algo: Algorithm) -> list[Credit]:  # noqa: ARG001
    """A = (R - mean R) / (std R + 1e-6) over the graded leaves.

    It is the same on every token that the leaf drew.
    """
    rewards = [reward_of(tree, i) for i in graded]
    advantage = group_advantage(rewards, [0] * len(graded), std="sample")
    return [
        token_credit(i, tree.trajectory(i), float(a))
        for i, a in zip(graded, advantage, strict=True)
    ]


GRPO = Algorithm(
    name="grpo",
    advantage=group_credit,
    roots=16,
    clip_low=0.2,
    clip_high=0.2,
    dual_clip=3.0,
    aggregate="token-mean",
)
