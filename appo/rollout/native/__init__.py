"""The native rollout engine: a segment-tree KV cache and a small model runner in plain PyTorch.

`from appo.rollout.native import NativeEngine` imports torch only when the name is used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from appo.rollout.native.engine import NativeEngine

__all__ = ["NativeEngine"]


def __getattr__(name: str) -> Any:
    if name == "NativeEngine":
        from appo.rollout.native.engine import NativeEngine

        return NativeEngine
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
