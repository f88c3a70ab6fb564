"""Log-probs and entropies of packed trees.

Transformer → hidden states → fused head, never [T, vocabulary].

Attention takes the ends of the subtrees as they are (`appo._kernels.tree_attention`): blocks of
tokens that do not see each other never meet, so a stream of many rollouts costs what the rollouts
cost, not the square of the stream, and no mask of that size is ever made.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AutoModelForCausalLM
from transformers.utils import logging

from appo.errors import ModelError
from appo.kernels import LogProbEntropy, linear_logprob_entropy, tree_attention
from appo.learner.fused_layers import fuse
from appo.models.shape import ModelFamily, read_shape
from appo.packing.pack import PackedBatch

ATTENTION = "appo_tree"


def packed_attention(
    module: nn.Module,  # noqa: ARG001 — transformers passes it
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    subtree_end: Tensor,
    scaling: float | None = None,
    **_: object,
) -> tuple[Tensor, None]:
    """Attention in the form that transformers calls.

    q[1, Hq, T, D], k and v[1, Hkv, T, D] → out[1, T, Hq, D].
    """
    assert attention_mask is None, "the tree decides who sees whom"
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    return tree_attention(q, k, v, subtree_end, scale=scaling)[None], None


AttentionInterface.register(ATTENTION, packed_attention)


def load_model(
    model_dir: Path | str, dtype: torch.dtype, family: ModelFamily | None = None
) -> nn.Module:
    """A causal LM of a known family (or the user's own) from a local folder.

    It has tree attention and no dropout.

    Raises ModelError when the folder cannot be loaded or the model has parts that the learner does
    not compute.
    """
    read_shape(model_dir, family)
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        lm = AutoModelForCausalLM.from_pretrained(
            str(model_dir), dtype=dtype, attn_implementation=ATTENTION, local_files_only=True
        )
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot load a model from {str(model_dir)!r}: {error}") from error
    finally:
        if bars:
            logging.enable_progress_bar()
    config = lm.config
    if "sliding_attention" in (getattr(config, "layer_types", None) or []):
        raise ModelError(
            f"{model_dir}: sliding-window attention is not supported; choose a model without it"
        )
    if lm.get_output_embeddings().bias is not None:
        raise ModelError(f"{model_dir}: lm_head has a bias, which the fused head does not compute")
    config.attention_dropout = 0.0  # a ratio of log-probs needs the same function twice
    for module in lm.modules():
        if hasattr(module, "attention_dropout"):
            setattr(module, "attention_dropout", 0.0)  # noqa: B010  # nn.Module knows tensors only
    return fuse(lm)


class Policy(nn.Module):
    """A causal LM that answers with statistics of the packed edges.

    head_backend as in `linear_logprob_entropy`.
    """

    def __init__(
        self, lm: Any, *, gradient_checkpointing: bool = False, head_backend: str = "auto"
    ):
        super().__init__()
        self.lm: Any = lm  # a model of transformers: its attributes are set at run time
        self.head_backend = head_backend
        if gradient_checkpointing:
            with warnings.catch_warnings():
                warnings.simplefilter(
                    "ignore", FutureWarning
                )  # renamed in a later transformers 5.x
                lm.gradient_checkpointing_enable({"use_reentrant": False})

    def forward(self, batch: PackedBatch, inv_temp: float = 1.0) -> LogProbEntropy:
        """logp, entropy, lse: float32[E], at temperature 1/inv_temp.

        0 (and no gradient) where mask is False.
        """
        hidden = self.lm.base_model(
            input_ids=batch.token_ids[None],
            position_ids=batch.position_ids[None],
            use_cache=False,
            subtree_end=batch.subtree_end,
        ).last_hidden_state[0]  # [T, H]
        edges = batch.mask.nonzero().squeeze(1)
        stats = linear_logprob_entropy(
            hidden,
            self.lm.get_output_embeddings().weight,
            batch.target[edges],
            rows=batch.source[edges],
            inv_temp=inv_temp,
            backend=self.head_backend,
        )
        return LogProbEntropy(*(_scatter(x, edges, batch.mask.numel()) for x in stats))


def _scatter(values: Tensor, at: Tensor, size: int) -> Tensor:
    """values[N] at positions `at` of a vector of zeros, [size]; differentiable."""
    if values.numel() == size:
        return values
    return values.new_zeros(size).index_put((at,), values)
