"""Every algorithm as one row of plain data: branching rule + advantage + loss.

`resolve` lays the user's `algo.*` keys over the preset and does the batch arithmetic M = N(B+1). No torch here.
Values and their sources: docs/algorithms.md; paper = arXiv 2606.12384.
"""

from __future__ import annotations

import dataclasses
import difflib
from dataclasses import dataclass
from typing import Literal

from appo.config import AlgoConfig
from appo.errors import ConfigError


@dataclass(frozen=True)
class Algorithm:
    """One resolved algorithm. `branches` is per root; 0 means independent rollouts."""

    name: str
    roots: int = 16
    branches: int = 0
    branch_by: Literal["score", "entropy", "random"] = "score"
    resample: Literal["at", "after"] = "at"
    half_life: float = 32.0  # tau, in tokens
    score_clip: float = 0.2  # clip(Omega, 1 ± score_clip) before standardising
    advantage: Literal["group", "dual_group"] = "group"
    credit: Literal["sum", "mean", "literal"] = "sum"  # A_base of a root token (dual_group only)
    future_weight: float = 0.0  # b in A(1 + b A_fut)
    future_clip: tuple[float, float] = (1.0, 1.2)
    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float | None = 3.0
    aggregate: Literal["token-mean", "seq-mean-token-mean", "rollout-mean"] = "token-mean"
    train_branches: bool = False

    @property
    def rollouts(self) -> int:
        """M: leaves per prompt."""
        return self.roots * (self.branches + 1)

    @property
    def gamma(self) -> float:
        return 2.0 ** (-1.0 / self.half_life)

    @property
    def has_branches(self) -> bool:
        return self.branches > 0

    def describe(self) -> str:
        """The batch arithmetic in words."""
        if not self.has_branches:
            return f"{self.roots} independent rollouts per prompt"
        return f"{self.roots} roots × (1 + {self.branches} branches) = {self.rollouts} rollouts per prompt"


ALGORITHMS: dict[str, Algorithm] = {
    "appo": Algorithm(
        name="appo",
        roots=4,
        branches=3,
        advantage="dual_group",
        future_weight=0.5,
        clip_high=0.28,
        dual_clip=None,
        aggregate="rollout-mean",
    ),
    "grpo": Algorithm(name="grpo", roots=16),
}


def resolve(cfg: AlgoConfig) -> Algorithm:
    """The preset `cfg.name` with the user's values laid over it.

    Raises ConfigError for an unknown name, N(B+1) ≠ M, branches on an algorithm without, and values out of range.
    """
    if cfg.name not in ALGORITHMS:
        near = difflib.get_close_matches(cfg.name, ALGORITHMS, 1, 0.4)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise ConfigError(f"algo.name={cfg.name!r}{hint}: available are {', '.join(ALGORITHMS)}")
    if cfg.variant == "released":
        raise ConfigError(
            "algo.variant='released': its selection and loss exist as functions (appo.kernels, appo.algo.losses), but "
            "no training preset runs them yet; use algo.variant=paper"
        )
    preset = ALGORITHMS[cfg.name]
    keys = {f.name for f in dataclasses.fields(Algorithm)} & {
        f.name for f in dataclasses.fields(AlgoConfig)
    }
    given = {
        k: v for k in keys - {"name", "roots", "branches"} if (v := getattr(cfg, k)) is not None
    }
    roots, branches = _arithmetic(cfg, preset)
    if given.get("dual_clip") == 0:
        given["dual_clip"] = (
            None  # 0 switches it off; None in the configuration means "as the preset"
        )
    algo = dataclasses.replace(preset, roots=roots, branches=branches, **given)
    _refuse_idle_keys(algo, {k for k, v in given.items() if v is not False})
    _check(algo)
    return algo


def _arithmetic(cfg: AlgoConfig, preset: Algorithm) -> tuple[int, int]:
    """N and B from whichever of M, N, B were given."""
    m, n, b = cfg.rollouts, cfg.roots, cfg.branches
    if not preset.has_branches:
        if b:
            raise ConfigError(
                f"algo.branches={b}: {preset.name} samples independent rollouts; remove it or use algo=appo"
            )
        if n is not None and m is not None and n != m:
            raise ConfigError(
                f"algo.roots={n}, algo.rollouts={m}: the same thing for {preset.name}; give one of them"
            )
        return n or m or preset.roots, 0
    if b is None and n is not None and m is not None:
        b, rest = divmod(m, n)
        b -= 1
        if rest or b < 0:
            raise ConfigError(
                f"algo.rollouts={m} is not algo.roots={n} times a whole number (1 + branches)"
            )
    elif n is None and m is not None:
        b = preset.branches if b is None else b
        n, rest = divmod(m, b + 1)
        if rest:
            raise ConfigError(
                f"algo.rollouts={m} is not a multiple of 1 + algo.branches = {b + 1}; set algo.roots too"
            )
    n = preset.roots if n is None else n
    b = preset.branches if b is None else b
    if m is not None and n * (b + 1) != m:
        raise ConfigError(
            f"algo.roots·(algo.branches+1) = {n}·({b}+1) = {n * (b + 1)}, but algo.rollouts is {m}"
        )
    return n, b


def _refuse_idle_keys(a: Algorithm, given: set[str]) -> None:
    """A key that changes nothing would be believed in: say so instead."""
    idle = set()
    if not a.has_branches:
        idle |= {"branch_by", "resample", "score_clip", "train_branches"}
    if not a.has_branches and not a.future_weight:
        idle |= {"half_life"}
    if a.branch_by != "score":
        idle |= {"score_clip"}
    if a.advantage != "dual_group":
        idle |= {"credit"}
    for key in sorted(idle & given):
        raise ConfigError(
            f"algo.{key} has no effect on {a.name} as configured ({a.describe()}, branch_by={a.branch_by}); remove it"
        )


def _check(a: Algorithm) -> None:
    ranges = {
        "algo.roots": (a.roots, 1, 4096), "algo.branches": (a.branches, 0, 4096),
        "algo.half_life": (a.half_life, 1e-3, 1e9), "algo.score_clip": (a.score_clip, 1e-6, 0.999),
        "algo.future_weight": (a.future_weight, 0.0, 100.0), "algo.clip_low": (a.clip_low, 0.0, 1.0),
        "algo.clip_high": (a.clip_high, 0.0, 1e6),
    }  # fmt: skip
    for key, (value, low, high) in ranges.items():
        if not low <= value <= high:
            raise ConfigError(f"{key}={value}: must be between {low} and {high}")
    if a.dual_clip is not None and a.dual_clip <= 1:
        raise ConfigError(f"algo.dual_clip={a.dual_clip}: must be greater than 1 (3 is usual)")
    if a.rollouts < 2:
        raise ConfigError(
            f"{a.describe()}: a group of one has no advantage; use at least 2 rollouts per prompt"
        )
    if a.advantage == "dual_group" and a.roots < 2:
        raise ConfigError(
            "algo.roots=1: roots are compared with each other; APPO needs at least 2 roots per prompt"
        )
