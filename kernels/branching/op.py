"""Where to branch: the Branching Score (arXiv 2606.12384, Eq. 5).

The choice of positions is in `selection`.

Everything works on *packed* roots: vectors of N tokens and offsets[B+1] that cut them into B
segments, one per root rollout. A mask marks tokens that the policy sampled; tool tokens add nothing
but keep their place in the exponent. All sums run in float64: they are O(N), and a clipped ratio is
so nearly constant that float32 would standardise noise.

`branching.definition` holds the formulas. The backends agree with it to rounding: they add the sums
in another order.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from appo._kernels.branching import definition
from appo._kernels.common import native, packed
from appo._kernels.common.operators import operator


class BranchScores(NamedTuple):
    """Per token [N] in the dtype of the log-ratios; 0 (omega: as computed) where the mask is False.

    omega     exp of the future value, clipped to 1 ± clip
    z_entropy, z_omega   standardised over the mask tokens of the segment
    score     z_entropy · z_omega
    omega_uninformative[B]   True where omega carries no information in that segment
    """

    omega: Tensor
    z_entropy: Tensor
    z_omega: Tensor
    score: Tensor
    omega_uninformative: Tensor


@torch.no_grad()
def branch_scores(
    entropy: Tensor,
    log_ratio: Tensor,
    mask: Tensor,
    offsets: Tensor,
    *,
    gamma: float,
    clip: float,
    variant: str = "paper",
    backend: str = "auto",
) -> BranchScores:
    """Branching Score z(clip(Ω, 1 ± clip)) · z(entropy) with Ω = exp(clamp(S, ± 20)), per segment.

    entropy[N] nats, log_ratio[N] current minus reference log-prob, mask[N], offsets[B+1]; see
    `future_value`. z uses the population standard deviation + 1e-6 over mask tokens, two passes in
    float64. variant "paper": a vector whose deviation is rounding (≤ 1e-8 · max(1, max|x|)) is
    standardised to exactly 0; "released": the bare formula. `omega_uninformative` is reported in
    both. backend "auto" | "torch" | "cpu" | "triton"; see `packed`. "triton" trusts offsets on the
    GPU. Raises ValueError for shapes, devices, offsets or numbers that do not fit.
    """
    check_variant(variant)
    packed.check_gamma(gamma)
    packed.check_vectors(offsets, log_ratio=log_ratio, entropy=entropy, mask=mask)
    packed.check_floating(log_ratio=log_ratio, entropy=entropy)
    if not 0.0 <= clip < math.inf:
        raise ValueError(f"clip is {clip}, expected ≥ 0 and finite")
    numbers = (float(gamma), float(clip), variant, backend)
    return BranchScores(*branch_scores_op(entropy, log_ratio, mask, offsets, *numbers))


def _branch_scores(
    entropy: Tensor,
    log_ratio: Tensor,
    mask: Tensor,
    offsets: Tensor,
    gamma: float,
    clip: float,
    variant: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`branch_scores` as an operator that is opaque to torch.compile.

    A compiled graph does not break at it.
    """
    how = packed.choose(backend, log_ratio)
    if how == "torch":
        return definition.branch_scores_torch(
            entropy, log_ratio, mask, offsets, gamma, clip, variant
        )
    d, h = packed.widened(log_ratio, entropy)
    m, bounds, paper = packed.as_bytes(mask), (1.0 - clip, 1.0 + clip), variant == "paper"
    if how == "triton":
        out = packed.gpu("branching.gpu.zscore").branch_scores(
            h, d, m, offsets, gamma, *bounds, paper
        )
    else:
        out = [torch.empty_like(d) for _ in range(4)]
        out.append(torch.empty(offsets.shape[0] - 1, dtype=torch.uint8))
        native.require("branch_scores")(
            h, d, m, packed.on_host(offsets), gamma, *bounds, paper, *out, torch.get_num_threads()
        )
    omega, z_entropy, z_omega, score = (x.to(log_ratio.dtype) for x in out[:4])
    return omega, z_entropy, z_omega, score, out[4].view(torch.bool)


def _fake_branch_scores(
    entropy: Tensor, log_ratio: Tensor, mask: Tensor, offsets: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    omega, z_entropy, z_omega, score = (log_ratio.new_empty(log_ratio.shape) for _ in range(4))
    flat = log_ratio.new_empty(offsets.shape[0] - 1, dtype=torch.bool)
    return omega, z_entropy, z_omega, score, flat


branch_scores_op = operator("branch_scores", _branch_scores, _fake_branch_scores)


def check_variant(variant: str) -> None:
    """Raise ValueError unless `variant` names a branching score."""
    if variant not in ("paper", "released"):
        raise ValueError(f"variant is {variant!r}, expected 'paper' or 'released'")
