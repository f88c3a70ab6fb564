"""An algorithm of your own: Dr. GRPO subtracts the mean and divides by no deviation.

    cd examples
    appo train tiny steps=1 prompts_per_step=4 eval.questions=16 algo=own_algorithm:DR_GRPO

Every token counts alike (`aggregate`).
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
