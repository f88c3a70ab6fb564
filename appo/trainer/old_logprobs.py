"""Log-probs of roots under the weights at the start of a step, by the learner itself: what its ratios are taken against.

The engine records a log-prob with every token that it draws, but it is another implementation: in bfloat16 the two differ
by 0.02 a token for the same weights. A ratio of learner to engine would hold that difference beside what an update
moved; a ratio of learner to learner holds what was moved alone. How far the drawing policy was from the old log-prob is then
the business of a weight (`appo.algo.objective`).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from appo.packing.pack import node_values, pack
from appo.trainer.protocols import MinibatchLearner
from appo.types import Credit, RolloutTree


def set_old_logp(
    trees: Sequence[RolloutTree], learner: MinibatchLearner, token_budget: int
) -> None:
    """Write `old_logp` on every node that the policy drew on the way to a root's end. One forward, no gradient.

    It stands at the node, not at a row: whatever rows are trained later, cut or moved between ranks, a token carries
    its own. Nodes of branches, which are drawn by current weights, get none. Collective: all ranks call it, with no
    trees if they have none.
    """
    rows = [[_whole(tree, leaf) for leaf in tree.roots] for tree in trees]
    batches = pack(trees, rows, token_budget=token_budget, keep_all=True)
    values = node_values(batches, learner.old_logprobs(batches), trees)
    for tree, by_node in zip(trees, values, strict=True):
        for index, found in by_node.items():
            if tree.nodes[index].sampled:
                tree.nodes[index].old_logp = found.tolist()


def _whole(tree: RolloutTree, leaf: int) -> Credit:
    """All that the policy drew of a leaf, with nothing to learn from it."""
    view = tree.trajectory(leaf)
    return Credit(leaf, np.zeros(len(view)), view.mask)
