"""Which rows the next forward pass runs: what paths lack, within a budget, or rows that are given.

Changes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from appo.errors import EngineError, StaleWeightsError
from appo.rollout.native.tree.layout import RowRange
from appo.rollout.native.tree.node import SegmentNode


def planned_ranges(leaves: Sequence[SegmentNode], budget: int) -> tuple[list[RowRange], int]:
    """(ranges, rows of sequences that lack just one): see SegmentTree.plan."""
    ranges: dict[int, RowRange] = {}
    decode_rows = 0
    for leaf in leaves:
        *ancestors, (_, own) = leaf.path()
        for node, count in ancestors:
            budget = _extend(ranges, node, count, budget)
            if _done(ranges, node) < count:
                break
        else:
            done = min(_done(ranges, leaf), own - 1)
            if own - done == 1:
                ranges.setdefault(leaf.id, RowRange(leaf, done, 0)).count += 1
                decode_rows += 1
            else:
                budget = _extend(ranges, leaf, own, budget)
            if _done(ranges, leaf) >= own:
                ranges[leaf.id].sampled = leaf.handle
    return list(ranges.values()), decode_rows


def given_ranges(
    nodes: Mapping[int, SegmentNode], ranges: Sequence[tuple[int, int, int]], version: int
) -> list[RowRange]:
    """(node id, first own position, count) each, checked: see SegmentTree.layout."""
    chosen: dict[int, RowRange] = {}
    for id, start, count in ranges:
        node = nodes.get(id)
        if node is None or id in chosen:
            problem = "unknown" if node is None else "named twice"
            raise EngineError(f"layout: node {id} is {problem}; take ids from path(), each once")
        if count < 1 or not 0 <= start <= node.kv or start + count > len(node.tokens):
            raise EngineError(
                f"layout: rows {start} … {start + count - 1} of node {id}; it has {len(node.tokens)} tokens and "
                f"KV of {node.kv}, rows start where KV ends or before"
            )
        chosen[id] = RowRange(node, start, count)
    for row_range in chosen.values():
        for node, count in row_range.node.chain():
            if _done(chosen, node) < count:
                error = StaleWeightsError if node.outdated(count) else EngineError
                raise error(
                    f"layout: node {row_range.node.id} reads {count} positions of node {node.id}, which has KV of "
                    f"{_done(chosen, node)} under version {version}; run these first"
                )
    return list(chosen.values())


def _done(ranges: dict[int, RowRange], node: SegmentNode) -> int:
    """Own positions that have KV or are planned."""
    row_range = ranges.get(node.id)
    return node.kv if row_range is None else max(node.kv, row_range.start + row_range.count)


def _extend(ranges: dict[int, RowRange], node: SegmentNode, count: int, budget: int) -> int:
    """Plan own positions of a node up to `count` as far as the budget goes.

    Returns what is left of it.
    """
    done = _done(ranges, node)
    take = min(count - done, budget)
    if take <= 0:
        return budget
    row_range = ranges.setdefault(node.id, RowRange(node, done, 0))
    row_range.count += take
    return budget - take
