"""APPO: branches probe the prefixes of roots, and roots are trained.

See docs/algorithms.md, sections 3 to 5; the paper.
"""

from __future__ import annotations

from appo.algo.advantages import prefix_credit, standardise
from appo.algo.algorithm import Algorithm
from appo.algo.credit import reward_of, token_credit
from appo.types import Credit, RolloutTree


def dual_group_credit(tree: RolloutTree, graded: list[int], algo: Algorithm) -> list[Credit]:
    """A_base of Eq. 6: a root's own advantage and that of the branches which share the token.

    A branch whose root was not graded is left out. train_branches: branches too, each token that a
    branch drew itself with the branch's own advantage b_k (an extension of ours).
    """
    roots = [i for i in graded if tree.leaves[i].is_root]
    branches = [
        i for i in graded if not tree.leaves[i].is_root and tree.leaves[i].parent_leaf in roots
    ]
    views = [tree.trajectory(i) for i in roots]
    branch_rewards = [reward_of(tree, i) for i in branches]
    base = prefix_credit(
        [reward_of(tree, i) for i in roots],
        branch_rewards,
        [roots.index(_parent(tree, i)) for i in branches],
        [_split(tree, i) for i in branches],
        [len(v) for v in views],
        rule=algo.credit,
    )
    credits = [token_credit(i, v, a) for i, v, a in zip(roots, views, base, strict=True)]
    if algo.train_branches:
        for i, a in zip(branches, standardise(branch_rewards), strict=True):
            view, split = tree.trajectory(i), _split(tree, i)
            credits.append(token_credit(i, view, float(a), trained_from=split))
    return credits


def _parent(tree: RolloutTree, leaf: int) -> int:
    parent = tree.leaves[leaf].parent_leaf
    assert parent is not None
    return parent


def _split(tree: RolloutTree, leaf: int) -> int:
    split = tree.leaves[leaf].split
    assert split is not None
    return split


APPO = Algorithm(
    name="appo",
    advantage=dual_group_credit,
    advantage_keys=("credit", "train_branches"),
    fewest_roots=2,
    roots=4,
    branches=3,
    future_weight=0.5,
    clip_high=0.28,
    dual_clip=None,
    aggregate="rollout-mean",
)
