"""Sample tokens from logits by an exponential race, in PyTorch.

The definition, and what runs where C++ and Triton cannot.

    z_i = x_i / τ        token = argmin_i E_i / e^(z_i) = argmin_i (log E_i - z_i)

with exponential noise E_i from (seed, position, i) alone; that is argmax_i (z_i + Gumbel noise), a
draw from softmax(z). Races are decided in float64 on the exact product of float32 numbers, so that
every implementation picks the same token unless two of them are within a few units of 1e-16.

Since E ≥ u, a token whose u alone loses against a race already run needs no logarithm: all but a
handful of a vocabulary are ruled out by one product and one comparison in float32.

Statistics: z - max z is centred before it is scaled; S = Σ eᶻ, U = Σ z eᶻ give logp = z_y - log S ≤
0 and entropy = log S - U/S ≥ 0 (a sum of two non-negative terms: nothing cancels).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from appo.rollout.native.sampling import noise

EXCLUDED = -1.0e30  # finite, so that 0 * EXCLUDED is 0 and not NaN
MARGIN = 1.0001  # of the bound on u: e^z in float32 is off by less than 3e-5


@dataclass(frozen=True)
class SamplingRows:
    """How each row of a batch is drawn: CPU tensors [R].

    seeds, positions int64 (position: the absolute one of the token that is drawn) · inv_temp
    float32 above 0, greedy
    uint8: rows that take the largest logit, of equals the lowest id, and no noise
    """

    seeds: Tensor
    positions: Tensor
    inv_temp: Tensor
    greedy: Tensor


@dataclass(frozen=True)
class Sampled:
    """One token per row, and its statistics.

    tokens          [R] int64, -1 where there is nothing to draw from (NaN, +inf, all -inf)
    logp, entropy   [R] float32, nats
    """

    tokens: Tensor
    logp: Tensor
    entropy: Tensor

    @staticmethod
    def empty(rows: int) -> Sampled:
        """Room for `rows` tokens; nothing is written to it yet."""
        return Sampled(torch.empty(rows, dtype=torch.int64), torch.empty(rows), torch.empty(rows))


def race(words: noise.Key, ids: Tensor, x: Tensor, inv_temp: float) -> Tensor:
    """log E - z of tokens ids[n] int64 with logits x[n], float64; the smallest wins."""
    return torch.log(-torch.log1p(-noise.uniforms(words, ids))) - x.double() * inv_temp


def sample(logits: Tensor, rows: SamplingRows) -> Sampled:
    """One token per row of logits[R, V], any float dtype, on any device."""
    out = Sampled.empty(len(logits))
    ids = torch.arange(logits.shape[1], dtype=torch.int32, device=logits.device)
    for i, x in enumerate(logits):  # one by one: what a row needs stays in the cache
        words = noise.key(int(rows.seeds[i]), int(rows.positions[i]))
        token, logp, entropy = _sample_row(
            x.float(), ids, None if rows.greedy[i] else words, float(rows.inv_temp[i])
        )
        out.tokens[i], out.logp[i], out.entropy[i] = token, logp, entropy
    return out


def _sample_row(
    x: Tensor, ids: Tensor, words: noise.Key | None, inv_temp: float
) -> tuple[int, float, float]:
    """(token, logp, entropy) of x[V] float32; words: the key, None: greedy."""
    top = x.amax()
    z = ((x - top) * inv_temp).clamp_(min=EXCLUDED)  # NaN stays
    e = z.exp()
    total = e.sum(dtype=torch.float64).item()
    if not total >= 1.0:  # the largest logit weighs 1
        return -1, math.nan, math.nan
    if words is None:
        token = int((x == top).nonzero()[0])
    else:
        open_ = _could_win(words, ids, e)
        token = int(open_[race(words, open_, x[open_], inv_temp).argmin()])
    logp = (x[token].item() - top.item()) * inv_temp - math.log(total)
    return token, logp, max(0.0, math.log(total) - torch.dot(e, z).item() / total)


def _could_win(words: noise.Key, ids: Tensor, e: Tensor) -> Tensor:
    """The few ids whose noise may win the race, int64.

    e[V] are their weights relative to the largest.
    """
    upper = (
        (noise.mixed(*words[:2], ids) >> 8).bitwise_and_(0xFFFFFF).float()
    )  # u < (upper + 1) / 2^24
    good = int(((upper + 1.0) / e).argmin())
    above = min((upper[good].item() + 1.0) * 2.0**-24, noise.BELOW_ONE)
    bound = -math.log1p(-above) / e[good].item()  # no better than E / e of that one
    return (upper <= e * (2.0**24 * MARGIN * bound)).nonzero().squeeze(1)


def kept(x: Tensor, inv_temp: float, top_k: int, top_p: float) -> Tensor:
    """ids int64, ascending, that top-k (0: off) and then top-p leave of the logits x[V].

    Of equals the lowest ids.

    Top-p keeps the smallest set whose share of what top-k left reaches p.
    """
    count = top_k if 0 < top_k < len(x) else len(x)
    size = count if top_p >= 1.0 else min(count, 256)
    largest = x.topk(size).values
    if top_p < 1.0:
        everything = x if count == len(x) else x.topk(count).values
        total = _weights(everything, largest[0], inv_temp).sum()
        while True:
            weights = _weights(largest, largest[0], inv_temp)
            inside = weights.cumsum(0) - weights < top_p * total
            if size == count or not inside[-1]:
                break
            size = min(count, 8 * size)
            largest = x.topk(size).values
        count = int(inside.sum())
    last = largest[count - 1]
    above = (x > last).nonzero().squeeze(1)
    equal = (x == last).nonzero().squeeze(1)
    return torch.cat((above, equal[: count - len(above)])).sort().values


def _weights(x: Tensor, top: Tensor, inv_temp: float) -> Tensor:
    return ((x.double() - top.double()) * inv_temp).exp()


def sample_kept(
    x: Tensor, ids: Tensor, seed: int, position: int, inv_temp: float
) -> tuple[int, float]:
    """(token, logp) of a draw from softmax(z) renormalised over ids[n] int64."""
    some = x[ids]
    winner = race(noise.key(seed, position), ids, some, inv_temp).argmin()
    z = some.double() * inv_temp
    return int(ids[winner]), min(0.0, (z[winner] - z.logsumexp(0)).item())
