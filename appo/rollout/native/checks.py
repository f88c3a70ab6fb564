"""What the engine refuses, in one place: every error names the field, the value and the way out."""

from __future__ import annotations

import torch

from appo.errors import EngineError, StaleWeightsError
from appo.rollout.engine import SamplingParams
from appo.rollout.native.tree.block_list import BLOCK

COLDEST, HOTTEST = 1e-30, 1e30  # temperatures; beyond, their inverse is no float32 to reckon with
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def check_settings(dtype: str, max_batch: int, prefill_chunk: int, kv_tokens: int | None) -> None:
    """The engine's own settings, before anything is loaded."""
    if dtype not in DTYPES:
        raise EngineError(f"dtype={dtype!r}: use one of {', '.join(DTYPES)}")
    for name, value, least in (
        ("max_batch", max_batch, 1),
        ("prefill_chunk", prefill_chunk, 1),
        ("kv_tokens", kv_tokens, BLOCK),  # memory is given out in blocks
    ):
        if value is not None and value < least:
            raise EngineError(f"{name}={value}: must be at least {least}")


def check_context(max_context: int, max_positions: int) -> None:
    """The longest sequence fits the model's positions."""
    if not 2 <= max_context <= max_positions:
        raise EngineError(
            f"max_context={max_context}: the model's positions allow 2 … {max_positions}"
        )


def check_params(p: SamplingParams) -> None:
    """How to sample makes sense."""
    if p.max_new_tokens < 1:
        raise EngineError(f"max_new_tokens={p.max_new_tokens}: must be at least 1")
    if p.temperature != 0 and not COLDEST <= p.temperature <= HOTTEST:
        raise EngineError(
            f"temperature={p.temperature}: must be 0 (greedy) or from {COLDEST:g} to {HOTTEST:g}"
        )
    if not 0 < p.top_p <= 1 or p.top_k < 0:
        raise EngineError(
            f"top_p={p.top_p}, top_k={p.top_k}: need 0 < top_p <= 1 and top_k >= 0 (0: off)"
        )


def check_fits(operation: str, length: int, more: int, max_context: int) -> None:
    """`more` tokens after `length` fit the context."""
    if length + more > max_context:
        raise EngineError(
            f"{operation}: {length} + {more} tokens need {length + more}, which does not fit max_context={max_context}"
        )


def check_fresh(operation: str, seq: int, stale: bool, version: int) -> None:
    """Raise StaleWeightsError for a sequence with KV of older weights than `version`."""
    if stale:
        raise StaleWeightsError(
            f"{operation}: its KV was computed before version {version}; "
            f"call score([{seq}]) first, or start again from add_prompt"
        )


def check_none_decodes(operation: str, decoding: int) -> None:
    """Raise EngineError while `decoding` sequences have still to stop."""
    if decoding > 0:
        raise EngineError(
            f"{operation}: {decoding} sequences are decoding; let them stop or cancel them first"
        )
