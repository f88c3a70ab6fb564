"""What a segment tree holds, and what may be asked of it; `SegmentTree` is what changes it."""

from __future__ import annotations

from operator import index

from appo.errors import EngineError
from appo.rollout.native.tree.block_list import BLOCK, BlockList
from appo.rollout.native.tree.layout import Layout, RowRange
from appo.rollout.native.tree.node import SegmentNode


class TreeFacts:
    """Nodes, the blocks they own, and handles. Every method leaves all as it is.

    max_blocks   blocks of 16 positions there may be; None: no limit
    """

    BLOCK = BLOCK

    def __init__(self, max_blocks: int | None = None):
        if max_blocks is not None and max_blocks < 1:
            raise EngineError(f"max_blocks={max_blocks}: must be at least 1")
        self.version = 0
        self.tokens_held = 0
        self.nodes: dict[int, SegmentNode] = {}
        self.blocks = BlockList(max_blocks)
        self._seqs: dict[int, SegmentNode] = {}
        self._next_node = self._next_seq = 0
        self._open: Layout | None = None
        self._open_ranges: list[RowRange] = []  # its rows

    # -- facts -------------------------------------------------------------------------------------

    @property
    def capacity(self) -> int:
        """Blocks there may be; without a limit, as many as were in use at once."""
        return self.blocks.capacity

    @property
    def used(self) -> int:
        """Blocks that cannot be taken: owned, or given back while a layout is open."""
        return self.blocks.used

    @property
    def free(self) -> int:
        """Blocks that may still be taken."""
        return self.blocks.free

    @property
    def peak(self) -> int:
        """The most blocks that were in use at once."""
        return self.blocks.peak

    @property
    def span(self) -> int:
        """1 + the highest block in use: the pool needs room for so many."""
        return self.blocks.span

    @property
    def live_sequences(self) -> int:
        """Handles that were given out and not released."""
        return len(self._seqs)

    @property
    def live_nodes(self) -> int:
        """Nodes that a live handle stands on, ancestors included."""
        return len(self.nodes)

    def length(self, seq: int) -> int:
        """Tokens of the sequence, inherited ones included."""
        return self._get(seq).length

    def base(self, seq: int) -> int:
        """First position of its own."""
        return self._get(seq).base

    def tokens(self, seq: int) -> list[int]:
        """All token ids of the sequence."""
        return [t for node, count in self._get(seq).path() for t in node.tokens[:count]]

    def kv(self, seq: int) -> int:
        """Positions of the whole path that have KV, from the root without a gap."""
        total = 0
        for node, count in self._get(seq).path():
            total += min(node.kv, count)
            if node.kv < count:
                break
        return total

    @property
    def open(self) -> Layout | None:
        """The layout that waits for commit or abort."""
        return self._open

    def stale(self, seq: int) -> bool:
        """Whether KV on its path was lost to new weights and not computed again since."""
        node = self._get(seq)
        return node.stale(node.length)

    def path(self, seq: int) -> list[tuple[int, int]]:
        """(node id, how many of its own positions are on the path), root first.

        Of the last one all are.
        """
        return [(node.id, count) for node, count in self._get(seq).path()]

    def blocks_of(self, node_id: int) -> list[int]:
        """The blocks of a node: own positions 16·j … 16·j + 15 are in the j-th."""
        node = self.nodes.get(node_id)
        if node is None:
            raise EngineError(f"blocks_of: node {node_id} is unknown; take ids from path()")
        return list(node.blocks)

    def free_blocks(self) -> list[int]:
        """The blocks below `span` that nobody has and no open layout reads, ascending."""
        return sorted(block for block in self.blocks.free_ids if block < self.span)

    # -- inside ---

    def _get(self, seq: int) -> SegmentNode:
        node = self._seqs.get(index(seq))
        if node is None:
            known = 0 <= seq < self._next_seq
            raise EngineError(
                f"sequence {seq} {'was released' if known else 'is unknown'}; use a live handle"
            )
        return node
