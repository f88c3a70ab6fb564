"""Gradients of a mini-batch, micro-batch by micro-batch, and the sums its metrics are made of."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from appo.dist.ranks import Ranks
from appo.kernels import LogProbEntropy
from appo.learner.guards import nan_unless_finite, non_finite_counts, why_not_finite
from appo.packing.pack import PackedBatch
from appo.types import Counts

Metrics = Mapping[str, tuple[float | Tensor, float | Tensor]]  # name → (sum, count)
LossFunction = Callable[[LogProbEntropy, PackedBatch, Counts], tuple[Tensor, Metrics]]
Forward = Callable[[PackedBatch | None], tuple[PackedBatch, LogProbEntropy]]


def accumulate(
    engine: Any,
    forward: Forward,
    batches: Sequence[PackedBatch | None],
    counts: Counts,
    loss_fn: LossFunction,
    after: Callable[[int], None],
) -> tuple[float, dict[str, tuple[float, float]], str | None]:
    """Forward and backward of every micro-batch on DeepSpeed's `engine`; None: an idle one.

    Returns the loss, the metric sums by name and what was not finite, if anything. `after(i)` is
    called when micro-batch i was handed over.
    """
    losses: list[Tensor] = []
    wrong: list[Tensor] = []
    sums: dict[str, list[float | Tensor]] = {}
    for i, given in enumerate(batches):
        engine.set_gradient_accumulation_boundary(i == len(batches) - 1)
        batch, stats = forward(given)
        loss, metrics = loss_fn(stats, batch, counts)
        if given is None:
            # Through the same outputs: ZeRO-3 compares the order of modules between ranks.
            loss = loss * 0.0
        else:
            losses.append(loss.detach().double())
            wrong.append(non_finite_counts(loss, stats, batch))
            loss = nan_unless_finite(loss, stats, wrong[-1])
            for name, pair in metrics.items():
                a, b = sums.get(name, (0.0, 0.0))
                sums[name] = [a + _alone(pair[0]), b + _alone(pair[1])]
        # DeepSpeed averages over ranks; our denominators are global, so the sum is what we want
        engine.backward(loss * dist.get_world_size(), scale_wrt_gas=False)
        after(i)
    total, *flat = _read([sum(losses), *(x for pair in sums.values() for x in pair)])
    pairs = dict(zip(sums, zip(flat[::2], flat[1::2])))
    return total, pairs, why_not_finite(wrong)


def means(ranks: Ranks, sums: dict[str, tuple[float, float]]) -> dict[str, float]:
    """Sum over ranks / count over ranks of each name.

    A count of 0 everywhere leaves the sum (a loss, an empty mean).
    """
    flat = {f"{name}|{k}": x for name, pair in sums.items() for k, x in enumerate(pair)}
    total = ranks.sum(flat, "metrics")  # names differ where a rank was idle
    names = dict.fromkeys(key.rpartition("|")[0] for key in total)
    return {n: total[f"{n}|0"] / (total[f"{n}|1"] or 1.0) for n in names}


def _alone(x: float | Tensor) -> float | Tensor:
    """A number, or a scalar that stays where it is: in float64 and without its graph."""
    return x.detach().double() if isinstance(x, Tensor) else float(x)


def _read(values: Sequence[float | Tensor]) -> list[float]:
    """Numbers and scalars as numbers, with one wait for the device."""
    scalars = [x for x in values if isinstance(x, Tensor)]
    read = iter(torch.stack(scalars).tolist() if scalars else [])
    return [next(read) if isinstance(x, Tensor) else float(x) for x in values]
