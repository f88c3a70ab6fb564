"""Draw tokens from logits and write down, exactly, what they were drawn from.

One pass of centred statistics per row: z = x/τ − max, S = Σeᶻ, U = Σz·eᶻ give logprob = z_y − log S ≤ 0 and
entropy = log S − U/S ≥ 0 (a sum of two non-negative terms: nothing cancels). The token is found by inverse CDF in two
levels (blocks of 256, then inside the block), from one uniform that depends on (seed, position) only.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from appo.rollout.engine import SamplingParams

BLOCK = 256
ROWS = 8  # rows per pass: two fp32 copies of 8 rows of a 49k vocabulary stay in cache
EXCLUDED = -1.0e30  # finite, so that 0 * EXCLUDED is 0 and not NaN
_M64 = (1 << 64) - 1


def _mix(x: int) -> int:
    """The splitmix64 finaliser (Steele, Lea, Flood 2014)."""
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _M64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _M64
    return x ^ (x >> 31)


def uniform(seed: int, position: int) -> float:
    """The noise of the token at absolute `position` under `seed`: in [0, 1), 53 bits, the same in any batch."""
    key = _mix((seed + 0x9E3779B97F4A7C15) & _M64)
    return (_mix((key + (position + 1) * 0x9E3779B97F4A7C15) & _M64) >> 11) * 2.0**-53


class Sampler:
    """Scratch memory plus the rows' parameters, set once per batch composition by `rows`."""

    def __init__(self, vocab: int, device: torch.device):
        self.vocab = vocab
        padded = -(-vocab // BLOCK) * BLOCK
        self._z = torch.zeros(ROWS, padded, device=device)
        self._e = torch.zeros(ROWS, padded, device=device)  # the padding stays 0: never drawn
        self.device = device

    def rows(self, params: Sequence[SamplingParams]) -> None:
        """Remember the sampling parameters of the rows to come."""
        temperature = [
            p.temperature or 1.0 for p in params
        ]  # greedy rows are scored at temperature 1
        self._inv_temp = (
            (1.0 / torch.tensor(temperature, dtype=torch.float64)).float().to(self.device)
        )
        self._greedy = [i for i, p in enumerate(params) if p.temperature == 0.0]
        self._cut = [
            (i, p.top_k, p.top_p)
            for i, p in enumerate(params)
            if p.temperature != 0.0 and (p.top_p < 1.0 or 0 < p.top_k < self.vocab)
        ]

    def sample(
        self, logits: Tensor, noise: Sequence[float]
    ) -> tuple[list[int], list[float], list[float]]:
        """One token per row of logits[R,V] with uniforms noise[R]: (tokens, logprobs, entropies).

        logprob: of the distribution drawn from (top-k/top-p: renormalised over what was kept; greedy: temperature 1).
        entropy: nats, of the full vocabulary at the sampling temperature, whatever was cut.
        """
        u = torch.tensor(noise, dtype=torch.float64, device=self.device)
        out = [
            self._pass(logits[a : a + ROWS], u[a : a + ROWS], a) for a in range(0, len(noise), ROWS)
        ]
        tokens, logp, entropy = (torch.cat(column) for column in zip(*out))
        return tokens.tolist(), logp.tolist(), entropy.tolist()

    def _statistics(
        self, logits: Tensor, inv_temp: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """z, exp(z) (padded), Σexp(z) in float64, entropy; z and exp(z) live in scratch until the next call."""
        r = logits.shape[0]
        z, e = self._z[:r, : self.vocab], self._e[:r, : self.vocab]
        torch.mul(logits, inv_temp, out=z)
        z.sub_(z.amax(-1, keepdim=True))
        torch.exp(z, out=e)
        total = self._blocks(r).sum(-1)
        entropy = total.log() - torch.linalg.vecdot(e, z).double() / total
        return (
            z,
            self._e[:r],
            total,
            entropy.clamp_(min=0.0).float(),
        )  # clamp: -0.0 and one ulp of the dot product

    def _blocks(self, r: int) -> Tensor:
        return self._e[:r].view(r, -1, BLOCK).sum(-1).double()  # [r, V/256]

    def _pass(self, logits: Tensor, u: Tensor, first: int) -> tuple[Tensor, Tensor, Tensor]:
        r = logits.shape[0]
        z, e, total, entropy = self._statistics(logits, self._inv_temp[first : first + r, None])
        for row, top_k, top_p in self._cut:
            if first <= row < first + r:
                _truncate(z[row - first], e[row - first, : self.vocab], top_k, top_p)
        blocks = self._blocks(r)
        cumulative = blocks.cumsum(-1)
        total = cumulative[:, -1:]
        target = u[:, None] * total
        block = _first_above(cumulative, target)
        rest = target - (cumulative.gather(1, block) - blocks.gather(1, block))
        inside = (
            e.view(r, -1, BLOCK)[torch.arange(r, device=self.device), block.squeeze(1)]
            .double()
            .cumsum(-1)
        )
        token = (block * BLOCK + _first_above(inside, rest)).squeeze(1)
        for row in self._greedy:
            if first <= row < first + r:
                token[row - first] = z[row - first].argmax()
        logp = z.gather(1, token[:, None]).double() - total.log()
        return token, logp.squeeze(1).clamp_(max=0.0).float(), entropy


def _first_above(cumulative: Tensor, target: Tensor) -> Tensor:
    """First index whose cumulative sum exceeds target; rounding may not pick an entry of zero weight. [R,n],[R,1]->[R,1]"""
    index = (cumulative <= target).sum(-1, keepdim=True)
    last = (cumulative < cumulative[:, -1:]).sum(-1, keepdim=True)  # last entry that adds weight
    return torch.minimum(index, last)


def _truncate(z: Tensor, e: Tensor, top_k: int, top_p: float) -> None:
    """Zero in e[V] what top-k, then top-p, exclude. Top-p keeps the smallest set whose mass reaches p."""
    order = torch.argsort(z, descending=True, stable=True)
    weight = e[order].double()
    if 0 < top_k < len(z):
        weight[top_k:] = 0.0
    if top_p < 1.0:
        before = weight.cumsum(0) - weight
        weight[before >= top_p * weight.sum()] = 0.0
    e[order[weight == 0.0]] = 0.0
