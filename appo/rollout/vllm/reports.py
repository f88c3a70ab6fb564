"""Log-probs and entropies from what vLLM's public API reports.

For statistics "full" (exact) and "top" (approximate).

A report of one position is {token id: object with .logprob}; a flat report holds the same as
parallel lists with start_indices and end_indices. The token itself comes first, and may come a
second time in its rank.
"""

from __future__ import annotations

from typing import Any

import numpy as np


def logprob_of(position: Any, token: int) -> float:
    """Log-prob of `token` in the report of one position."""
    return float(position[token].logprob)


def top_entropy(logprobs: list[float], vocab: int) -> float:
    """Entropy if the mass outside the given log-probs were spread evenly over the other tokens.

    Never below the true one.
    """
    p = np.exp(np.asarray(logprobs, np.float64))
    rest, others = max(0.0, 1.0 - float(p.sum())), vocab - len(p)
    value = -float((p * np.asarray(logprobs, np.float64)).sum())
    return value - rest * float(np.log(rest / others)) if rest > 0 and others > 0 else value


def flat_row(flat: Any, position: int) -> tuple[int, np.ndarray]:
    """(the token itself, log-probs of all tokens by id) of a flat report over the whole vocabulary."""
    a, b = flat.start_indices[position], flat.end_indices[position]
    ids = np.asarray(flat.token_ids[a:b], np.int64)
    values = np.full(int(ids.max()) + 1, -np.inf)
    values[ids] = flat.logprobs[a:b]
    return int(ids[0]), values


def at_temperature(row: np.ndarray, token: int, temperature: float) -> tuple[float, float]:
    """(log-prob of `token`, entropy) at a temperature.

    row: log-probs at temperature 1
    """
    x = row.astype(np.float64) / temperature
    x -= x.max()
    log_p = x - np.log(np.exp(x).sum())
    p = np.exp(log_p)
    return float(log_p[token]), -float((p * np.where(p > 0, log_p, 0.0)).sum())
