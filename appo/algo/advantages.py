"""Advantages: how much better each leaf of a group was than its peers, by their rewards.

All of it is float64.

A group whose rewards do not differ says nothing: its advantages are exactly 0, also where the mean
of equal floats is inexact (the spread is compared with a tolerance, never with 0).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

EPS = 1e-6  # added to the standard deviation, as in every published implementation
FLAT = 1e-8  # relative spread below which a group counts as constant
FLAT32 = 1e-6  # the same for rewards that were rounded to float32

F64 = NDArray[np.float64]


def _spread(r: F64, ddof: int, source: np.dtype) -> float:
    """Standard deviation of a group.

    It is exactly 0 for a group that is constant up to rounding of its source dtype.
    """
    if len(r) <= ddof:
        return 0.0
    std = float(np.std(r, ddof=ddof))
    tolerance = FLAT32 if source == np.float32 else FLAT
    return 0.0 if std <= tolerance * max(1.0, float(np.abs(r).max())) else std


def _z(r: F64, mean: float, std: float) -> F64:
    """(R - mean) / (std + 1e-6)."""
    return (r - mean) / (std + EPS)


def standardise(rewards: ArrayLike, *, ddof: int = 0) -> F64:
    """(R - mean) / (std + 1e-6) of one group.

    Exactly 0 where the group is constant or has one member.

    rewards[n] any float dtype → float64[n]. ddof 0: population std (APPO), 1: sample std (GRPO).
    """
    raw = np.asarray(rewards)
    r = raw.astype(np.float64)
    std = _spread(r, ddof, raw.dtype)
    if len(r) < 2 or std == 0.0:
        return np.zeros_like(r)
    return _z(r, float(r.mean()), std)


def group_advantage(
    rewards: ArrayLike,
    groups: Sequence[object] | NDArray,
    *,
    std: Literal["sample", "population", "none"] = "sample",
    singleton: Literal["raw", "zero"] = "raw",
) -> F64:
    """GRPO: rewards[n] standardized inside each group of `groups[n]`.

    std "none" subtracts the mean only (Dr.GRPO). singleton "raw": a group of one keeps R/(1+1e-6),
    or R without std, the convention of verl. Source: DeepSeekMath; verl
    `compute_grpo_outcome_advantage` semantics.
    """
    raw = np.asarray(rewards)
    r = raw.astype(np.float64)
    out = np.zeros_like(r)
    labels = np.asarray([str(g) for g in groups])
    for label in np.unique(labels):
        i = np.flatnonzero(labels == label)
        if len(i) == 1:
            if singleton == "raw":
                out[i] = r[i] if std == "none" else _z(r[i], 0.0, 1.0)
        elif std == "none":
            flat = _spread(r[i], 0, raw.dtype) == 0.0
            out[i] = 0.0 if flat else r[i] - r[i].mean()
        else:
            out[i] = standardise(raw[i], ddof=1 if std == "sample" else 0)
    return out


def dual_group_advantage(root_rewards: ArrayLike, branch_rewards: ArrayLike) -> tuple[F64, F64]:
    """APPO: roots and branches of one prompt standardized separately, population std. →.

    a_root[N], a_branch[K].
    """
    return standardise(root_rewards), standardise(branch_rewards)


def prefix_credit(
    root_rewards: ArrayLike,
    branch_rewards: ArrayLike,
    branch_root: Sequence[int],
    branch_split: Sequence[int],
    lengths: Sequence[int],
    *,
    rule: Literal["sum", "mean", "literal"] = "sum",
) -> list[F64]:
    """A_base of every root token.

    The root's own advantage and that of the branches which share the token.

    `branch_split[k]` is the first response position that branch k drew itself, so it shares root
    tokens t < split and speaks for those only. (The published code keeps the chosen token c and
    resumes after it: split = c + 1, its rule "c ≥ t"; when c itself is drawn again, split = c, and
    the outcome of another choice at c is no credit for c.)

    root_rewards[N], branch_rewards[K]
    branch_root[K]   the root that branch k forked from
    branch_split[K]  its first own position
    lengths[N]       response tokens of each root
    rule             "sum": a_root + mean of the covering branches' a_k; "mean": the average of the
                     two; "literal": the root's reward standardized by both groups' statistics
    Returns float64[length] for each root; a_root where no branch covers t. Paper, Eq. 6.
    """
    a_root, a_branch = dual_group_advantage(root_rewards, branch_rewards)
    if rule == "literal":
        rooted = _literal(np.asarray(root_rewards), np.asarray(branch_rewards), a_root)
        return [np.full(n, rooted[i]) for i, n in enumerate(lengths)]
    out = []
    for i, n in enumerate(lengths):
        total, count = np.zeros(n), np.zeros(n)
        for k, (root, split) in enumerate(zip(branch_root, branch_split, strict=True)):
            if root == i:
                total[:split] += a_branch[k]
                count[:split] += 1
        covered = count > 0
        probe = np.divide(total, count, out=np.zeros(n), where=covered)
        base = a_root[i] + probe
        out.append(np.where(covered, base / 2, base) if rule == "mean" else base)
    return out


def _literal(root: NDArray, branch: NDArray, a_root: F64) -> F64:
    """Eq. 6 by the letter: the mean of a root's z among the roots and its z among the branches."""
    b = branch.astype(np.float64)
    std = _spread(b, 0, branch.dtype) if len(b) > 1 else 0.0
    if std == 0.0:
        return a_root
    return (a_root + _z(root.astype(np.float64), float(b.mean()), std)) / 2
