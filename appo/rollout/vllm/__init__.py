"""The rollout protocol over vLLM: `pip install 'appo[vllm]'`, then `rollout.engine=vllm`.

`from appo.rollout.vllm import VLLMEngine` imports torch only when the name is used, and vLLM when
an engine is made.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from appo.rollout.vllm.engine import VLLMEngine

__all__ = ["VLLMEngine"]


def __getattr__(name: str) -> Any:
    if name == "VLLMEngine":
        from appo.rollout.vllm.engine import VLLMEngine

        return VLLMEngine
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
