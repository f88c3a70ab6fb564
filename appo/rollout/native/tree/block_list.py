"""Which blocks of the pool are taken, by whom, under which weights.

The memory itself is elsewhere (pool.py).

The lowest free id is taken first: blocks in use stay close together and the pool can give back its
end.
"""

from __future__ import annotations

import heapq

from appo.errors import EngineError

BLOCK = 16  # positions per block
FREE = -1  # owner of a block nobody has
DEFERRED = -2  # … of one given back that may still be read


def blocks_for(positions: int) -> int:
    """Blocks that so many positions of a node take."""
    return -(-positions // BLOCK)


class BlockList:
    """Block ids 0, 1, …, each free or owned by one node, the only one that may write it.

    owner, version   per block: node id (FREE: nobody) and weights version of what is in it
    deferred         blocks given back while a forward pass may still read them: neither owned nor
                     free
    """

    def __init__(self, limit: int | None):
        self.limit = limit
        self.owner: list[int] = []
        self.version: list[int] = []
        self.free_ids: list[int] = []  # a heap
        self.deferred: list[int] = []
        self.used = 0
        self.peak = 0
        self._span = 0

    @property
    def capacity(self) -> int:
        """Blocks there may be; without a limit, as many as there have been at once."""
        return len(self.owner) if self.limit is None else self.limit

    @property
    def free(self) -> int:
        """Blocks that may still be taken."""
        return self.capacity - self.used

    @property
    def span(self) -> int:
        """1 + the highest block in use."""
        while self._span and self.owner[self._span - 1] == FREE:
            self._span -= 1
        return self._span

    def lacking(self, count: int) -> int:
        """How many of `count` more blocks there are not."""
        return 0 if self.limit is None else max(0, count - self.free)

    def take(self, count: int, owner: int, version: int) -> list[int]:
        """`count` blocks for a node; the caller has made sure that they are there."""
        taken = []
        for _ in range(count):
            if self.free_ids:
                block = heapq.heappop(self.free_ids)
            else:
                block = len(self.owner)
                self.owner.append(FREE)
                self.version.append(version)
            self.owner[block], self.version[block] = owner, version
            self._span = max(self._span, block + 1)
            taken.append(block)
        self.used += count
        self.peak = max(self.peak, self.used)
        return taken

    def give_back(self, blocks: list[int], owner: int, defer: bool) -> None:
        """Blocks of a node become free, at once or with the next `settle`."""
        for block in blocks:
            if self.owner[block] != owner:
                raise EngineError(
                    f"block {block} is given back by node {owner} but belongs to {self.owner[block]}; "
                    "it was freed before: report this"
                )
            self.owner[block] = DEFERRED
        self.deferred += blocks
        if not defer:
            self.settle()

    def settle(self) -> None:
        """No forward pass is under way: what was given back may be taken again."""
        for block in self.deferred:
            self.owner[block] = FREE
            heapq.heappush(self.free_ids, block)
        self.used -= len(self.deferred)
        self.deferred = []
