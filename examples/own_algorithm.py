"""Dr. GRPO in one file: the mean is subtracted, nothing is divided by a deviation, every token
counts alike.

    appo train tiny algo=own_algorithm:DR_GRPO steps=1

Run it in this folder, or with this folder on PYTHONPATH.
"""

from appo.algo.advantages import group_advantage
from appo.algo.algorithm import Algorithm
from appo.algo.credit import reward_of, token_credit
from appo.types import Credit, RolloutTree


def mean_only(tree: RolloutTree, graded: list[int], algo: Algorithm) -> list[Credit]:
    """A = R - mean R over the graded rollouts of the prompt."""
    rewards = [reward_of(tree, leaf) for leaf in graded]
    advantage = group_advantage(rewards, [0] * len(rewards), std="none")
    return [
        token_credit(leaf, tree.trajectory(leaf), float(a))
        for leaf, a in zip(graded, advantage, strict=True)
    ]


DR_GRPO = Algorithm(
    name="dr-grpo",
    advantage=mean_only,
    roots=8,
    clip_high=0.28,
    dual_clip=None,
    aggregate="token-mean",
)
