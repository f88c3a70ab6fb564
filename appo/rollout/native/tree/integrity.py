"""Everything that must hold between operations on a segment tree, recomputed from scratch.

Tests call it after every step; an engine may, at the cost of a walk over all nodes and blocks.
"""

from __future__ import annotations

from collections.abc import Sequence

from appo.errors import EngineError
from appo.rollout.native.tree.block_list import BLOCK, DEFERRED, FREE, blocks_for
from appo.rollout.native.tree.layout import Layout, RowRange
from appo.rollout.native.tree.native_tree import NativeTree, Tree
from appo.rollout.native.tree.node import SegmentNode
from appo.rollout.native.tree.segment_tree import SegmentTree


def check_tree(tree: Tree) -> None:
    """Recompute every invariant of a tree in Python or in C++, its open layout included.

    Raises EngineError with the first thing that is wrong.
    """
    if isinstance(tree, NativeTree):
        tree.check()
        return
    layout, ranges = tree._open, tree._open_ranges
    holder: dict[int, int] = {}  # block → node
    ends = {u.node.id: u.start + u.count for u in ranges} if layout is not None else {}
    for node in tree.nodes.values():
        _check_node(node, tree)
        _must(
            node.planned <= ends.get(node.id, 0),
            f"node {node.id} is planned for {node.planned} positions, the open layout runs others",
        )
        for block in node.blocks:
            _must(
                block not in holder,
                f"block {block} is held by nodes {holder.get(block)} and {node.id}",
            )
            holder[block] = node.id
    named = sum(node.handle is not None for node in tree.nodes.values())
    _must(
        named == tree.live_sequences,
        f"{tree.live_sequences} handles are counted, {named} nodes have one",
    )
    refs = sum(node.refs for node in tree.nodes.values())
    live = tree.live_sequences + sum(node.parent is not None for node in tree.nodes.values())
    _must(refs == live, f"{refs} references are counted, {live} are there")
    held = sum(node.kv for node in tree.nodes.values())
    _must(tree.tokens_held == held, f"tokens_held is {tree.tokens_held}, nodes hold {held}")
    _check_blocks(tree, holder, layout is not None)
    if layout is not None:
        _check_slots(tree, layout, ranges)


def _check_node(node: SegmentNode, tree: SegmentTree) -> None:
    name, parent = f"node {node.id}", node.parent
    refs = len(node.children) + (node.handle is not None)
    _must(node.refs == refs > 0, f"{name} counts {node.refs} references, {refs} are there")
    _must(len(node.tokens) >= max(1, node.inherited), f"{name} lacks tokens that children inherit")
    if node.handle is not None:
        _must(tree._seqs.get(node.handle) is node, f"handle {node.handle} is not of {name}")
    else:
        _must(len(node.tokens) == node.inherited, f"{name} has tokens that nobody needs")
    if parent is not None:
        _must(
            parent.children.get(node.id) is node, f"{name} is missing among its parent's children"
        )
        _must(node.base > parent.base, f"{name} inherits nothing from its parent {parent.id}")

    _must(0 <= node.kv <= node.seen <= len(node.tokens), f"{name} has KV of positions it has not")
    _must(
        not node.planned or node.kv < node.planned <= len(node.tokens), f"{name} is planned wrongly"
    )
    _must(0 <= node.lost <= len(node.tokens), f"{name} has lost KV of positions it has not")
    reach = max(node.kv, node.planned)
    blocks = blocks_for(reach)
    _must(
        len(node.blocks) == blocks,
        f"{name} has {len(node.blocks)} blocks, {reach} positions need {blocks}",
    )
    for block in node.blocks:
        _must_be_there(block, tree)
        owner, version = tree.blocks.owner[block], tree.blocks.version[block]
        _must(
            owner == node.id,
            f"block {block} of {name} is {_whose(owner)}: it was given back too early",
        )
        _must(
            version == tree.version,
            f"block {block} of {name} holds KV of version {version}, not {tree.version}",
        )
    if parent is not None and reach:
        inherited = node.base - parent.base
        there = parent.kv if node.kv else max(parent.kv, parent.planned)
        _must(
            there >= inherited,
            f"{name} reads {inherited} positions of node {parent.id}, which has {there}",
        )


def _check_blocks(tree: SegmentTree, holder: dict[int, int], is_open: bool) -> None:
    blocks = tree.blocks
    free, deferred = set(blocks.free_ids), set(blocks.deferred)
    _must(len(free) == len(blocks.free_ids), "a block is on the free list twice")
    for block in (*blocks.free_ids, *blocks.deferred):
        _must_be_there(block, tree)
    _must(is_open or not deferred, "blocks are deferred, but no layout is open")
    for block, owner in enumerate(blocks.owner):
        state = (block in free) + (block in deferred) + (block in holder)
        _must(state == 1, f"block {block} is in {state} of: free list, deferred, held by a node")
        expected = FREE if block in free else DEFERRED if block in deferred else holder[block]
        _must(owner == expected, f"block {block} is {_whose(owner)}, expected {_whose(expected)}")
    used = len(holder) + len(deferred)
    _must(tree.used == used, f"{tree.used} blocks are counted as used, {used} are")
    _must(tree.used <= tree.capacity, "more blocks are used than there may be")
    _must(tree.used <= tree.peak, "the peak is below what is in use")


def _check_slots(tree: SegmentTree, layout: Layout, ranges: Sequence[RowRange]) -> None:
    """Each row writes where its own node may, once, and never where KV is that somebody may read."""
    slots = layout.slots.tolist()
    expected = sum(row_range.count for row_range in ranges)
    _must(len(slots) == expected, f"the open layout has {len(slots)} slots for {expected} rows")
    written = [slot for slot in slots if slot >= 0]
    _must(len(set(written)) == len(written), "two rows of the open layout write to one slot")
    for row_range in ranges:
        node = row_range.node
        live = tree.nodes.get(node.id) is node  # it may have gone meanwhile
        first, start, count = layout.rows_of[node.id]
        for i in range(start, start + count):
            row = first + i - start
            slot = slots[row]
            if live and i < node.kv:
                _must(slot == -1, f"position {i} of node {node.id} has KV and would be overwritten")
            elif live and i < node.planned:
                _must(slot == node.slot(i), f"row {row} writes to slot {slot}, not its own")
            elif (
                slot >= 0
            ):  # it will not count, but nobody else may have the block before the layout is closed
                block = slot // BLOCK
                _must_be_there(block, tree)
                owner = tree.blocks.owner[block]
                _must(
                    owner in (node.id, DEFERRED),
                    f"row {row} of node {node.id} writes to block {block}, which is {_whose(owner)}",
                )


def _must_be_there(block: int, tree: SegmentTree) -> None:
    """Before a block under suspicion is looked up."""
    made = len(tree.blocks.owner)
    _must(0 <= block < made, f"there is no block {block}, only {made}")


def _whose(owner: int) -> str:
    return {FREE: "free", DEFERRED: "deferred"}.get(owner, f"of node {owner}")


def _must(holds: bool, problem: str) -> None:
    if not holds:
        raise EngineError(f"segment tree: {problem}")
