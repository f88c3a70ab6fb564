"""Debug mode: non-finite statistics are counted on the device, and read when you ask.

Counting does not wait for the device.

    with debug.watch() as seen:
        ...                       # any number of kernel calls
    seen.non_finite()             # one synchronisation, here

While a watch is open, ids on a GPU are checked as well, as they always are on a CPU (this one does
wait).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


class Watch:
    """Counts of tokens whose statistics were NaN or infinite, one running total per device."""

    def __init__(self) -> None:
        self._counts: dict[torch.device, Tensor] = {}

    def add(self, stats: Tensor) -> None:
        """stats[k, N]: counts tokens with a non-finite entry.

        A few launches, no synchronisation.
        """
        wrong = (~torch.isfinite(stats)).any(dim=0).sum()
        before = self._counts.get(stats.device)
        self._counts[stats.device] = wrong if before is None else before + wrong

    def non_finite(self) -> int:
        """How many tokens so far. Waits for the devices."""
        return sum(int(count) for count in self._counts.values())


_open: list[Watch] = []


def active() -> bool:
    """Whether a watch is open, so that statistics should be handed to it."""
    return bool(_open)


@contextmanager
def watch() -> Iterator[Watch]:
    """Open a watch over the kernel calls of this process until the block ends.

    Watches may be nested.
    """
    found = Watch()
    _open.append(found)
    try:
        yield found
    finally:
        _open.remove(found)


def count_non_finite(stats: Tensor) -> None:
    """Tell the open watches about statistics[k, N]; free when there are none."""
    for found in _open:
        found.add(stats)
