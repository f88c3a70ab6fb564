"""The segment tree: who inherits which tokens from whom, and who owns which blocks of KV.

The plain definition.

    tree = SegmentTree(max_blocks=1024)
    prompt = tree.add(ids)
    roots = [tree.fork(prompt, len(ids)) for _ in range(8)]
    layout = tree.plan(roots, budget=512)      # run the rows it lists, then
    tree.commit(layout)                        # their KV is there
    tree.extend(roots[0], [token])

A node owns the tokens and the KV it adds, from its `base` on; everything before belongs to
ancestors. A fork at token `at` starts a child at base = at - 1: the child inherits the KV of
positions < at - 1 and runs token at - 1 as its own first row, so there is no special path for "the
last token of a prefix". A node only appends, hence a fork takes no block and copies nothing, and a
parent may go on decoding. Blocks are taken one by one, when rows are planned that fill them.
native_tree.py is the same in C++.

New weights void all KV. A sequence is stale while some position that others or its next rows read
had KV under older weights and has not been run under these. So running a part of a node (`layout`)
lets forks that stand within that part go on, and nobody else. A sequence's last token is run again
in any case: whether it had KV does not matter.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from operator import index

from appo.errors import EngineError, StaleWeightsError
from appo.rollout.native.tree.block_list import blocks_for
from appo.rollout.native.tree.layout import Layout, RowRange, lay_out
from appo.rollout.native.tree.node import SegmentNode
from appo.rollout.native.tree.plan import given_ranges, planned_ranges
from appo.rollout.native.tree.tree_facts import TreeFacts


class SegmentTree(TreeFacts):
    """Sequences are handles (ints, never reused), nodes have ids of their own.

    Errors: EngineError, StaleWeightsError.

    max_blocks   blocks of 16 positions there may be; None: no limit
    """

    # -- sequences ---------------------------------------------------------------------------------

    def add(self, ids: Sequence[int]) -> int:
        """A new root with these tokens."""
        if not len(ids):
            raise EngineError("add: ids is empty; a sequence needs at least one token")
        return self._name(self._grow(None, 0, [index(t) for t in ids]))

    def fork(self, seq: int, at: int) -> int:
        """A child that inherits tokens < at and will run token at - 1 as its first row."""
        node, at = self._get(seq), index(at)
        if not 1 <= at <= node.length:
            raise EngineError(
                f"fork(seq={seq}, at={at}): at must be in 1 … {node.length}, the sequence's length"
            )
        self._check_fresh(node, at - 1, "fork")
        return self._name(self._grow(node, at - 1, [node.token(at - 1)]))

    def extend(self, seq: int, ids: Sequence[int]) -> None:
        """Append tokens; they are run when the sequence is planned."""
        self._get(seq).tokens.extend([index(t) for t in ids])

    def truncate(self, seq: int, length: int) -> None:
        """Drop tokens from absolute position `length` on, and the KV from the last token left on.

        It runs again.

        If children stand on what is dropped they keep it: a fork of the node takes the handle.
        """
        node, length = self._get(seq), index(length)
        if not 1 <= length <= node.length:
            raise EngineError(
                f"truncate(seq={seq}, length={length}): length must be in 1 … {node.length}, the sequence's length"
            )
        if length == node.length:
            return
        if length > node.base and node.inherited < length - node.base:
            self._cut(node, length - node.base, length - node.base - 1)
            return
        fresh = self._grow(node, length - 1, [node.token(length - 1)])
        fresh.handle, node.handle = seq, None
        fresh.refs += 1
        self._seqs[seq] = fresh
        self._drop(node)

    def release(self, seq: int) -> None:
        """Give the handle back. What no descendant inherits goes, and its blocks with it."""
        node = self._get(seq)
        del self._seqs[seq]
        node.handle = None
        self._drop(node)

    def evict(self, seq: int, keep: Mapping[int, int] | None = None) -> int:
        """Free KV; tokens stay and are run again when planned.

        Returns the number of blocks given back.

        keep   None: the KV of the own positions that no child inherits. Otherwise node → own
               positions that must stay (the union of the paths of those that go on): what neither
               these nor descendants with KV need is freed on the whole path, so that prompts whose
               descendants are all evicted can be evicted too.
        """
        node: SegmentNode | None = self._get(seq)
        assert node is not None
        if keep is None:
            return self._keep(node, node.inherited)
        freed = 0
        while node is not None:
            with_kv = (c.base - node.base for c in node.children.values() if c.kv or c.planned)
            freed += self._keep(node, max(keep.get(node.id, 0), *with_kv, 0))
            node = node.parent
        return freed

    def new_version(self, version: int) -> None:
        """New weights: all KV is void. Sequences that had some are stale until scored."""
        self.version = version
        for node in self.nodes.values():
            self._keep(node, 0)
            read = len(node.tokens) - (node.handle is not None)  # the last one is run again
            node.lost, node.seen = max(node.lost, min(node.seen, read)), 0

    # -- planning ----------------------------------------------------------------------------------

    def plan(self, seqs: Sequence[int], budget: int) -> Layout | int:
        """Rows for sequences, in this order: what each path lacks.

        Missing ancestors are run once, for whoever asks first.

        budget   the most rows of prefill; a sequence that lacks just its last row is always in
        Returns the open layout, or how many blocks there are too few (nothing has changed then).
        """
        self._check_closed("plan")
        leaves = []
        named: set[int] = set()
        for seq in seqs:
            leaves.append(self._get(seq))
            if seq in named:
                raise EngineError(f"plan: sequence {seq} is named twice; name it once")
            named.add(seq)
            self._check_fresh(leaves[-1], leaves[-1].length, "plan")
        return self._settle(*planned_ranges(leaves, budget))

    def layout(self, ranges: Sequence[tuple[int, int, int]]) -> Layout | int:
        """Rows given as (node id, first own position, count), each node at most once.

        Ancestors are covered or among them.

        Rows that have KV already are run again and write nothing. Nothing is sampled. Returns as
        `plan` does.
        """
        self._check_closed("layout")
        return self._settle(given_ranges(self.nodes, ranges, self.version), 0)

    def commit(self, layout: Layout) -> None:
        """The rows have been run: their KV counts from now on.

        Blocks given back meanwhile are free.
        """
        for row_range in self._closing(layout, "commit"):
            node = row_range.node
            if node.planned:
                self.tokens_held += node.planned - node.kv
                node.kv, node.planned = node.planned, 0
                node.seen = max(node.seen, node.kv)
        self.blocks.settle()

    def abort(self, layout: Layout) -> None:
        """The rows have not been run: the blocks taken for them are free."""
        self._cancel(self._closing(layout, "abort"))

    def need(self, seqs: Sequence[int], ends: Sequence[int]) -> int:
        """Blocks still to be taken if every sequence grew to its end, shared ones once.

        The last token of a sequence is not run.
        """
        if len(seqs) != len(ends):
            raise EngineError(
                f"need: {len(seqs)} sequences and {len(ends)} ends; give one for each"
            )
        want: dict[int, tuple[SegmentNode, int]] = {}
        for seq, end in zip(seqs, ends):
            leaf = self._get(seq)
            for node, count in (*leaf.chain(), (leaf, end - 1 - leaf.base)):
                known = want.get(node.id, (node, 0))[1]
                want[node.id] = node, max(known, count)
        return sum(max(0, blocks_for(count) - len(node.blocks)) for node, count in want.values())

    # -- inside ------------------------------------------------------------------------------------

    def _check_fresh(self, node: SegmentNode, end: int, operation: str) -> None:
        if node.stale(end):
            raise StaleWeightsError(
                f"{operation}(seq={node.handle}): its KV was computed before version {self.version}; "
                f"call score([{node.handle}]) first, or start again from the prompt"
            )

    def _check_closed(self, operation: str) -> None:
        if self._open is not None:
            raise EngineError(f"{operation}: a layout is open; commit or abort it first")

    def _grow(self, parent: SegmentNode | None, base: int, tokens: list[int]) -> SegmentNode:
        while parent is not None and base <= parent.base:
            parent = parent.parent  # nothing of this one is inherited
        node = SegmentNode(self._next_node, parent, base, tokens)
        self._next_node += 1
        self.nodes[node.id] = node
        if parent is not None:
            parent.children[node.id] = node
            parent.refs += 1
        return node

    def _name(self, node: SegmentNode) -> int:
        seq = node.handle = self._next_seq
        self._next_seq += 1
        node.refs += 1
        self._seqs[seq] = node
        return seq

    def _drop(self, node: SegmentNode | None) -> None:
        """One reference less.

        What nobody refers to goes, what only children need is trimmed to what they inherit.
        """
        while node is not None:
            node.refs -= 1
            if node.refs:
                if node.handle is None:
                    keep = node.inherited
                    self._cut(node, keep, keep)
                return
            self._keep(node, 0)
            del self.nodes[node.id]
            if node.parent is not None:
                del node.parent.children[node.id]
            node = node.parent

    def _cut(self, node: SegmentNode, size: int, count: int) -> None:
        """Drop own tokens from `size` on, and from `count` on all that is known of their KV."""
        del node.tokens[size:]
        self._keep(node, count)
        node.seen, node.lost = min(node.seen, count), min(node.lost, count)

    def _keep(self, node: SegmentNode, count: int) -> int:
        """Forget the KV of own positions from `count` on.

        Returns the number of blocks that gives back.
        """
        self.tokens_held -= max(0, node.kv - count)
        node.kv = min(node.kv, count)
        planned = min(node.planned, count)
        node.planned = planned if planned > node.kv else 0
        spare = node.blocks[blocks_for(max(node.kv, node.planned)) :]
        if spare:
            del node.blocks[-len(spare) :]
            self.blocks.give_back(spare, node.id, defer=self._open is not None)
        return len(spare)

    def _settle(self, ranges: list[RowRange], decode_rows: int) -> Layout | int:
        """Take the blocks that the ranges fill and open their layout, or tell how many are lacking."""
        ends = [u.start + u.count for u in ranges]
        more = [max(0, blocks_for(end) - len(u.node.blocks)) for u, end in zip(ranges, ends)]
        lacking = self.blocks.lacking(sum(more))
        if lacking:
            return lacking
        self._check_versions(ranges)
        try:
            for row_range, end, count in zip(ranges, ends, more):
                row_range.node.blocks += self.blocks.take(count, row_range.node.id, self.version)
                row_range.node.planned = end if end > row_range.node.kv else 0
            self._open, self._open_ranges = lay_out(ranges, decode_rows), ranges
        except BaseException:
            self._cancel(ranges)
            raise
        return self._open

    def _cancel(self, ranges: Sequence[RowRange]) -> None:
        """The rows are not run: give back what was taken for them."""
        for row_range in ranges:
            row_range.node.planned = 0
            self._keep(row_range.node, row_range.node.kv)
        self.blocks.settle()

    def _check_versions(self, ranges: list[RowRange]) -> None:
        nodes = {node.id: node for row_range in ranges for node, _ in row_range.node.path()}
        for node in nodes.values():
            for block in node.blocks:
                if self.blocks.version[block] != self.version:
                    raise StaleWeightsError(
                        f"block {block} of node {node.id} holds KV of version {self.blocks.version[block]}, "
                        f"the weights are version {self.version}; it must not be read"
                    )

    def _closing(self, layout: Layout, operation: str) -> list[RowRange]:
        if layout is None or layout is not self._open:
            raise EngineError(
                f"{operation}: this layout is not open; each one is committed or aborted once"
            )
        ranges, self._open, self._open_ranges = self._open_ranges, None, []
        return [u for u in ranges if u.node.id in self.nodes]
