"""One node of the segment tree."""

from __future__ import annotations

from collections.abc import Iterator

from appo.rollout.native.tree.block_list import BLOCK


class SegmentNode:
    """One segment. Own position i is absolute position base + i.

    refs     children + handle; the node goes when nobody refers to it
    blocks   own positions 16·j … 16·j + 15 are in blocks[j]
    kv       how many own positions have KV · planned: how many will have it when the open layout is
             committed (0: none)
    seen     how many had KV under these weights, evicted ones included
    lost     how many had KV under older weights; those from `seen` on have not been run since
    """

    __slots__ = (
        "id", "parent", "base", "tokens", "children", "handle", "refs", "blocks", "kv", "planned", "seen", "lost",
    )  # fmt: skip

    def __init__(self, id: int, parent: SegmentNode | None, base: int, tokens: list[int]):
        self.id = id
        self.parent = parent
        self.base = base
        self.tokens = tokens
        self.children: dict[int, SegmentNode] = {}
        self.handle: int | None = None
        self.refs = 0
        self.blocks: list[int] = []
        self.kv = self.planned = self.seen = self.lost = 0

    @property
    def length(self) -> int:
        """Tokens of the path, inherited ones included."""
        return self.base + len(self.tokens)

    @property
    def inherited(self) -> int:
        """Own positions that some child reads."""
        return max((child.base - self.base for child in self.children.values()), default=0)

    def chain(self) -> Iterator[tuple[SegmentNode, int]]:
        """(ancestor, how many of its own positions are on the path), nearest first."""
        node = self
        while node.parent is not None:
            yield node.parent, node.base - node.parent.base
            node = node.parent

    def path(self) -> list[tuple[SegmentNode, int]]:
        """(node, how many of its own positions are on the path), root first."""
        return [*self.chain()][::-1] + [(self, len(self.tokens))]

    def outdated(self, count: int) -> bool:
        """Whether new weights voided KV of one of the first `count` own positions.

        Such a position had KV under older weights and has not been run since.
        """
        return min(self.lost, count) > self.seen

    def stale(self, end: int) -> bool:
        """Whether a position of the path before `end` is outdated."""
        return self.outdated(end - self.base) or any(
            node.outdated(min(count, end - node.base)) for node, count in self.chain()
        )

    def token(self, position: int) -> int:
        """The token at an absolute position of the path."""
        node = self
        while position < node.base:
            assert node.parent is not None
            node = node.parent
        return node.tokens[position - node.base]

    def slot(self, i: int) -> int:
        """Place of own position `i` in the KV pool."""
        return self.blocks[i // BLOCK] * BLOCK + i % BLOCK
