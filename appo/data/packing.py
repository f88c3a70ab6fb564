"""From rollout trees to flat token streams that a transformer reads once.

A tree is laid out so that every shared token appears once. Two numbers per token say all that attention needs:
its depth in the path (`position_ids`) and where its subtree ends in the stream (`tout`): query q sees key k iff
k ≤ q < tout[k]. A token may have several successors, so next-token targets live on *edges*, gathered per row;
nothing is ever shifted by one. Only rows that carry loss are laid out.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from torch import Tensor

from appo.errors import DataError
from appo.types import Counts, Credit, RolloutTree

__all__ = [
    "Counts",
    "PackedBatch",
    "interval_mask",
    "pack",
    "pack_sequences",
    "sharing_report",
    "trains",
]


@dataclass
class PackedBatch:
    """One stream of T tokens with R rows and E edges (response tokens of every row, tool tokens included).

    token_ids[T] int64 · position_ids[T] int64 (depth in the path) · tout[T] int32 (end of the token's subtree)

    source[E] int64      stream index whose hidden state predicts the edge's token
    target[E] int64      the token id
    offsets[R+1] int64   row r owns edges offsets[r] … offsets[r+1], in response order
    mask[E] bool         True where the token is trained
    behaviour[E] float32 log-prob recorded when the token was sampled, 0 for tool tokens
    version[E] int64     policy version that sampled the token, -1 for tool tokens
    advantage[E] float32 · weight[R] float32 · rows[R] (tree index, leaf index)
    total_tokens         tokens of the same rows laid out as independent sequences

    >>> prompt (5 6), two rows (7 8) and (7 9), forked after 7:
    >>> token_ids [5 6 7 8 9]  position_ids [0 1 2 3 3]  tout [5 5 5 4 5]
    >>> source [1 2 1 2]  target [7 8 7 9]  offsets [0 2 4]
    """

    token_ids: Tensor
    position_ids: Tensor
    tout: Tensor
    source: Tensor
    target: Tensor
    offsets: Tensor
    mask: Tensor
    behaviour: Tensor
    version: Tensor
    advantage: Tensor
    weight: Tensor
    rows: list[tuple[int, int]]
    total_tokens: int

    @property
    def unique_tokens(self) -> int:
        return self.token_ids.numel()

    def to(self, device: torch.device | str) -> PackedBatch:
        """The same batch with every tensor on `device`."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(
            self, **{k: v.to(device) for k, v in values.items() if isinstance(v, Tensor)}
        )


def trains(credit: Credit) -> bool:
    """True when the row can move a weight: some trained token has an advantage other than zero (NaN counts)."""
    return bool((np.asarray(credit.advantage)[np.asarray(credit.loss_mask, bool)] != 0).any())


def pack(
    trees: Sequence[RolloutTree],
    credits: Sequence[Sequence[Credit]],
    *,
    token_budget: int,
    keep_all: bool = False,
) -> list[PackedBatch]:
    """Lay the trained rows of `trees` out in streams of at most `token_budget` tokens each. O(tokens).

    `credits[i]` are the rows of tree i; rows for which `trains` is False are left out, unless `keep_all` (a loss with
    a term that does not depend on the advantage, such as an entropy bonus). Whole trees share a stream in
    order; a tree over the budget is cut between root rollouts (its prompt is repeated), a root over the budget
    between rows; a single row over the budget gets a stream of its own.

    Raises DataError when a credit does not fit its row (length, or loss on a token that was not sampled).
    """
    streams: list[_Stream] = [_Stream()]
    for i, (tree, rows) in enumerate(zip(trees, credits, strict=True)):
        for c in rows:
            _check(tree, c)
        kept = [c for c in rows if keep_all or trains(c)]
        for unit in _cut(tree, kept, token_budget):
            if (
                streams[-1].size
                and streams[-1].size + streams[-1].cost(i, tree, unit) > token_budget
            ):
                streams.append(_Stream())
            streams[-1].add(i, tree, unit)
    return [_lay_out(s, trees) for s in streams if s.rows]


def _check(tree: RolloutTree, credit: Credit) -> None:
    """Raise DataError when a credit does not fit the row it names."""
    view = tree.trajectory(credit.leaf)
    mask = np.asarray(credit.loss_mask, bool)
    name = f"task {tree.task.task_id!r}, leaf {credit.leaf}"
    if not len(mask) == len(credit.advantage) == len(view):
        raise DataError(
            f"{name}: {len(view)} response tokens, but {len(credit.advantage)} advantages and {len(mask)} "
            "loss-mask entries; a Credit needs one of each per response token, tool tokens included"
        )
    if (mask & ~view.mask).any():
        at = int(np.flatnonzero(mask & ~view.mask)[0])
        raise DataError(
            f"{name}: loss_mask is True at response position {at}, which the policy did not sample"
        )
    if not view.prompt_len:
        raise DataError(
            f"{name}: the prompt is empty, so nothing predicts the first response token"
        )


