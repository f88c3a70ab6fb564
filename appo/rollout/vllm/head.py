"""The output head after a weight update.

The one place where vLLM's reload leaves old numbers without an error.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from appo.errors import EngineError

TOLERANCE = {torch.float32: 1e-4}  # of the largest logit; rounded types differ by their last bits
ROUNDED = 1e-2


def retie(model: Any, pack: Callable[[Any], None]) -> None:
    """Renew the packed copy that a tied head has on a CPU.

    vLLM's reload does not renew it.
    """
    head, embed = getattr(model, "lm_head", None), _embedding(model)
    if head is None or embed is None or head is embed or not model.config.tie_word_embeddings:
        return
    head.weight = embed.weight
    if embed.weight.device.type == "cpu":
        pack(head)


@torch.inference_mode()
def check_head(model: Any) -> None:
    """The head must multiply by the weights that it is said to have.

    Raises EngineError if it uses others.
    """
    head, embed = getattr(model, "lm_head", None), _embedding(model)
    if head is None or not hasattr(head, "quant_method"):
        return  # another pipeline stage has it
    tied = bool(model.config.tie_word_embeddings) and embed is not None
    weight = (embed if tied else head).weight.detach()
    x = torch.linspace(-1, 1, 2 * weight.shape[1], device=weight.device).view(2, -1)
    x = x.to(weight.dtype)
    got = head.quant_method.apply(head, x).float()
    want = x.float() @ weight.float().T
    limit = TOLERANCE.get(weight.dtype, ROUNDED) * float(want.abs().max()) + 1e-6
    if not (got - want).abs().max() <= limit:  # NaN disagrees
        raise EngineError(
            "after the weight update vLLM's head still multiplies by other weights than it should"
            + (" (it is tied to the embedding, which is new)" if tied else "")
            + "; this version of vLLM is not supported, use rollout.engine=native"
        )


def _embedding(model: Any) -> Any:
    return getattr(getattr(model, "model", None), "embed_tokens", None)
