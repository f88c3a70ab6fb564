"""Kernels: definitions in PyTorch, native code where it is built, one name for both.

This package is the public door. The source is the top-level `kernels/` folder, one sub-folder per
operation, which Python sees as `appo._kernels`: a link in a checkout, a copy in a wheel. `kernels/`
itself has no `__init__.py` on purpose: transformers imports whatever package called `kernels` it
finds on the path.

Importing this package loads no torch; each name loads its module when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the types of the names below, for editors and mypy
    from appo._kernels.branching.future_value import (
        future_value as future_value,
    )
    from appo._kernels.branching.future_value import (
        tree_future_value as tree_future_value,
    )
    from appo._kernels.branching.half_life import half_life_to_gamma as half_life_to_gamma
    from appo._kernels.branching.op import BranchScores as BranchScores
    from appo._kernels.branching.op import branch_scores as branch_scores
    from appo._kernels.branching.selection import BranchPoints as BranchPoints
    from appo._kernels.branching.selection import (
        select_branch_points as select_branch_points,
    )
    from appo._kernels.common.debug import watch as watch
    from appo._kernels.common.native import backend_info as backend_info
    from appo._kernels.linear_logprob.blocks import IGNORE as IGNORE
    from appo._kernels.linear_logprob.op import LogProbEntropy as LogProbEntropy
    from appo._kernels.linear_logprob.op import (
        linear_logprob_entropy as linear_logprob_entropy,
    )
    from appo._kernels.linear_logprob.op import logprob_entropy as logprob_entropy
    from appo._kernels.policy_loss.definition import aggregate as aggregate
    from appo._kernels.policy_loss.definition import row_weight as row_weight
    from appo._kernels.policy_loss.op import PolicyLoss as PolicyLoss
    from appo._kernels.policy_loss.op import policy_loss as policy_loss
    from appo._kernels.tree_attention.op import tree_attention as tree_attention

# public name → module that defines it, below appo._kernels
_PUBLIC = {
    "linear_logprob_entropy": "linear_logprob.op",
    "logprob_entropy": "linear_logprob.op",
    "LogProbEntropy": "linear_logprob.op",
    "IGNORE": "linear_logprob.blocks",
    "watch": "common.debug",
    "future_value": "branching.future_value",
    "tree_future_value": "branching.future_value",
    "half_life_to_gamma": "branching.half_life",
    "branch_scores": "branching.op",
    "BranchScores": "branching.op",
    "select_branch_points": "branching.selection",
    "BranchPoints": "branching.selection",
    "tree_attention": "tree_attention.op",
    "policy_loss": "policy_loss.op",
    "PolicyLoss": "policy_loss.op",
    "aggregate": "policy_loss.definition",
    "row_weight": "policy_loss.definition",
    "backend_info": "common.native",
}

__all__ = list(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'appo.kernels' has no attribute {name!r}")
    value = getattr(import_module(f"appo._kernels.{_PUBLIC[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(_PUBLIC))
