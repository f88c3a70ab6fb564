"""The learner: packed trees in, one optimiser step out, and the new weights handed to whoever asks.

`Learner` (learner.py) is all that others need; nothing here knows an algorithm's name or a rollout
engine's class. Importing this package loads neither torch nor DeepSpeed; the names below load when
they are first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from appo.learner.checkpoint import load_latest, save_checkpoint
    from appo.learner.learner import Learner
    from appo.learner.push_weights import push

__all__ = ["Learner", "load_latest", "push", "save_checkpoint"]

_HOME = {
    "Learner": "appo.learner.learner",
    "load_latest": "appo.learner.checkpoint",
    "save_checkpoint": "appo.learner.checkpoint",
    "push": "appo.learner.push_weights",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOME[name]), name)
