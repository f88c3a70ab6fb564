"""The work of one step, the same for everybody.

A tree of tokens, which of its rows train, and the rows as sequences.

Imports nothing of appo at the top: peers in other environments read this file too.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np


class Run(NamedTuple):
    """A run of tokens: forked off `parent` (None: the prompt) after `fork_at` of its tokens."""

    parent: int | None
    fork_at: int
    length: int


class Row(NamedTuple):
    """One rollout as an independent sequence.

    Advantage 0: it goes through the model and trains nothing.
    """

    prompt: list[int]
    response: list[int]
    advantage: float


@dataclass(frozen=True)
class Work:
    """One prompt group.

    roots, branches  rollouts of `response` tokens; branch b of a root leaves it after a share b /
                     (B + 1)
    levels           instead of roots and branches: (forks, tokens) per level below the prompt, an
                     agent's tree
    every_row        train branches and leaves alike; else the roots only
    """

    name: str
    prompt: int
    response: int
    roots: int = 0
    branches: int = 0
    levels: tuple[tuple[int, int], ...] = ()
    every_row: bool = False
    vocab: int = 49152

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def of(values: dict[str, Any]) -> Work:
        levels = tuple((int(forks), int(tokens)) for forks, tokens in values["levels"])
        return Work(**values | {"levels": levels})

    def runs(self) -> list[Run]:
        runs = [Run(None, 0, self.prompt)]
        if self.levels:
            tips = [0]
            for forks, tokens in self.levels:
                ends = [(tip, runs[tip].length) for tip in tips for _ in range(forks)]
                tips = list(range(len(runs), len(runs) + len(ends)))
                runs += [Run(tip, end, tokens) for tip, end in ends]
            return runs
        for _ in range(self.roots):
            root = len(runs)
            runs.append(Run(0, self.prompt, self.response))
            for b in range(1, self.branches + 1):
                fork = self.response * b // (self.branches + 1)
                runs.append(Run(root, fork, self.response - fork))
        return runs

    def leaves(self) -> list[tuple[int, bool]]:
        """(run a rollout ends with, whether it trains)."""
        runs = self.runs()
        if self.levels:
            inner = {r.parent for r in runs}
            return [(i, True) for i in range(1, len(runs)) if i not in inner]
        return [(i, self.every_row or runs[i].parent == 0) for i in range(1, len(runs))]

    def ids(self) -> list[list[int]]:
        rng = np.random.default_rng(0)
        return [rng.integers(self.vocab, size=r.length).tolist() for r in self.runs()]

    def rows(self) -> list[Row]:
        runs, ids, rows = self.runs(), self.ids(), []
        for number, (leaf, trains) in enumerate(self.leaves()):
            path, at, take = [], leaf, runs[leaf].length
            while at != 0:
                path.append(ids[at][:take])
                at, take = runs[at].parent or 0, runs[at].fork_at
            response = [t for part in reversed(path) for t in part]
            rows.append(Row(ids[0], response, (1.0 if number % 2 else -1.0) * trains))
        return rows

    def trained_tokens(self) -> int:
        return sum(len(row.response) for row in self.rows() if row.advantage)


def batches(work: Work, budget: int, only: list[int] | None = None) -> tuple[list[Any], Any]:
    """(packed streams, counts) of the trained rows.

    `only`: each of these rows as a tree of its own, sharing nothing.
    """
    from appo.packing.pack import pack
    from appo.types import Counts

    trees, credits = ([tree(work)], [credits_of(work)]) if only is None else separate(work, only)
    trained = [c for cs in credits for c in cs]
    tokens = sum(len(c.advantage) for c in trained)
    return pack(trees, credits, token_budget=budget), Counts(tokens, len(trained), len(trained))


def tree(work: Work) -> Any:
    """The work as a RolloutTree."""
    from appo.types import Leaf, Node, RolloutTree, Task

    def node(run: Run, ids: list[int], number: int) -> Node:
        if run.parent is None:
            return Node(None, "prompt", 0, ids)
        values = [-2.0] * run.length, [2.0] * run.length
        return Node(run.parent, "model", run.fork_at, ids, *values, 0, (number,))

    nodes = [node(run, ids, i) for i, (run, ids) in enumerate(zip(work.runs(), work.ids()))]
    leaves = [Leaf(leaf, i) for i, (leaf, _) in enumerate(work.leaves())]
    return RolloutTree(Task("bench", [], ""), nodes, leaves)


def credits_of(work: Work) -> list[Any]:
    from appo.types import Credit

    return [
        Credit(i, np.full(len(row.response), row.advantage), np.ones(len(row.response), bool))
        for i, row in enumerate(work.rows())
        if row.advantage
    ]


def separate(work: Work, only: list[int]) -> tuple[list[Any], list[Any]]:
    """A tree per row: nothing is shared, not even the prompt."""
    from appo.types import Credit, Leaf, Node, RolloutTree, Task

    trees, credits = [], []
    for i in only:
        prompt, response, advantage = work.rows()[i]
        n = len(response)
        nodes = [
            Node(None, "prompt", 0, prompt),
            Node(0, "model", len(prompt), response, [-2.0] * n, [2.0] * n, 0, (0,)),
        ]
        trees.append(RolloutTree(Task(f"row {i}", [], ""), nodes, [Leaf(1, 0)]))
        credits.append([Credit(0, np.full(n, advantage), np.ones(n, bool))])
    return trees, credits