def _cut(tree: RolloutTree, rows: list[Credit], budget: int) -> list[list[Credit]]:
    """Units of rows that stay together: the whole tree, else its roots, else single rows."""
    if not rows:
        return []
    rows = sorted(
        rows, key=lambda c: tree.leaves[c.leaf].root
    )  # stable: rows of a root become neighbours
    if _Stream().cost(0, tree, rows) <= budget:
        return [rows]
    by_root: dict[int, list[Credit]] = defaultdict(list)
    for c in rows:
        by_root[tree.leaves[c.leaf].root].append(c)
    units: list[list[Credit]] = []
    for group in by_root.values():
        fits = _Stream().cost(0, tree, group) <= budget
        units += [group] if fits else [[c] for c in group]
    return units


class _Stream:
    """Rows on their way into one stream, with the exact number of distinct tokens they need."""

    def __init__(self) -> None:
        self.take: dict[int, dict[int, int]] = {}  # tree → node → number of its own tokens needed
        self.rows: list[tuple[int, Credit]] = []
        self.size = 0

    def cost(self, i: int, tree: RolloutTree, unit: Iterable[Credit]) -> int:
        """Tokens that `unit` would add."""
        have, new = self.take.get(i, {}), _needed(tree, unit)
        return sum(max(0, k - have.get(n, 0)) for n, k in new.items())

    def add(self, i: int, tree: RolloutTree, unit: Sequence[Credit]) -> None:
        self.size += self.cost(i, tree, unit)
        have = self.take.setdefault(i, {})
        for n, k in _needed(tree, unit).items():
            have[n] = max(k, have.get(n, 0))
        self.rows += [(i, c) for c in unit]


def _chain(tree: RolloutTree, leaf: int) -> list[tuple[int, int]]:
    """(node index, number of its own tokens on the path) from the prompt to the end of `leaf`."""
    node: int | None = tree.leaves[leaf].node
    take = len(tree.nodes[tree.leaves[leaf].node].token_ids)
    chain = []
    while node is not None:
        chain.append((node, take))
        node, take = tree.nodes[node].parent, tree.nodes[node].fork_at
    return chain[::-1]


def _needed(tree: RolloutTree, rows: Iterable[Credit]) -> dict[int, int]:
    """Node index → how many of its own tokens the rows reach, for every node on a path (0 included)."""
    need: dict[int, int] = {}
    for c in rows:
        for n, k in _chain(tree, c.leaf):
            need[n] = max(k, need.get(n, 0))
    return need


@dataclass
class _Layout:
    """Where the nodes of one tree went: stream index of the first own token and its depth, per node."""

    start: dict[int, int]
    depth: dict[int, int]
    end: int


def _place(tree: RolloutTree, take: Mapping[int, int], at: int, tout: list[np.ndarray]) -> _Layout:
    """Depth-first layout of one tree from stream index `at`; appends the tout runs in stream order.

    A node's own tokens stay together; the nodes forked from it follow, latest fork first. Then a fork at k lies in
    the subtree of exactly the own tokens before k, and own token j ends where the last fork with fork_at > j ends.
    """
    forks: dict[int, list[int]] = defaultdict(list)
    for n in take:
        parent = tree.nodes[n].parent
        if parent is not None:
            forks[parent].append(n)
    layout = _Layout({}, {0: 0}, at)
    order: list[int] = []
    stack = [0]
    while stack:
        n = stack.pop()
        order.append(n)
        layout.start[n] = layout.end
        layout.end += take[n]
        for child in sorted(
            forks[n], key=lambda c: (tree.nodes[c].fork_at, -c)
        ):  # popped latest first
            layout.depth[child] = layout.depth[n] + tree.nodes[child].fork_at
            stack.append(child)

    end: dict[int, int] = {}
    for n in reversed(order):  # children before parents
        end[n] = max([layout.start[n] + take[n], *(end[c] for c in forks[n])])
    for n in order:
        run = np.full(take[n], layout.start[n] + take[n], np.int32)
        for child in sorted(forks[n], key=lambda c: (-tree.nodes[c].fork_at, end[c])):
            run[: tree.nodes[child].fork_at] = end[
                child
            ]  # later in the stream, fewer own tokens see it
        tout.append(run)
    return layout


