"""The subtrees of one stream as arrays.

Where every node goes, what every token sees, which token predicts which.

A node's own tokens stay together; the nodes forked from it follow, latest fork first. Then a fork
at k lies in the subtree of exactly the own tokens before k, and own token j ends where the last
fork with fork_at > j ends.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from appo.packing.forest import SubTree
from appo.types import Node


@dataclass
class StreamLayout:
    """Nodes of a stream in order of their number, parents first.

    Lists and arrays have one entry per node.

    take: own tokens laid out · start: stream index of the first · size: tokens of the subtree ·
    parent: position of the parent in these lists, -1 for a prompt · head: where the run of the
    stream begins that leads to the node's first token without a gap · at: position of a node, by
    its number
    """

    nodes: list[Node]
    take: list[int]
    start: list[int]
    size: list[int]
    parent: list[int]
    fork: list[int]
    depth: list[int]
    head: list[int]
    at: dict[int, int]


def lay_out(subtrees: Sequence[SubTree]) -> StreamLayout:
    """Depth-first layout of the subtrees, one after the other."""
    forest = subtrees[0].forest
    numbers = [n for p in subtrees for n in sorted(p.take)]
    at = {n: j for j, n in enumerate(numbers)}
    assert len(at) == len(numbers), (
        "two subtrees of one tree in a stream: rows would get each other's tokens"
    )
    take = [k for p in subtrees for _, k in sorted(p.take.items())]
    parent = [at.get(forest.parent[n], -1) for n in numbers]
    fork = [forest.fork[n] for n in numbers]

    size = take.copy()
    for j in range(len(take) - 1, -1, -1):  # children before parents
        if parent[j] >= 0:
            size[parent[j]] += size[j]
    start, head = [0] * len(take), list(range(len(take)))
    free = [0] * len(take)  # where the next child of a node goes
    end = 0
    for j in np.lexsort((-np.array(fork), np.array(parent))).tolist():  # stable: then by number
        p = parent[j]
        if p < 0:
            start[j], end = end, end + size[j]
        else:
            start[j], free[p] = free[p], free[p] + size[j]
            if fork[j] == take[p] and start[j] == start[p] + take[p]:
                head[j] = head[p]
        free[j] = start[j] + take[j]
    return StreamLayout(
        nodes=[forest.nodes[n] for n in numbers],
        take=take,
        start=start,
        size=size,
        parent=parent,
        fork=fork,
        depth=[forest.depth[n] for n in numbers],
        head=head,
        at=at,
    )


@dataclass
class Tokens:
    """Per token of a stream, [T].

    Ids int64, position int64, subtree_end int32, sampled bool, version int64.
    """

    ids: np.ndarray
    position: np.ndarray
    subtree_end: np.ndarray
    sampled: np.ndarray
    version: np.ndarray


class StreamArrays:
    """A layout with its nodes in stream order, for arrays per token."""

    def __init__(self, layout: StreamLayout):
        self.layout = layout
        self.order = np.argsort(np.array(layout.start), kind="stable")
        self.take = np.array(layout.take)[self.order]

    def gather(self, typecode: str, values: Sequence[list | None]) -> np.ndarray:
        """A value per token from a list per node (None: zeros).

        [T]; "q": int64, "d": float64.
        """
        flat: list = []
        for j, k in zip(self.order.tolist(), self.take.tolist()):
            own = values[j]
            flat += [0] * k if own is None else own if len(own) == k else own[:k]
        return np.frombuffer(array(typecode, flat), typecode)  # twice as fast as np.array

    def spread(self, values: Sequence[int] | Sequence[bool]) -> np.ndarray:
        """A value per node, given to each of its tokens. [T]."""
        return np.repeat(np.asarray(values)[self.order], self.take)

    def tokens(self) -> Tokens:
        """What the stream says of each of its tokens, as arrays of length T."""
        lay = self.layout
        shift = self.spread([d - s for d, s in zip(lay.depth, lay.start)])
        sampled = [n.sampled for n in lay.nodes]
        version = [n.policy_version if s else -1 for n, s in zip(lay.nodes, sampled)]
        return Tokens(
            ids=self.gather("q", [n.token_ids for n in lay.nodes]),
            position=np.arange(len(shift)) + shift,
            subtree_end=self._subtree_end(),
            sampled=self.spread(sampled),
            version=self.spread(version),
        )

    def _subtree_end(self) -> np.ndarray:
        """End of every token's subtree.

        Own tokens up to a fork see its end, those after the last fork their node's.
        """
        lay, nodes = self.layout, len(self.order)
        rank = np.empty(nodes, np.int64)
        rank[self.order] = np.arange(nodes)
        start, take, size = np.array(lay.start), np.array(lay.take), np.array(lay.size)
        child = np.flatnonzero(np.array(lay.parent) >= 0)
        owner = np.concatenate([rank[np.array(lay.parent)[child]], rank])
        until = np.concatenate([np.array(lay.fork)[child], take])  # own tokens before it
        ends = np.concatenate([(start + size)[child], start + take])
        later = np.concatenate([-rank[child], np.ones(nodes, np.int64)])  # of equal forks the last
        runs = np.lexsort((later, until, owner))
        owner, until = owner[runs], until[runs]
        length = np.diff(until, prepend=0)
        first = np.diff(owner, prepend=-1) > 0
        length[first] = until[first]
        return np.repeat(ends[runs], length).astype(np.int32)


def response_spans(
    layout: StreamLayout, leaves: Sequence[int], prompts: Sequence[int]
) -> np.ndarray:
    """Stretches of the stream that make up the responses of rows ending in nodes `leaves`.

    int64[S, 2]

    Columns: first stream index, length; row by row from the first response token to the last.
    `prompts[r]` is the number of prompt tokens of row r.
    """
    start, parent, fork, head = layout.start, layout.parent, layout.fork, layout.head
    spans: list[tuple[int, int]] = []
    for r, number in enumerate(leaves):
        j = layout.at[number]
        end = start[j] + layout.take[j]
        mine = []
        while True:
            begin, h = start[head[j]], head[j]
            if parent[h] < 0:
                begin += prompts[r]
            mine.append((begin, end - begin))
            if parent[h] < 0:
                break
            j = parent[h]
            end = start[j] + fork[h]
        spans += reversed(mine)
    return np.array(spans, np.int64).reshape(-1, 2)


def ranges(start: np.ndarray, length: np.ndarray) -> np.ndarray:
    """start[i] … start[i] + length[i] - 1 for every i, one after the other.

    int64[sum of lengths]
    """
    before = np.cumsum(length) - length
    return np.arange(int(length.sum())) + np.repeat(start - before, length)
