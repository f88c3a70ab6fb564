"""Kernels: definitions in PyTorch, native code where it is built, one name for both.

The source lives in the top-level `kernels/` folder, which has no `__init__.py` on purpose: transformers imports
whatever package called `kernels` it finds on the path. In a checkout (or editable install) this package reads that
folder through `__path__`; in a wheel the files lie beside this one.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path as _Path
from typing import Any

_source = _Path(__file__).resolve().parents[2] / "kernels"
if (_source / "native.py").is_file() and (_source.parent / "csrc").is_dir():  # our own checkout
    __path__.insert(0, str(_source))

# public name → module that defines it
_PUBLIC = {
    "linear_logprob_entropy": "logprob",
    "logprob_entropy": "logprob",
    "LogProbEntropy": "logprob",
    "IGNORE": "blocks",
    "watch": "debug",
    "future_value": "scan",
    "tree_future_value": "scan",
    "half_life_to_gamma": "scan",
    "branch_scores": "branching",
    "BranchScores": "branching",
    "select_branch_points": "selection",
    "BranchPoints": "selection",
    "tree_attention": "attention",
    "policy_loss": "loss",
    "PolicyLoss": "loss",
    "backend_info": "native",
}

__all__ = list(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'appo.kernels' has no attribute {name!r}")
    value = getattr(import_module(f"appo.kernels.{_PUBLIC[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(_PUBLIC))
