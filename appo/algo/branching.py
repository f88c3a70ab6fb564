"""Where to branch: from the statistics of a prompt's roots to distinct positions, best first.

The numbers (Ω, z-scores, top-k with defined ties) are kernels; this module decides which positions
may be chosen at all and lays the `branch_by` ablations over the same selection. Source: paper, Eq.
5; docs/algorithms.md, section 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch

from appo.algo.algorithm import Algorithm
from appo.kernels import branch_scores, select_branch_points
from appo.types import Trajectory

RULES = {0: "strict", 1: "entropy", 2: "random"}


@dataclass(frozen=True)
class BranchPoint:
    """Root number `root` is re-drawn at response position `position`."""

    root: int
    position: int
    score: float
    rule: str  # "strict" | "entropy" | "random"
    z_entropy: float
    z_omega: float


@dataclass(frozen=True)
class BranchPlan:
    """points ordered by root, then rank · omega_uninformative[N].

    Ω said nothing for this root · shortfall: slots left empty.
    """

    points: list[BranchPoint]
    omega_uninformative: list[bool]
    shortfall: int


def eligible_positions(
    view: Trajectory, closes_call: np.ndarray, drawable: np.ndarray, room: int
) -> np.ndarray:
    """Where a branch may start, bool[T].

    Sampled, not blank or EOS (`drawable[V]` by id), not the token that ends a tool call, with room
    left.

    room: tokens a branch may still sample if it re-draws the first sampled token (the whole
    budget). A position whose prefix has already used the budget cannot be chosen.
    """
    used = np.cumsum(view.mask) - view.mask  # sampled tokens before t
    return view.mask & drawable[view.response_ids] & ~closes_call & (used < room)


def plan_branches(
    entropy: Sequence[np.ndarray],
    log_ratio: Sequence[np.ndarray],
    mask: Sequence[np.ndarray],
    eligible: Sequence[np.ndarray],
    algo: Algorithm,
    seed: int,
) -> BranchPlan:
    """Branch points for the N roots of one prompt; all arrays are per root over response positions.

    entropy and log_ratio are those of the *current* policy (log_ratio = current - reference,
    exactly 0 when the weights have not moved). `branch_by: entropy` ignores Ω, `random` draws
    uniformly from the eligible positions.
    """
    lengths = [len(e) for e in entropy]
    offsets = torch.tensor(np.concatenate([[0], np.cumsum(lengths)]), dtype=torch.int64)
    cat = {k: torch.from_numpy(np.concatenate(v)) for k, v in
           {"h": entropy, "d": log_ratio, "m": mask, "e": eligible}.items()}  # fmt: skip
    d = cat["d"] if algo.branch_by == "score" else torch.zeros_like(cat["d"])
    scores = branch_scores(
        cat["h"].float(), d.float(), cat["m"], offsets, gamma=algo.gamma, clip=algo.score_clip
    )
    if algo.branch_by == "random":
        index, count = _random(cat["e"].numpy(), offsets.numpy(), algo.branches, seed)
        rule = np.full_like(index, 2)
    else:
        chosen = select_branch_points(scores, cat["e"], offsets, None, algo.branches)
        index, count, rule = (t.numpy() for t in (chosen.index, chosen.count, chosen.rule))
    points = []
    for root, base in enumerate(offsets[:-1].tolist()):
        for slot in range(int(count[root])):
            i = int(index[root, slot])
            z_h, z_o = float(scores.z_entropy[i]), float(scores.z_omega[i])
            by = RULES[int(rule[root, slot])]
            value = float(scores.score[i]) if by == "strict" else z_h
            points.append(BranchPoint(root, i - base, value, by, z_h, z_o))
    uninformative = [bool(f) for f in scores.omega_uninformative]
    return BranchPlan(points, uninformative, algo.branches * len(lengths) - len(points))


def _random(
    eligible: np.ndarray, offsets: np.ndarray, k: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.Generator(np.random.Philox(seed))
    index = np.full((len(offsets) - 1, k), -1, np.int64)
    count = np.zeros(len(offsets) - 1, np.int64)
    for r, (lo, hi) in enumerate(pairwise(offsets)):
        candidates = np.flatnonzero(eligible[lo:hi]) + lo
        drawn = np.sort(rng.permutation(candidates)[:k])
        index[r, : len(drawn)], count[r] = drawn, len(drawn)
    return index, count
