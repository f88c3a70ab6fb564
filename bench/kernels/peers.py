"""Ways to get log-prob and entropy of given tokens from hidden states.

Ours and those of others, behind one signature.

Those named after a package call it; the others are written here from what other trainers do, in
plain PyTorch:

    eager bf16, eager fp32   the [T, V] logits in one piece
    torch.compile            the same in bf16, compiled
    T-chunk bf16             blocks of 128 tokens, recomputed in backward by checkpointing
    V-chunk bf16             blocks of 4,096 columns with running maximum, sum and Σ e·x; backward
                             recomputes each block

bf16 chunks in use elsewhere often give the entropy no gradient; these two do, which makes them
stronger opponents.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from appo.kernels import linear_logprob_entropy

# (h[T, H], w[V, H], y[T]) → (logp[T], entropy[T]) or (logp[T],)
Run = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, ...]]


@dataclass(frozen=True)
class Implementation:
    """`both` gives logp and an entropy with a gradient, `logp` only logp; None: it cannot.

    slow: a call takes many times what the others take; compiled: the first call of a shape takes
    half a minute.
    """

    name: str
    both: Run | None
    logp: Run
    ours: bool = False
    slow: bool = False
    compiled: bool = False


def ours(h: Tensor, w: Tensor, y: Tensor, backend: str = "auto") -> tuple[Tensor, Tensor]:
    out = linear_logprob_entropy(h, w, y, backend=backend)
    return out.logp, out.entropy


def eager(h: Tensor, w: Tensor, y: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    logits = (h.to(dtype) @ w.to(dtype).T).float()  # [T, V]
    logp = torch.log_softmax(logits, dim=1)
    return logp.gather(1, y[:, None])[:, 0], -(logp.exp() * logp).sum(dim=1)


def eager_logp(h: Tensor, w: Tensor, y: Tensor, dtype: torch.dtype) -> tuple[Tensor]:
    return (-F.cross_entropy((h.to(dtype) @ w.to(dtype).T).float(), y, reduction="none"),)


def token_chunks(
    h: Tensor, w: Tensor, y: Tensor, run: Callable[..., tuple[Tensor, ...]], size: int = 128
) -> tuple[Tensor, ...]:
    """`run` on blocks of tokens; with gradients, each block is computed again in backward."""
    parts = [
        checkpoint(run, h_th, w, y_t, torch.bfloat16, use_reentrant=False)
        for h_th, y_t in zip(h.split(size), y.split(size))
    ]
    return tuple(torch.cat(column) for column in zip(*parts))


class VocabChunks(torch.autograd.Function):
    """bf16 products of `size` columns at a time.

    Running statistics are float32, G is rounded to bf16 in backward.
    """

    @staticmethod
    def forward(
        ctx: Any, h: Tensor, w: Tensor, y: Tensor, with_entropy: bool, size: int
    ) -> tuple[Tensor, Tensor]:
        tokens = h.shape[0]
        top = torch.full((tokens,), -torch.inf)
        total, weighted, picked = torch.zeros(3, tokens).unbind()
        for v0 in range(0, w.shape[0], size):
            x = (h @ w[v0 : v0 + size].T).float()  # [T, v]
            column, here = _column(y, v0, x.shape[1])
            picked += torch.where(here, x.gather(1, column)[:, 0], 0.0)
            new = torch.maximum(top, x.amax(1))
            e, fade = (x - new[:, None]).exp_(), (top - new).exp_()
            total = total * fade + e.sum(1)
            if with_entropy:
                weighted = weighted * fade + torch.linalg.vecdot(e, x)
            top = new
        lse = top + total.log()
        entropy = lse - weighted / total if with_entropy else torch.zeros_like(lse)
        ctx.save_for_backward(h, w, y, lse, entropy)
        ctx.with_entropy, ctx.size = with_entropy, size
        return picked - lse, entropy

    @staticmethod
    def backward(ctx: Any, d_logp: Tensor, d_entropy: Tensor) -> tuple[Tensor | None, ...]:
        h, w, y, lse, entropy = ctx.saved_tensors
        dh, dw = torch.zeros_like(h, dtype=torch.float32), torch.empty_like(w)
        for v0 in range(0, w.shape[0], ctx.size):
            w_vh = w[v0 : v0 + ctx.size]
            logp = (h @ w_vh.T).float().sub_(lse[:, None])
            p = logp.exp()
            if ctx.with_entropy:
                g = p * -(d_logp[:, None] + d_entropy[:, None] * (logp + entropy[:, None]))
            else:
                g = p.mul_(-d_logp[:, None])
            column, here = _column(y, v0, g.shape[1])
            g.scatter_add_(1, column, torch.where(here, d_logp, 0.0)[:, None])
            g = g.bfloat16()
            dh += g @ w_vh
            dw[v0 : v0 + ctx.size] = g.T @ h
        return dh.to(h.dtype), dw, None, None, None


def _column(y: Tensor, v0: int, width: int) -> tuple[Tensor, Tensor]:
    """(column of the target inside the block [T, 1], whether it is there [T])."""
    column = y - v0
    return column.clamp(0, width - 1)[:, None], (column >= 0) & (column < width)


def vocab_chunks(h: Tensor, w: Tensor, y: Tensor, with_entropy: bool) -> tuple[Tensor, ...]:
    logp, entropy = VocabChunks.apply(h, w, y, with_entropy, 4096)
    return (logp, entropy) if with_entropy else (logp,)


def torch_lce(h: Tensor, w: Tensor, y: Tensor, chunked: bool) -> tuple[Tensor]:
    options = torch.nn.LinearCrossEntropyOptions() if chunked else None
    return (-F.linear_cross_entropy(h, w, y, reduction="none", options=options),)


def liger_scaled(h: Tensor, w: Tensor, y: Tensor, with_entropy: bool) -> tuple[Tensor, ...]:
    from liger_kernel.ops.fused_linear_scaled_cross_entropy import (
        LigerFusedLinearScaledCrossEntropyFunction,
    )

    out = LigerFusedLinearScaledCrossEntropyFunction.apply(h, w, y, return_entropy=with_entropy)
    return (-out[0], out[1].float()) if with_entropy else (-out,)


def liger_ppo(h: Tensor, w: Tensor, y: Tensor) -> tuple[Tensor]:
    """The chunked log-prob inside Liger's PPO and GRPO losses, without the loss."""
    from liger_kernel.chunked_loss.fused_linear_ppo import LigerFusedLinearPPOBase

    return (LigerFusedLinearPPOBase.chunk_forward(h[None], w, y[None])[0],)