def _lay_out(stream: _Stream, trees: Sequence[RolloutTree]) -> PackedBatch:
    ids: list[np.ndarray] = []
    positions: list[np.ndarray] = []
    tout: list[np.ndarray] = []
    layouts: dict[int, _Layout] = {}
    at = 0
    for i, take in stream.take.items():
        layouts[i] = layout = _place(trees[i], take, at, tout)
        for n in layout.start:  # in stream order
            ids.append(np.asarray(trees[i].nodes[n].token_ids[: take[n]], np.int64))
            positions.append(np.arange(layout.depth[n], layout.depth[n] + take[n]))
        at = layout.end
    token_ids = np.concatenate(ids)

    edges: dict[str, list[np.ndarray]] = defaultdict(list)
    for i, credit in stream.rows:
        _add_row(edges, trees[i], credit, layouts[i], token_ids)
    lengths = [len(m) for m in edges["mask"]]
    total = sum(trees[i].prompt_len for i, _ in stream.rows) + sum(lengths)
    joined = {k: torch.from_numpy(np.concatenate(v)) for k, v in edges.items()}
    return PackedBatch(
        token_ids=torch.from_numpy(token_ids),
        position_ids=torch.from_numpy(np.concatenate(positions).astype(np.int64)),
        tout=torch.from_numpy(np.concatenate(tout)),
        offsets=torch.from_numpy(np.cumsum([0, *lengths]).astype(np.int64)),
        weight=torch.tensor([c.weight for _, c in stream.rows], dtype=torch.float32),
        rows=[(i, c.leaf) for i, c in stream.rows],
        total_tokens=total,
        **joined,
    )


def _add_row(
    edges: dict[str, list[np.ndarray]],
    tree: RolloutTree,
    credit: Credit,
    layout: _Layout,
    token_ids: np.ndarray,
) -> None:
    """Append the edges of one row: every response token, predicted from the token before it on the path."""
    spans = [np.arange(layout.start[n], layout.start[n] + k) for n, k in _chain(tree, credit.leaf)]
    path = np.concatenate(spans)
    view = tree.trajectory(credit.leaf)
    edges["source"].append(path[view.prompt_len - 1 : -1])
    edges["target"].append(token_ids[path[view.prompt_len :]])
    edges["mask"].append(np.asarray(credit.loss_mask, bool))
    edges["behaviour"].append(np.asarray(view.logprobs, np.float32))
    edges["version"].append(np.asarray(view.version, np.int64))
    edges["advantage"].append(np.asarray(credit.advantage, np.float32))


def pack_sequences(sequences: Sequence[Sequence[int]]) -> PackedBatch:
    """Independent sequences side by side in one stream; edges are tokens 1 … n-1 of each, all unmasked.

    Used to score probes: behaviour and advantage are zero. Raises DataError for a sequence of fewer than two tokens.
    """
    lengths = np.array([len(s) for s in sequences], np.int64)
    if not len(lengths) or lengths.min() < 2:
        raise DataError(
            f"pack_sequences needs sequences of two tokens or more, got lengths {lengths.tolist()}"
        )
    starts = np.cumsum(lengths) - lengths
    token_ids = np.concatenate([np.asarray(s, np.int64) for s in sequences])
    positions = np.arange(len(token_ids)) - np.repeat(starts, lengths)
    target_at = np.flatnonzero(positions > 0)
    edges = len(target_at)
    return PackedBatch(
        token_ids=torch.from_numpy(token_ids),
        position_ids=torch.from_numpy(positions),
        tout=torch.from_numpy(np.repeat(starts + lengths, lengths).astype(np.int32)),
        source=torch.from_numpy(target_at - 1),
        target=torch.from_numpy(token_ids[target_at]),
        offsets=torch.from_numpy(np.cumsum([0, *(lengths - 1)]).astype(np.int64)),
        mask=torch.ones(edges, dtype=torch.bool),
        behaviour=torch.zeros(edges),
        version=torch.full((edges,), -1),
        advantage=torch.zeros(edges),
        weight=torch.ones(len(lengths)),
        rows=[(i, 0) for i in range(len(lengths))],
        total_tokens=len(token_ids),
    )


def interval_mask(tout: Tensor) -> Tensor:
    """bool[T, T]: True where query (row) sees key (column), k ≤ q < tout[k]. For short streams and tests."""
    at = torch.arange(tout.numel(), device=tout.device)
    return (at[None, :] <= at[:, None]) & (at[:, None] < tout[None, :])


def sharing_report(
    trees: Sequence[RolloutTree], batches: Sequence[PackedBatch]
) -> dict[str, float]:
    """What packing saved, as two separate factors.

    pack/skip_factor      tokens of all leaves / tokens of the trained rows, both as independent sequences
    pack/sharing_factor   tokens of the trained rows as independent sequences / tokens in the streams
    """
    everything = float(sum(t.total_tokens() for t in trees))
    trained = float(sum(b.total_tokens for b in batches))
    unique = float(sum(b.unique_tokens for b in batches))
    return {
        "pack/streams": float(len(batches)),
        "pack/rows": float(sum(len(b.rows) for b in batches)),
        "pack/tokens": unique,
        "pack/skip_factor": everything / trained if trained else 0.0,
        "pack/sharing_factor": trained / unique if unique else 0.0,
    }
