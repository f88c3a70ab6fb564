"""Which rows the next forward pass runs: what paths lack, within a budget, or rows that are given. Changes nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from appo.errors import EngineError, StaleWeightsError
from appo.rollout.native.tree.layout import Unit
from appo.rollout.native.tree.node import Node


def planned_units(leaves: Sequence[Node], budget: int) -> tuple[list[Unit], int]:
    """(units, rows of sequences that lack just one): see SegmentTree.plan."""
    units: dict[int, Unit] = {}
    decode_rows = 0
    for leaf in leaves:
        *ancestors, (_, own) = leaf.path()
        for node, count in ancestors:
            budget = _extend(units, node, count, budget)
            if _done(units, node) < count:
                break
        else:
            done = min(_done(units, leaf), own - 1)
            if own - done == 1:
                units.setdefault(leaf.id, Unit(leaf, done, 0)).count += 1
                decode_rows += 1
            else:
                budget = _extend(units, leaf, own, budget)
            if _done(units, leaf) >= own:
                units[leaf.id].sampled = leaf.handle
    return list(units.values()), decode_rows


def given_units(
    nodes: Mapping[int, Node], units: Sequence[tuple[int, int, int]], version: int
) -> list[Unit]:
    """(node id, first own position, count) each, checked: see SegmentTree.layout."""
    chosen: dict[int, Unit] = {}
    for id, start, count in units:
        node = nodes.get(id)
        if node is None or id in chosen:
            problem = "unknown" if node is None else "named twice"
            raise EngineError(f"layout: node {id} is {problem}; take ids from path(), each once")
        if count < 1 or not 0 <= start <= node.kv or start + count > len(node.tokens):
            raise EngineError(
                f"layout: rows {start} … {start + count - 1} of node {id}; it has {len(node.tokens)} tokens and "
                f"KV of {node.kv}, rows start where KV ends or before"
            )
        chosen[id] = Unit(node, start, count)
    for unit in chosen.values():
        for node, count in unit.node.chain():
            if _done(chosen, node) < count:
                error = StaleWeightsError if node.outdated(count) else EngineError
                raise error(
                    f"layout: node {unit.node.id} reads {count} positions of node {node.id}, which has KV of "
                    f"{_done(chosen, node)} under version {version}; run these first"
                )
    return list(chosen.values())


def _done(units: dict[int, Unit], node: Node) -> int:
    """Own positions that have KV or are planned."""
    unit = units.get(node.id)
    return node.kv if unit is None else max(node.kv, unit.start + unit.count)


def _extend(units: dict[int, Unit], node: Node, count: int, budget: int) -> int:
    """Plan own positions of a node up to `count` as far as the budget goes; returns what is left of it."""
    done = _done(units, node)
    take = min(count - done, budget)
    if take <= 0:
        return budget
    unit = units.setdefault(node.id, Unit(node, done, 0))
    unit.count += take
    return budget - take
