"""`algo.*` of a configuration → the `Algorithm` that runs.

A preset with the user's values laid over it.

The preset is a built-in one, or the user's own by import string. Also the batch arithmetic M =
N(B+1). No torch here.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import typing
from typing import Any

from appo.algo.algorithm import Algorithm
from appo.algo.presets import ALGORITHMS
from appo.config import AlgoConfig
from appo.config.convert import convert
from appo.errors import ConfigError
from appo.imports import call_problem, is_import
from appo.imports import resolve as import_string

# What users may set: fields of both.
KEYS = {f.name for f in dataclasses.fields(Algorithm)} & {
    f.name for f in dataclasses.fields(AlgoConfig)
}
EXPECTED = "an appo.algo.algorithm.Algorithm, or a function without arguments that returns one"


def resolve(cfg: AlgoConfig) -> Algorithm:
    """The preset `cfg.name` with the user's values laid over it.

    Raises ConfigError for an unknown name, an import string that does not lead to an `Algorithm`,
    N(B+1) ≠ M, branches on an algorithm without, and values out of range.
    """
    preset = find(cfg.name)
    if cfg.variant == "released":
        raise ConfigError(
            "algo.variant='released': its selection and loss exist as functions (appo.kernels, "
            "appo.algo.presets.tree.appo_released), but no training preset runs them yet; use algo.variant=paper"
        )
    keys = KEYS - {"name", "roots", "branches"}
    given = {k: v for k in keys if (v := getattr(cfg, k)) is not None}
    roots, branches = _arithmetic(cfg, preset)
    if given.get("dual_clip") == 0:
        given["dual_clip"] = None  # 0 switches it off; null in the configuration: as the preset
    algo = dataclasses.replace(preset, roots=roots, branches=branches, **given)
    _refuse_idle_keys(algo, {k for k, v in given.items() if v is not False})
    _check(algo)
    return algo


def find(name: str) -> Algorithm:
    """The preset of a name: built-in, or `module:attribute` of the user. Raises ConfigError."""
    if is_import(name, ALGORITHMS):
        return _own(name)
    if name not in ALGORITHMS:
        near = difflib.get_close_matches(name, ALGORITHMS, 1, 0.4)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise ConfigError(
            f"algo.name={name!r}{hint}: available are {', '.join(ALGORITHMS)}, and module:attribute for one of your own"
        )
    return ALGORITHMS[name]


def _own(name: str) -> Algorithm:
    """The user's algorithm, by import string.

    An `Algorithm`, or what a function without arguments returns.
    """
    found = import_string(name, "algo.name", EXPECTED, _is_no_algorithm)
    if isinstance(found, Algorithm):
        return found
    try:
        made = found()
    except Exception as error:
        raise ConfigError(
            f"algo.name is {name!r}: calling it raised {type(error).__name__}: {error}; expected: {EXPECTED}"
        ) from error
    if not isinstance(made, Algorithm):
        raise ConfigError(
            f"algo.name is {name!r}: it returned a {type(made).__name__}; expected: {EXPECTED}"
        )
    if wrong := _is_no_algorithm(made):
        raise ConfigError(f"algo.name is {name!r}: what it returned {wrong}")
    return made


def _is_no_algorithm(found: Any) -> str:
    """Why `found` cannot stand for an algorithm, or ""."""
    if not isinstance(found, Algorithm):
        return call_problem(found)
    wrong = call_problem(found.advantage, None, [], found)
    return wrong and f"is an Algorithm whose advantage(tree, graded, algo) {wrong}"


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
        idle |= {"branch_by", "resample", "score_clip"}
    if not a.has_branches and not a.future_weight:
        idle |= {"half_life"}
    if a.branch_by != "score":
        idle |= {"score_clip"}
    idle |= {"credit", "train_branches"} - set(a.advantage_keys)
    for key in sorted(idle & given):
        raise ConfigError(
            f"algo.{key} has no effect on {a.name} as configured ({a.describe()}, branch_by={a.branch_by}); remove it"
        )


def _check(a: Algorithm) -> None:
    """Types and ranges, also of what a user's own algorithm brings along."""
    if not re.fullmatch(r"[\w.+-]+", a.name):
        raise ConfigError(
            f"the algorithm's name is {a.name!r}: it becomes part of a folder's name; use letters, digits, '-' and '.'"
        )
    hints = typing.get_type_hints(AlgoConfig)
    for key in sorted(KEYS):
        convert(hints[key], getattr(a, key), f"algo.{key}", f"of {a.name}")
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
    if a.roots < a.fewest_roots:
        raise ConfigError(
            f"algo.roots={a.roots}: roots are compared with each other; {a.name} needs at least {a.fewest_roots} roots per "
            "prompt"
        )