def cut_cross_entropy(h: Tensor, w: Tensor, y: Tensor) -> tuple[Tensor]:
    from cut_cross_entropy import linear_cross_entropy

    return (-linear_cross_entropy(h, w, y, reduction="none", impl="torch_compile"),)


def implementations() -> tuple[list[Implementation], dict[str, str]]:
    """(what runs here, name → why not for what does not)."""
    bf16, fp32 = torch.bfloat16, torch.float32
    compiled, compiled_logp = (torch.compile(f, dynamic=False) for f in (eager, eager_logp))

    def either(make: Callable[..., Run], name: str, **flags: bool) -> Implementation:
        return Implementation(name, make(True), make(False), **flags)

    found = [
        Implementation("ours", ours, ours, ours=True),
    ]
    torch_only = partial(ours, backend="torch")
    found.append(Implementation("ours, backend torch", torch_only, torch_only, ours=True))
    for name, dtype in (("eager bf16", bf16), ("eager fp32", fp32)):
        found.append(
            Implementation(name, partial(eager, dtype=dtype), partial(eager_logp, dtype=dtype))
        )
    found.append(
        Implementation(
            "torch.compile bf16",
            partial(compiled, dtype=bf16),
            partial(compiled_logp, dtype=bf16),
            compiled=True,
        )
    )
    found += [
        Implementation(
            "T-chunk bf16", partial(token_chunks, run=eager), partial(token_chunks, run=eager_logp)
        ),
        either(lambda both: partial(vocab_chunks, with_entropy=both), "V-chunk bf16"),
    ]
    missing = {}
    if hasattr(F, "linear_cross_entropy"):
        found.append(
            Implementation("torch linear_cross_entropy", None, partial(torch_lce, chunked=False))
        )
    else:
        missing["torch linear_cross_entropy"] = f"torch {torch.__version__} has none (2.13 does)"
    if hasattr(torch.nn, "LinearCrossEntropyOptions"):
        chunked = partial(torch_lce, chunked=True)
        found.append(
            Implementation("torch linear_cross_entropy, chunked", None, chunked, slow=True)
        )
    if _installed("liger-kernel", "0.8.5", missing):
        found += [
            either(lambda both: partial(liger_scaled, with_entropy=both), "Liger scaled CE"),
            Implementation("Liger PPO log-prob", None, liger_ppo),
        ]
    if _installed("cut-cross-entropy", "25.1.1", missing):
        found.append(Implementation("Cut-Cross-Entropy", None, cut_cross_entropy, compiled=True))
    return found, missing


def _installed(package: str, tried: str, missing: dict[str, str]) -> bool:
    try:
        metadata.version(package)
    except metadata.PackageNotFoundError:
        missing[package] = f"not installed (tried with {tried}: pip install {package}=={tried})"
        return False
    return True
