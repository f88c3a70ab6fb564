"""Which rows go into which stream.

Trees as flat tables, cut where they exceed the token budget, binned where they fit.

Every step is linear in nodes and rows: a row walks up only to the first node that its stream holds
already.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from appo.errors import DataError
from appo.types import Node, RolloutTree


class Forest:
    """The nodes of all trees of a mini-batch, one after the other.

    Node n of tree i has number first[i] + n.

    parent (-1 for a prompt), fork, length, depth (path tokens before the node's own) and top (the
    child of the prompt above or at the node; a prompt is its own) are plain lists: they are read
    one at a time.

    Raises DataError for a tree whose nodes do not come after their parents or do not fork inside
    them.
    """

    def __init__(self, trees: Sequence[RolloutTree]):
        self.trees = trees
        self.nodes: list[Node] = [n for t in trees for n in t.nodes]
        self.first: list[int] = []
        self.parent: list[int] = []
        self.fork: list[int] = [n.fork_at for n in self.nodes]
        self.length: list[int] = [len(n.token_ids) for n in self.nodes]
        for t in trees:
            self.first.append(len(self.parent))
            at = self.first[-1]
            self.parent += [-1 if n.parent is None else at + n.parent for n in t.nodes]
        self._check()
        self.depth: list[int] = []
        self.top: list[int] = []
        for n, p in enumerate(self.parent):
            self.depth.append(0 if p < 0 else self.depth[p] + self.fork[n])
            self.top.append(n if p < 0 or self.parent[p] < 0 else self.top[p])

    def _check(self) -> None:
        counts = [len(t.nodes) for t in self.trees]
        first = np.repeat(np.array(self.first, np.int64), counts)
        n, parent = np.arange(len(first)), np.array(self.parent, np.int64)
        fork, length = np.array(self.fork, np.int64), np.array(self.length, np.int64)
        prompt = n == first
        wrong = np.where(prompt, parent >= 0, (parent < first) | (parent >= n))
        above = np.where(prompt | wrong, n, parent)
        wrong |= ~prompt & ((fork < 0) | (fork > length[above]))
        wrong |= ~prompt & (above == first) & (fork != length[above])
        if wrong.any():
            at = int(np.flatnonzero(wrong)[0])
            i, node = int(np.searchsorted(np.cumsum(counts), at, "right")), self.nodes[at]
            raise DataError(
                f"task {self.trees[i].task.task_id!r}, node {at - self.first[i]}: parent {node.parent}, fork_at "
                f"{node.fork_at}; node 0 is the prompt, every other node comes after its parent and forks inside its "
                "tokens (from the end of the prompt)"
            )

    def prompt_len(self, tree: int) -> int:
        """Tokens of a tree's prompt."""
        return self.length[self.first[tree]]

    def leaf(self, tree: int, leaf: int) -> int:
        """Number of the last node of a row."""
        return self.first[tree] + self.trees[tree].leaves[leaf].node

    def row_len(self, tree: int, leaf: int) -> int:
        """Response tokens of a row, tool tokens included."""
        n = self.leaf(tree, leaf)
        return self.depth[n] + self.length[n] - self.prompt_len(tree)


@dataclass
class SubTree:
    """Rows of one tree that share a stream.

    The nodes they pass, and how many own tokens of each they reach.
    """

    forest: Forest
    tree: int
    rows: list[int] = field(default_factory=list)  # positions in the tree's list of credits
    take: dict[int, int] = field(default_factory=dict)
    size: int = 0  # distinct tokens

    def cost(self, leaf: int) -> int:
        """Tokens that a row ending in node `leaf` would add."""
        f, n, k, new = self.forest, leaf, self.forest.length[leaf], 0
        while n >= 0:
            have = self.take.get(n)
            if have is not None:
                return new + max(0, k - have)
            new += k
            n, k = f.parent[n], f.fork[n]
        return new

    def add(self, row: int, leaf: int) -> None:
        """Take row number `row`, which ends in node `leaf`: `size` grows by its `cost`."""
        f, n, k = self.forest, leaf, self.forest.length[leaf]
        self.rows.append(row)
        while n >= 0:
            have = self.take.get(n)
            if have is None or k > have:
                self.take[n] = k
                self.size += k - (have or 0)
            if have is not None:
                return
            n, k = f.parent[n], f.fork[n]

    def absorb(self, other: SubTree) -> None:
        """Take over another subtree of this tree that shares nothing with it but the prompt."""
        self.size += other.size - self.forest.prompt_len(self.tree)
        self.rows += other.rows
        self.take |= other.take


def cut(forest: Forest, tree: int, leaves: dict[int, int], budget: int) -> list[SubTree]:
    """Subtrees of at most `budget` tokens.

    The tree as a whole, else its roots first-fit, else its rows.

    `leaves` maps the position of a row in the tree's list of credits to the number of its last
    node. Only a single row makes a subtree over the budget.
    """
    by_root: dict[int, list[int]] = {}
    for row, leaf in leaves.items():
        by_root.setdefault(forest.top[leaf], []).append(row)
    whole = SubTree(forest, tree)
    for rows in by_root.values():
        for row in rows:
            whole.add(row, leaves[row])
    if whole.size <= budget:
        return [whole]

    subtrees: list[SubTree] = []
    prompt = forest.prompt_len(tree)
    for rows in by_root.values():
        root = SubTree(forest, tree)
        for row in rows:
            root.add(row, leaves[row])
        home = next((p for p in subtrees if p.size + root.size - prompt <= budget), None)
        if home is not None:
            home.absorb(root)
        elif root.size <= budget:
            subtrees.append(root)
        else:
            for row in rows:
                _add(subtrees, SubTree(forest, tree), row, leaves[row], budget)
    return subtrees


def _add(subtrees: list[SubTree], empty: SubTree, row: int, leaf: int, budget: int) -> None:
    """Put a row into the first subtree with space, else into one of its own.

    First-fit, not next-fit: then no two subtrees of a tree have space for each other, which
    `fill_bins` relies on.
    """
    home = next((p for p in subtrees if p.size + p.cost(leaf) <= budget), None)
    if home is None:
        home = empty
        subtrees.append(home)
    home.add(row, leaf)


def fill_bins(subtrees: Sequence[SubTree], budget: int) -> list[list[SubTree]]:
    """Streams of subtrees by first-fit decreasing; a subtree over the budget has one to itself.

    Two subtrees of one tree never meet: `cut` would have joined them. Streams, and subtrees in a
    stream, keep the order in which the subtrees came.
    """
    space = np.full(len(subtrees), budget, np.int64)
    streams: list[list[int]] = []
    for at in sorted(range(len(subtrees)), key=lambda at: (-subtrees[at].size, at)):
        size = subtrees[at].size
        to = int(np.argmax(space >= size)) if size <= budget else len(streams)
        if to == len(streams):
            streams.append([])
        streams[to].append(at)
        space[to] -= size
    return [[subtrees[at] for at in sorted(s)] for s in sorted(map(sorted, streams))]
