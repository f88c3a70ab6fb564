"""Log-probs and entropies of packed trees: transformer → hidden states → fused head, never [T, vocabulary].

Attention runs tree by tree and root by root: tokens that see no other (siblings) never meet in a score matrix, so
a stream of many rollouts costs what the rollouts cost, not the square of the stream. Where a root has no trained
branch its attention is plain causal and needs no mask at all.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AutoModelForCausalLM
from transformers.utils import logging

from appo.data.packing import PackedBatch, interval_mask
from appo.errors import ModelError
from appo.kernels import LogProbEntropy, linear_logprob_entropy

FAMILIES = ("llama", "qwen2", "qwen3")
ATTENTION = "appo_tree"


@dataclass(frozen=True)
class Segment:
    """Queries [start, stop) of the stream; they see [prefix, prefix_stop) and, causally or by `mask`, each other.

    mask is bool[stop-start+P, same] over prefix (P tokens) + segment, or None when all of it is one causal chain.
    """

    prefix: int
    prefix_stop: int
    start: int
    stop: int
    mask: Tensor | None


def plan_attention(tout: Tensor) -> list[Segment]:
    """Cut a stream into segments from the ends of its subtrees, int32[T]. Segments come in stream order.

    A tree starts with the tokens that all of it sees (prompt); each subtree after them is one segment. The first
    takes the prompt's own queries with it.
    """
    ends = tout.cpu()
    segments: list[Segment] = []
    tree = 0
    while tree < ends.numel():
        stop = int(ends[tree])
        shared = tree + _leading(ends[tree:stop], stop)
        at, begin = shared, tree
        while begin < stop:
            end = int(ends[at]) if at < stop else stop
            prefix_stop = shared if begin > tree else tree
            mask = _mask(ends, prefix_stop - tree, begin, end)
            segments.append(Segment(tree, prefix_stop, begin, end, mask))
            begin = at = end
        tree = stop
    return [s if s.mask is None else replace(s, mask=s.mask.to(tout.device)) for s in segments]


def _leading(ends: Tensor, value: int) -> int:
    """How many of the first entries equal `value`."""
    other = (ends != value).nonzero()
    return int(other[0]) if other.numel() else ends.numel()


def _mask(ends: Tensor, prefix: int, start: int, stop: int) -> Tensor | None:
    """None for a chain, else the interval mask of `prefix` tokens seen by all + the segment, in local coordinates."""
    own = ends[start:stop]
    if bool((own >= stop).all()):
        return None
    seen_by_all = torch.full((prefix,), stop, dtype=own.dtype)
    return interval_mask(torch.cat([seen_by_all, own]) - (start - prefix))


def tree_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    segments: list[Segment],
    scaling: float | None = None,
    **_: object,
) -> tuple[Tensor, None]:
    """Attention in the form that transformers calls: q[1, Hq, T, D], k and v[1, Hkv, T, D] → out[1, T, Hq, D]."""
    assert attention_mask is None, "the tree decides who sees whom"
    out = []
    for s in segments:
        skip = s.prefix_stop - s.prefix
        q, k, v = (_rows(x, s, skip) for x in (query, key, value))
        o = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=s.mask,
            is_causal=s.mask is None,
            scale=scaling,
            enable_gqa=q.shape[1] != k.shape[1],
        )
        out.append(o[:, :, skip:])
    return torch.cat(out, dim=2).transpose(1, 2).contiguous(), None


def _rows(x: Tensor, s: Segment, skip: int) -> Tensor:
    """Prefix and segment of x[1, H, T, D] as one run."""
    own = x[:, :, s.start : s.stop]
    return torch.cat([x[:, :, s.prefix : s.prefix_stop], own], dim=2) if skip else own


AttentionInterface.register(ATTENTION, tree_attention)


def load_model(model_dir: Path | str, dtype: torch.dtype) -> nn.Module:
    """A causal LM of the Llama, Qwen2 or Qwen3 family from a local folder, with tree attention and without dropout.

    Raises ModelError when the folder cannot be loaded or the model has parts that the learner does not compute.
    """
    if not (Path(model_dir) / "config.json").is_file():
        raise ModelError(
            f"cannot load a model from {str(model_dir)!r}: there is no config.json in it"
        )
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
    if config.model_type not in FAMILIES:
        raise ModelError(
            f"{model_dir}: model_type is {config.model_type!r}; the learner trains {', '.join(FAMILIES)}"
        )
    if "sliding_attention" in (getattr(config, "layer_types", None) or []):
        raise ModelError(
            f"{model_dir}: sliding-window attention is not supported; choose a model without it"
        )
    if lm.lm_head.bias is not None:
        raise ModelError(f"{model_dir}: lm_head has a bias, which the fused head does not compute")
    config.attention_dropout = 0.0  # a ratio of log-probs needs the same function twice
    for module in lm.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.0
    return lm


class Policy(nn.Module):
    """A causal LM that answers with statistics of the packed edges; head_backend as in `linear_logprob_entropy`."""

    def __init__(
        self, lm: nn.Module, *, gradient_checkpointing: bool = False, head_backend: str = "auto"
    ):
        super().__init__()
        self.lm = lm
        self.head_backend = head_backend
        if gradient_checkpointing:
            with warnings.catch_warnings():
                warnings.simplefilter(
                    "ignore", FutureWarning
                )  # renamed in a later transformers 5.x
                lm.gradient_checkpointing_enable({"use_reentrant": False})

    def forward(self, batch: PackedBatch, inv_temp: float = 1.0) -> LogProbEntropy:
        """logp, entropy, lse: float32[E], at temperature 1/inv_temp; 0 (and no gradient) where mask is False."""
        hidden = self.lm.model(
            input_ids=batch.token_ids[None],
            position_ids=batch.position_ids[None],
            use_cache=False,
            segments=plan_attention(batch.tout),
        ).last_hidden_state[0]  # [T, H]
        edges = batch.mask.nonzero().squeeze(1)
        stats = linear_logprob_entropy(
            hidden,
            self.lm.lm_head.weight,
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
