"""appo: train tool-using LLM agents with branching rollouts and future-aware advantages.

Importing this package is cheap: no torch, no transformers. Public names are loaded when first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from appo.types import Credit as Credit
    from appo.types import Leaf as Leaf
    from appo.types import Node as Node
    from appo.types import RolloutTree as RolloutTree
    from appo.types import Task as Task
    from appo.types import Trajectory as Trajectory

# public name → module that defines it
_PUBLIC = {
    "Config": "appo.config.schema",
    "load_config": "appo.config.load",
    "train": "appo.run.train",
    "evaluate": "appo.run.train",
    "read_trees": "appo.rollout.store",
    "read_metrics": "appo.observability.metrics",
    "RolloutEngine": "appo.rollout.engine",
    "SamplingParams": "appo.rollout.engine",
    "Task": "appo.types",
    "Node": "appo.types",
    "Leaf": "appo.types",
    "RolloutTree": "appo.types",
    "Trajectory": "appo.types",
    "Credit": "appo.types",
    "AppoError": "appo.errors",
    "ConfigError": "appo.errors",
}

__all__ = [*_PUBLIC, "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'appo' has no attribute {name!r}")
    value = getattr(import_module(_PUBLIC[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(_PUBLIC))
