"""Parts of the authors' released code (docs/algorithms.md, section 8).

**No preset runs them.**

They are tested against golden vectors that were computed with the released functions, so that a
preset `variant: released` can be put together of them. What it needs beside them is there already:
`branch_scores(variant="released")`, `select_branch_points(variant="released")`, and `policy_loss`
with dual_clip=3.

Layout: E tokens of R rows, row after row; offsets[R+1] marks the rows; mask[E] is True where a
token is trained; log_ratio[E] = logp - old_logp.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from appo.kernels import future_value


@torch.no_grad()
def released_scale(
    log_ratio: Tensor,
    advantage: Tensor,
    mask: Tensor,
    offsets: Tensor,
    *,
    gamma: float,
    c: float = 3.0,
    clip: tuple[float, float] = (1.0, 1.2),
    safety: float = 6.0,
) -> Tensor:
    """f = clip(exp(S), *clip), S = Σ_{k ≥ t} γ^(k-t) clamp(d_k, ±20) over the tokens with d ≤ ln c.

    [E] → [E]

    Where A < 0 and r > safety, f is clipped to [0.8, 1].
    """
    d = log_ratio.detach()
    takes_part = mask & (d <= torch.tensor(c, dtype=d.dtype).log())
    s = future_value(d.clamp(-20, 20), takes_part, offsets, gamma)
    f = s.exp().clamp(*clip)
    return torch.where((advantage < 0) & (d.exp() > safety), f.clamp(0.8, 1.0), f)


@torch.no_grad()
def sequence_filter(
    log_ratio: Tensor, advantage: Tensor, mask: Tensor, offsets: Tensor, *, c: float
) -> Tensor:
    """Rows that stay: those with at most one dual-clipped token, A < 0 and r > c. → bool[R]."""
    hit = mask & (advantage < 0) & (log_ratio.exp() > c)
    hits = torch.cat([hit.new_zeros(1, dtype=torch.int64), hit.cumsum(0)])  # before each token
    return hits[offsets[1:]] - hits[offsets[:-1]] <= 1


def kl_penalty(logp: Tensor, ref_logp: Tensor, kind: Literal["k1", "k2", "k3"]) -> Tensor:
    """Per-token estimate of KL(policy ‖ reference), d = ℓ - ℓ_ref.

    Schulman, "Approximating KL divergence". [E] → [E]

    k1 = d, k2 = d²/2, k3 = exp(-d) - 1 + d; for k3, d is clamped to ±20 and the result to ±10
    (gradient 0 beyond).
    """
    d = logp - ref_logp
    if kind == "k1":
        return d
    if kind == "k2":
        return 0.5 * d * d
    if kind == "k3":
        d = d.clamp(-20, 20)
        return (torch.exp(-d) - 1 + d).clamp(-10, 10)
    raise ValueError(f"kind={kind!r}: must be k1, k2 or k3")
