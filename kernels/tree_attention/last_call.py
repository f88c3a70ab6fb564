"""What is derived from the ends of a stream is derived once.

All layers of a model ask with the same tensor, one by one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar

from torch import Tensor

T = TypeVar("T")


class LastCall(Generic[T]):
    """`make(subtree_end, *more)`, remembered for the last tensor asked about.

    A write to the tensor makes the result stale; it is then made again. Holds on to that tensor.
    """

    def __init__(self, make: Callable[..., T]):
        self._make = make
        self._last: tuple[Tensor, int, tuple[Any, ...], T] | None = None

    def __call__(self, subtree_end: Tensor, *more: Any) -> T:
        """What `make` gives for this tensor and these further arguments."""
        if subtree_end.is_inference():  # has no version: a write to it would go unnoticed
            return self._make(subtree_end, *more)
        last = self._last
        if last and last[0] is subtree_end and last[1] == subtree_end._version and last[2] == more:
            return last[3]
        made = self._make(subtree_end, *more)
        self._last = (
            subtree_end,
            subtree_end._version,
            more,
            made,
        )  # one assignment: threads see all or nothing
        return made
