"""Random trees with every kind of fork, and the gradient of their rows trained one by one.

The gradient is written out from the definition.

Nothing here knows of packing, of tree attention or of the fused kernels: a row is a sequence of its
own, its loss a few lines.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch
from support import tiny_models
from torch import Tensor, nn

from appo.algo.algorithm import Algorithm
from appo.types import Credit, Leaf, Node, RolloutTree, Task, Trajectory

NOW = 7  # the policy version under training
# Log-ratios to what the tokens were drawn with: inside the clip range, beyond either bound, beyond
# the dual clip. Far from the bounds, so that rounding moves no token across.
RATIOS = (-0.8, 0.0, 0.65, 1.8)


DRIFTS = (
    -0.5,
    0.0,
    0.4,
    1.5,
)  # old log-prob less behavior, where there are old log-probs; the last is beyond the cap


class Loss(NamedTuple):
    """What a mini-batch is trained with. old log-probs: of an earlier version.

    "now": of the version under training.
    """

    algo: Algorithm
    entropy_coef: float = 0.0
    temperature: float = 1.0
    old_logprobs: Literal["none", "old", "now"] = "none"
    importance_cap: float | None = 2.0


# -- trees


def random_tree(rng: np.random.Generator, name: str) -> RolloutTree:
    """Three roots, one of them a single run.

    The others are chains of a model's, a tool's and again the model's tokens.

    Each has a fork after its first token, one before its last, one anywhere, then forks of forks of
    forks: branches at a depth of three and more, with tool spans in them. A branch is graded like a
    root.
    """
    tree = RolloutTree(Task(name, [], None), [_prompt(rng)])
    for root in range(3):
        end = _grow(tree, rng, 0, tree.prompt_len, "m" if root == 1 else "mtm")
        trunk = len(tree.leaves)
        tree.leaves.append(Leaf(end, root, reward=float(rng.normal())))
        _branch(tree, rng, trunk, "first")
        _branch(tree, rng, trunk, "last")
        above = trunk
        for _ in range(3):
            above = _branch(tree, rng, above, "anywhere")
    return tree


def _prompt(rng: np.random.Generator) -> Node:
    return Node(None, "prompt", 0, _ids(rng, int(rng.integers(2, 6))))


def _ids(rng: np.random.Generator, count: int) -> list[int]:
    return rng.integers(0, tiny_models.VOCAB, count).tolist()


def _grow(
    tree: RolloutTree, rng: np.random.Generator, parent: int, fork_at: int, roles: str
) -> int:
    """A chain of single children; the number of its last node."""
    for role in roles:
        count = int(rng.integers(2, 7))
        if role == "m":
            version = int(rng.choice([NOW - 2, NOW]))
            node = Node(parent, "model", fork_at, _ids(rng, count), policy_version=version)
            node.entropy = [1.0] * count
        else:
            node = Node(parent, "tool", fork_at, _ids(rng, count))
        tree.nodes.append(node)
        parent, fork_at = len(tree.nodes) - 1, count
    return parent


def _branch(tree: RolloutTree, rng: np.random.Generator, parent: int, where: str) -> int:
    """A branch of the leaf `parent`; the number of the new leaf."""
    path, node = [], tree.leaves[parent].node
    take = len(tree.nodes[node].token_ids)
    while node:  # up to the prompt
        path.append((node, take))
        node, take = tree.nodes[node].parent, tree.nodes[node].fork_at
    path = path[::-1]
    models = [at for at in path if tree.nodes[at[0]].role == "model"]
    node, take = {"first": path[0], "last": path[-1]}.get(where) or models[
        int(rng.integers(len(models)))
    ]
    fork_at = {"first": 1, "last": take - 1}.get(where) or int(rng.integers(1, take + 1))
    split = sum(n for i, n in path[: path.index((node, take))]) + fork_at
    end = _grow(tree, rng, node, fork_at, str(rng.choice(["m", "mtm"])))
    root = tree.leaves[parent].root
    tree.leaves.append(Leaf(end, root, len(tree.leaves), parent, split, reward=float(rng.normal())))
    return len(tree.leaves) - 1


@torch.no_grad()
def drawn_by(
    lm: nn.Module, trees: Sequence[RolloutTree], rng: np.random.Generator, loss: Loss
) -> None:
    """Give sampled tokens an old log-prob and a behavior.

    The old one is the model's log-prob less one of RATIOS, the behavior is off it by one of DRIFTS;
    without old log-probs it is the behavior that is off by RATIOS. Tokens of the version NOW have
    any.
    """
    for tree in trees:
        for i, node in enumerate(tree.nodes):
            if not node.sampled:
                continue
            ids = torch.tensor(tree.path_ids(i))
            logits = lm(ids[None], use_cache=False).logits[0, :-1].double() / loss.temperature
            logp = logits.log_softmax(-1).gather(1, ids[1:, None])[-len(node.token_ids) :, 0]
            old_logp = logp.numpy() - rng.choice(RATIOS, len(logp))
            node.logprobs, node.old_logp = old_logp.tolist(), None
            if loss.old_logprobs != "none":
                node.logprobs = (old_logp - rng.choice(DRIFTS, len(logp))).tolist()
                node.old_logp = old_logp.tolist()


def in_float64(lm: nn.Module) -> nn.Module:
    """The same in float64 throughout.

    transformers' norms round to float32 in whatever dtype they are called, ours do not.
    """

    def norm(self: nn.Module, x: Tensor) -> Tensor:
        return self.weight * x * (x.square().mean(-1, keepdim=True) + self.variance_epsilon).rsqrt()

    for module in lm.double().modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = functools.partial(norm, module)
    return lm


# -- one by one


def one_by_one(
    lm: nn.Module,
    trees: Sequence[RolloutTree],
    credits: Sequence[Sequence[Credit]],
    loss: Loss,
) -> dict[str, Tensor]:
    """Gradients, float64, of the loss over all rows, each a sequence of its own.

    Denominators counted here.

    Rows are filled up at their right end: nothing before it sees what stands there.
    """
    rows = [
        (tree.trajectory(c.leaf), c) for tree, own in zip(trees, credits, strict=True) for c in own
    ]
    every = sum(int(c.loss_mask.sum()) for _, c in rows)
    graded = sum(len(tree.leaves) for tree in trees)
    ids = [torch.from_numpy(view.token_ids) for view, _ in rows]
    logits = lm(nn.utils.rnn.pad_sequence(ids, batch_first=True), use_cache=False).logits
    total = torch.zeros((), dtype=torch.float64)
    for own_logits, (view, credit) in zip(logits, rows, strict=True):
        row = row_loss(own_logits[: len(view.token_ids) - 1].double(), view, credit, loss)
        own = int(credit.loss_mask.sum())
        if loss.algo.aggregate == "token-mean":
            total = total + row / every
        elif own:
            groups = len(rows) if loss.algo.aggregate == "seq-mean-token-mean" else graded
            total = total + row / own / groups
    return gradients(lm, total)


def row_loss(logits: Tensor, view: Trajectory, credit: Credit, loss: Loss) -> Tensor:
    """Σ over the trained tokens of one sequence, from the definition. logits[P+T-1, V]."""
    algo = loss.algo
    every = (logits / loss.temperature).log_softmax(-1)[view.prompt_len - 1 :]
    logp = every.gather(1, torch.from_numpy(view.response_ids)[:, None])[:, 0]
    mask = torch.from_numpy(np.asarray(credit.loss_mask))
    fresh = torch.from_numpy(view.version) == NOW
    behavior_logp, old_logp = (torch.from_numpy(x).double() for x in (view.logprobs, view.old_logp))
    old_logp = torch.where(fresh | (loss.old_logprobs == "now"), logp.detach(), old_logp)
    advantage = torch.from_numpy(credit.advantage.astype(np.float32)).double()
    if loss.importance_cap is not None:
        importance = (old_logp - behavior_logp).exp().clamp(max=loss.importance_cap)
        advantage *= torch.where(fresh, 1.0, importance)
    d = torch.where(mask, logp - old_logp, 0.0)
    ahead, scale, (low, high) = 0.0, [], algo.future_clip
    for now in reversed(d.tolist()):
        ahead = now + algo.gamma * ahead
        scale.append(1 + algo.future_weight * min(max(math.exp(ahead), low), high))
    advantage *= torch.tensor(scale[::-1], dtype=torch.float64)
    ratio = d.exp()
    bounded = ratio.clamp(1 - algo.clip_low, 1 + algo.clip_high)
    surrogate = torch.maximum(-advantage * ratio, -advantage * bounded)
    if algo.dual_clip is not None:
        least = torch.minimum(surrogate, -advantage * algo.dual_clip)
        surrogate = torch.where(advantage < 0, least, surrogate)
    entropy = -(every.exp() * every).sum(-1)
    return torch.where(mask, surrogate - loss.entropy_coef * entropy, 0.0).sum()


def gradients(lm: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    lm.zero_grad()
    loss.backward()
    return {name: p.grad.double() for name, p in lm.named_parameters() if p.grad is not None}


def distance(got: dict[str, Tensor], want: dict[str, Tensor]) -> float:
    """Relative L2 over all weights."""
    assert got.keys() == want.keys()
    return math.sqrt(
        sum(float((got[n] - w).square().sum()) for n, w in want.items())
        / sum(float(w.square().sum()) for w in want.values())
    )
