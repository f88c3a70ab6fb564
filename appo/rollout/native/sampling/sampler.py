"""The sampler of the engine.

From the final hidden states of some rows to tokens, logprobs and entropies.

It picks what draws them: C++ behind the product with the packed head (no logits are written), C++
or Triton over logits, or definition.py. The noise is the same everywhere (noise.py): the token of a
sequence at an absolute position depends on its logits, its seed and that position.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from appo.errors import EngineError
from appo.rollout.engine import SamplingParams
from appo.rollout.native.sampling import gpu_sample, native_sample
from appo.rollout.native.sampling.definition import Sampled, SamplingRows, kept, sample, sample_kept
from appo.rollout.native.sampling.noise import M64

Results = tuple[list[int], list[float], list[float]]  # tokens, logprobs, entropies


class OutputHead(Protocol):
    """What the sampler needs of a model, for hidden[R, d]."""

    def logits(self, hidden: Tensor) -> Tensor:
        """[R, V]."""

    def sample(self, hidden: Tensor, rows: SamplingRows) -> Sampled | None:
        """One token per row, without logits in memory; None where the model cannot do that."""


class TokenSampler:
    """Draws for rows whose parameters are set by `rows`, once per batch composition.

    logprob: nats, of the distribution drawn from (top-k/top-p: renormalised over what was kept;
    greedy: temperature 1).
    entropy: nats, of the full vocabulary at the sampling temperature, whatever was cut.
    Rows with NaN, +inf or nothing but -inf among their logits raise EngineError, and then nothing
    is drawn.
    """

    def __init__(self, vocab: int, device: torch.device, model: OutputHead | None = None):
        self.vocab, self.model = vocab, model
        self._from_logits = _for_logits(device)
        self.rows([])

    def rows(self, params: Sequence[SamplingParams], seqs: Sequence[int] = ()) -> None:
        """The sampling parameters of the rows to come.

        `seqs` are their handles, for error messages.
        """
        self._seqs = list(seqs)
        # Greedy rows are scored at temperature 1.
        temperature = torch.tensor([p.temperature or 1.0 for p in params], dtype=torch.float64)
        self._inv_temp = (1.0 / temperature).float()
        self._greedy = torch.tensor([p.temperature == 0.0 for p in params], dtype=torch.uint8)
        self._cut = {
            i: p
            for i, p in enumerate(params)
            if p.temperature != 0.0 and (p.top_p < 1.0 or 0 < p.top_k < self.vocab)
        }

    def sample(self, hidden: Tensor, seeds: Sequence[int], positions: Sequence[int]) -> Results:
        """One token for each of the first len(seeds) rows of hidden[R, d], the model's `forward`.

        seeds: any integers, modulo 2⁶⁴ · positions: absolute, of the tokens that are drawn
        """
        assert self.model is not None, (
            "a sampler without a model draws from logits: sample_logits()"
        )
        rows = self._rows_of(seeds, positions)
        sampled = self.model.sample(hidden[: len(seeds)], rows)
        if sampled is None:
            return self.sample_logits(self.model.logits(hidden), seeds, positions)
        cut = list(self._cut)
        return self._finish(sampled, rows, self.model.logits(hidden[cut]) if cut else ())

    def sample_logits(
        self, logits: Tensor, seeds: Sequence[int], positions: Sequence[int]
    ) -> Results:
        """The same from logits[R, V] that exist anyway."""
        rows = self._rows_of(seeds, positions)
        logits = logits[: len(seeds)]
        sampled = self._from_logits(logits, rows)
        return self._finish(sampled, rows, [logits[i] for i in self._cut])

    def _rows_of(self, seeds: Sequence[int], positions: Sequence[int]) -> SamplingRows:
        wrapped = [((seed + (1 << 63)) & M64) - (1 << 63) for seed in seeds]
        at = torch.tensor(positions, dtype=torch.int64)
        return SamplingRows(
            torch.tensor(wrapped, dtype=torch.int64), at, self._inv_temp, self._greedy
        )

    def _finish(self, sampled: Sampled, rows: SamplingRows, logits: Iterable[Tensor]) -> Results:
        """Refuse rows that cannot be drawn; draw those with cuts again, from their logits [V]."""
        tokens, logp = sampled.tokens.tolist(), sampled.logp.tolist()
        for i, token in enumerate(tokens):
            if token < 0:
                who = f"sequence {self._seqs[i]}" if self._seqs else f"row {i}"
                raise EngineError(
                    f"{who}: its logits at position {int(rows.positions[i])} hold NaN or +inf, or nothing but -inf; "
                    "check the weights that were loaded last"
                )
        for x, (i, params) in zip(logits, self._cut.items()):
            inv_temp = float(rows.inv_temp[i])
            ids = kept(x, inv_temp, params.top_k, params.top_p)
            seed, position = int(rows.seeds[i]), int(rows.positions[i])
            tokens[i], logp[i] = sample_kept(x, ids, seed, position, inv_temp)
        return tokens, logp, sampled.entropy.tolist()


def _for_logits(device: torch.device) -> Callable[[Tensor, SamplingRows], Sampled]:
    """What draws from logits on a device."""
    if device.type == "cpu" and native_sample.available():
        return native_sample.sample
    return gpu_sample.sample if gpu_sample.available(device) else sample
