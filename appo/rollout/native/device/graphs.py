"""CUDA graphs of passes that come again in the same shape.

The first pass of a shape runs as it is: that compiles the kernels and warms the libraries up. The
second is captured, and from then on it is replayed: one launch instead of some twenty per layer. A
graph keeps the addresses it saw, so it is dropped when the weights, the pool or the tables move.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable

import torch
from torch import Tensor


class Graphs:
    """`run(key, body)`: body() once, captured or replayed.

    Its result is overwritten by the next run with that key.

    why_not   why nothing is captured; None where graphs are in use
    """

    def __init__(self, device: torch.device, wanted: bool = True):
        self.why_not: str | None = None
        if not wanted:
            self.why_not = "switched off"
        elif device.type != "cuda":
            self.why_not = f"the model is on {device}"
        self._seen: dict[Hashable, tuple[torch.cuda.CUDAGraph, Tensor] | None] = {}
        self._memory: tuple[int, ...] = ()

    def keep(self, *memory: int) -> None:
        """Drop all graphs if `memory` is not that of the last call.

        memory: addresses and sizes of what the graphs read
        """
        if memory != self._memory:
            self.clear()
            self._memory = memory

    def clear(self) -> None:
        """Drop all graphs; the next call of each key runs as it is."""
        self._seen.clear()

    @property
    def captured(self) -> int:
        """Number of graphs that can be replayed."""
        return sum(known is not None for known in self._seen.values())

    def run(self, key: Hashable, body: Callable[[], Tensor]) -> Tensor:
        """The result of `body`.

        Run at a key's first call, captured at its second, replayed after.
        """
        if self.why_not is not None:
            return body()
        if key not in self._seen:
            self._seen[key] = None
            return body()
        if (known := self._seen[key]) is None:
            try:
                known = self._seen[key] = self._capture(body)
            except (
                RuntimeError
            ) as error:  # an operation of this model or library cannot be captured
                self.why_not = f"a capture failed: {error}"
                warnings.warn(f"appo: decoding without CUDA graphs, {self.why_not}", stacklevel=2)
                return body()
        graph, out = known
        graph.replay()
        return out

    def _capture(self, body: Callable[[], Tensor]) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        """In the memory of the graphs before it.

        They never run at the same time, and their results stay allocated.
        """
        graph = torch.cuda.CUDAGraph()
        shared = next((known[0].pool() for known in self._seen.values() if known), None)
        with torch.cuda.graph(graph, pool=shared, capture_error_mode="thread_local"):
            out = body()
        return graph, out
