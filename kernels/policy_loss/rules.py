"""The numbers of the policy loss, and their ranges."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from appo._kernels.common import packed


class Rules(NamedTuple):
    """The numbers of the loss. gamma None: no future term; dual_clip inf: no dual clip."""

    gamma: float | None
    future_low: float
    future_high: float
    future_weight: float
    clip_low: float
    clip_high: float
    dual_clip: float


def stored(logp: Tensor) -> torch.dtype:
    """The dtype of the saved gradient.

    1/tokens is below the range of float16, and a loss scale comes only afterwards.
    """
    return torch.promote_types(logp.dtype, torch.float32)


def check(rules: Rules) -> None:
    """ValueError for numbers out of range."""
    if rules.gamma is not None:
        packed.check_gamma(rules.gamma)
    elif rules.future_weight:
        raise ValueError(f"future_weight is {rules.future_weight} without gamma; give gamma")
    if not 0.0 <= rules.future_low <= rules.future_high:
        raise ValueError(
            f"future_clip is ({rules.future_low}, {rules.future_high}), expected 0 ≤ low ≤ high"
        )
    if not (rules.future_weight >= 0.0 and math.isfinite(rules.future_weight)):
        raise ValueError(f"future_weight is {rules.future_weight}, expected finite and ≥ 0")
    if not (0.0 <= rules.clip_low <= 1.0 and rules.clip_high >= 0.0):
        raise ValueError(
            f"clip_low is {rules.clip_low}, clip_high {rules.clip_high}; expected 0 ≤ clip_low ≤ 1, clip_high ≥ 0"
        )
    if not rules.dual_clip > 1.0:
        raise ValueError(f"dual_clip is {rules.dual_clip}, expected > 1")
