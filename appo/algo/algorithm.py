"""An algorithm as one row of plain data: branching rule + advantage rule + loss options.

No torch here.

The built-in ones stand in `appo.algo.presets`, one file each; one of your own is any `Algorithm`
that `algo=my_module:MY_ALGO` names (`appo.algo.resolve`). docs/algorithms.md has the equations that
the fields belong to.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from appo.kernels import half_life_to_gamma
from appo.types import Aggregate, BranchBy, Credit, CreditRule, Resample, RolloutTree

AdvantageRule = Callable[[RolloutTree, list[int], "Algorithm"], list[Credit]]
"""(tree, graded leaves, algorithm) → the credits of the leaves that are trained.

Every leaf in the list has a reward. A trained leaf gets one `Credit`, also where its advantage is
0: denominators count it. `appo.algo.credit.token_credit` makes one.
"""


@dataclass(frozen=True)
class Algorithm:
    """One resolved algorithm. `branches` is per root; 0 means independent rollouts.

    Users may set every field as `algo.<field>`, except `advantage`, `advantage_keys`,
    `fewest_roots` and `future_clip`.
    """

    name: str
    advantage: AdvantageRule
    advantage_keys: tuple[str, ...] = ()  # fields that only some rules read: those this one reads
    fewest_roots: int = 1  # roots that the rule needs
    roots: int = 16
    branches: int = 0
    branch_by: BranchBy = "score"
    resample: Resample = "at"
    half_life: float = 32.0  # τ, in tokens
    score_clip: float = 0.2  # clip(Ω, 1 ± score_clip) before standardizing
    credit: CreditRule = "sum"  # A_base of a root token
    future_weight: float = 0.0  # b of A(1 + b f)
    future_clip: tuple[float, float] = (1.0, 1.2)
    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float | None = 3.0
    aggregate: Aggregate = "token-mean"
    train_branches: bool = False

    @property
    def rollouts(self) -> int:
        """M: leaves per prompt."""
        return self.roots * (self.branches + 1)

    @property
    def gamma(self) -> float:
        """Discount per token, from the half-life."""
        return half_life_to_gamma(self.half_life)

    @property
    def has_branches(self) -> bool:
        """Whether roots are forked."""
        return self.branches > 0

    def describe(self) -> str:
        """The batch arithmetic in words."""
        if not self.has_branches:
            return f"{self.roots} independent rollouts per prompt"
        return f"{self.roots} roots × (1 + {self.branches} branches) = {self.rollouts} rollouts per prompt"
