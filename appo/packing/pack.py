"""From rollout trees to flat token streams that a transformer reads once.

A tree is laid out so that every shared token appears once. Two numbers per token say all that
attention needs: its depth in the path (`position_ids`) and where its subtree ends in the stream
(`subtree_end`): query q sees key k iff k ≤ q < subtree_end[k]. A token may have several successors,
so next-token targets live on *edges*, gathered per row; nothing is ever shifted by one. Only rows
that carry loss are laid out.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from appo.errors import DataError
from appo.packing.forest import Forest, SubTree, cut, fill_bins
from appo.packing.placement import StreamArrays, lay_out, ranges, response_spans
from appo.types import Counts, Credit, RolloutTree

__all__ = [
    "Counts",
    "PackedBatch",
    "interval_mask",
    "node_values",
    "pack",
    "pack_sequences",
    "trains",
]


_over_budget_told = threading.Event()  # one row over the budget is named, the others are counted


@dataclass
class PackedBatch:
    """One stream of T tokens with R rows and E edges.

    Response tokens of every row, tool tokens included.

    token_ids[T] int64 · position_ids[T] int64 (depth in the path) · subtree_end[T] int32 (end of
    the token's subtree)

    source[E] int64      stream index whose hidden state predicts the edge's token
    target[E] int64      the token id
    offsets[R+1] int64   row r owns edges offsets[r] … offsets[r+1], in response order
    mask[E] bool         True where the token is trained
    behavior_logp[E] float32 log-prob recorded when the token was sampled, 0 for tool tokens
    version[E] int64     policy version that sampled the token, -1 for tool tokens
    old_logp[E] float32    log-prob the ratio is taken against: behavior_logp, unless the learner
                           recomputed it
    advantage[E] float32 · weight[R] float32 · rows[R] (tree index, leaf index)
    total_tokens         tokens of the same rows laid out as independent sequences
    rank                 rank whose trees `rows` count in; a stream may be trained by another one
    padding              tokens at the end that are none: see `padded`

    >>> prompt (5 6), two rows (7 8) and (7 9), forked after 7:
    >>> token_ids [5 6 7 8 9]  position_ids [0 1 2 3 3]  subtree_end [5 5 5 4 5]
    >>> source [1 2 1 2]  target [7 8 7 9]  offsets [0 2 4]
    """

    token_ids: Tensor
    position_ids: Tensor
    subtree_end: Tensor
    source: Tensor
    target: Tensor
    offsets: Tensor
    mask: Tensor
    behavior_logp: Tensor
    version: Tensor
    advantage: Tensor
    weight: Tensor
    rows: list[tuple[int, int]]
    total_tokens: int
    old_logp: Tensor = None  # type: ignore[assignment]  # never None once made
    rank: int = 0
    padding: int = 0

    def __post_init__(self) -> None:
        if self.old_logp is None:
            self.old_logp = self.behavior_logp

    @property
    def unique_tokens(self) -> int:
        """Tokens in the stream, padding left out."""
        return self.token_ids.numel() - self.padding

    def to(self, device: torch.device | str) -> PackedBatch:
        """The same batch with every tensor on `device`."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        moved: dict[str, Any] = {
            k: v.to(device) for k, v in values.items() if isinstance(v, Tensor)
        }
        return replace(self, **moved)

    def padded(self, multiple: int) -> PackedBatch:
        """The same batch with its stream filled up to a multiple of so many tokens.

        For kernels that are compiled by length.

        A padding token sees only itself, is seen by no other and has no edge: it changes no loss
        and no gradient.
        """
        tokens = self.token_ids.numel()
        more = -tokens % multiple
        if not more:
            return self
        zeros = self.token_ids.new_zeros(more)
        ends = torch.arange(tokens + 1, tokens + more + 1, device=self.subtree_end.device)
        return replace(
            self,
            token_ids=torch.cat([self.token_ids, zeros]),
            position_ids=torch.cat([self.position_ids, zeros]),
            subtree_end=torch.cat([self.subtree_end, ends.to(self.subtree_end.dtype)]),
            padding=self.padding + more,
        )


def trains(credit: Credit) -> bool:
    """True when the row can move a weight.

    Some trained token has an advantage other than zero (NaN counts).
    """
    return bool((np.asarray(credit.advantage)[np.asarray(credit.loss_mask, bool)] != 0).any())


def pack(
    trees: Sequence[RolloutTree],
    credits: Sequence[Sequence[Credit]],
    *,
    token_budget: int,
    keep_all: bool = False,
) -> list[PackedBatch]:
    """Lay the trained rows of `trees` out in streams of at most `token_budget` tokens each.

    O(tokens).

    `credits[i]` are the rows of tree i; rows for which `trains` is False are left out, unless
    `keep_all` (a loss with a term that does not depend on the advantage, such as an entropy bonus).
    A tree over the budget is cut between root rollouts (its prompt is repeated), a root over the
    budget between rows; what comes of it is binned into few streams (`appo.packing.forest`). A
    single row over the budget gets a stream of its own and, once per process, a warning.

    Raises DataError when a tree is malformed or a credit does not fit its row (length, or loss on a
    token that was not sampled).
    """
    forest = Forest(trees)
    subtrees: list[SubTree] = []
    for i, rows in enumerate(credits):
        for c in rows:
            _check(forest, i, c)
        kept = [True] * len(rows) if keep_all else _trained(rows)
        leaves = {r: forest.leaf(i, c.leaf) for r, c in enumerate(rows) if kept[r]}
        if leaves:
            subtrees += cut(forest, i, leaves, token_budget)
    over = [p for p in subtrees if p.size > token_budget]
    if over:
        _warn_once(trees, credits, over[0], token_budget)
    return [_packed_batch(s, credits) for s in fill_bins(subtrees, token_budget)]


def _check(forest: Forest, tree: int, credit: Credit) -> None:
    """Raise DataError when a credit does not fit the row it names."""
    tokens = forest.row_len(tree, credit.leaf)
    if not len(credit.loss_mask) == len(credit.advantage) == tokens:
        raise DataError(
            f"{_row_name(forest.trees[tree], credit)}: {tokens} response tokens, but {len(credit.advantage)} "
            f"advantages and {len(credit.loss_mask)} loss-mask entries; a Credit needs one of each per response "
            "token, tool tokens included"
        )
    if not forest.prompt_len(tree):
        raise DataError(
            f"{_row_name(forest.trees[tree], credit)}: the prompt is empty, so nothing predicts the first response "
            "token"
        )


def _row_name(tree: RolloutTree, credit: Credit) -> str:
    return f"task {tree.task.task_id!r}, leaf {credit.leaf}"


def _trained(rows: Sequence[Credit]) -> list[bool]:
    """`trains` of every row, at the price of one."""
    if not rows:
        return []
    counted = np.concatenate([r.loss_mask for r in rows]).astype(bool, copy=False)
    hits = np.flatnonzero(counted & (np.concatenate([r.advantage for r in rows]) != 0))
    before = np.searchsorted(hits, np.cumsum([0, *(len(r.loss_mask) for r in rows)]))
    return (np.diff(before) > 0).tolist()


def _warn_once(
    trees: Sequence[RolloutTree],
    credits: Sequence[Sequence[Credit]],
    subtree: SubTree,
    budget: int,
) -> None:
    if _over_budget_told.is_set():
        return
    _over_budget_told.set()
    row = _row_name(trees[subtree.tree], credits[subtree.tree][subtree.rows[0]])
    warnings.warn(
        f"{row}: {subtree.size:,} tokens, more than learner.token_budget ({budget:,}). The row is trained in a "
        "micro-batch of its own, which needs more memory than the others; raise learner.token_budget or lower "
        "rollout.max_new_tokens. Further rows like it are counted in pack/over_budget.",
        stacklevel=3,
    )


def _packed_batch(subtrees: Sequence[SubTree], credits: Sequence[Sequence[Credit]]) -> PackedBatch:
    """One stream."""
    forest = subtrees[0].forest
    rows = [(p.tree, credits[p.tree][r]) for p in subtrees for r in p.rows]
    layout = lay_out(subtrees)
    stream = StreamArrays(layout)
    tokens = stream.tokens()
    behavior_logp = stream.gather("d", [n.logprobs for n in layout.nodes]).astype(np.float32)
    old_logp = behavior_logp
    if any(n.old_logp is not None for n in layout.nodes):
        own = [n.logprobs if n.old_logp is None else n.old_logp for n in layout.nodes]
        old_logp = stream.gather("d", own).astype(np.float32)

    prompt_len = [forest.prompt_len(i) for i, _ in rows]
    leaves = [forest.leaf(i, c.leaf) for i, c in rows]
    start, length = response_spans(layout, leaves, prompt_len).T
    at = ranges(start, length)  # [E] stream index of the edge's token
    offsets = np.cumsum([0, *(forest.row_len(i, c.leaf) for i, c in rows)])
    source = np.concatenate([at[:1], at[:-1]])  # [E] the token before it
    some = np.diff(offsets) > 0
    prompt_at = [layout.start[layout.at[forest.first[i]]] for i, _ in rows]
    source[offsets[:-1][some]] = (np.array(prompt_at) + prompt_len)[some] - 1

    mask = np.concatenate([c.loss_mask for _, c in rows]).astype(bool, copy=False)
    if (unsampled := mask & ~tokens.sampled[at]).any():
        edge = int(np.flatnonzero(unsampled)[0])
        r = int(np.searchsorted(offsets, edge, "right")) - 1
        raise DataError(
            f"{_row_name(forest.trees[rows[r][0]], rows[r][1])}: loss_mask is True at response position "
            f"{edge - offsets[r]}, which the policy did not sample"
        )
    edges = {
        "source": source,
        "target": tokens.ids[at],
        "mask": mask,
        "behavior_logp": behavior_logp[at],
        "version": tokens.version[at],
        "advantage": np.concatenate([c.advantage for _, c in rows]).astype(np.float32),
        "old_logp": old_logp[at],
    }
    vectors: dict[str, Any] = {name: torch.from_numpy(values) for name, values in edges.items()}
    return PackedBatch(
        token_ids=torch.from_numpy(tokens.ids),
        position_ids=torch.from_numpy(tokens.position),
        subtree_end=torch.from_numpy(tokens.subtree_end),
        offsets=torch.from_numpy(offsets),
        weight=torch.tensor([c.weight for _, c in rows], dtype=torch.float32),
        rows=[(i, c.leaf) for i, c in rows],
        total_tokens=sum(prompt_len) + len(at),
        **vectors,
    )


def node_values(
    batches: Sequence[PackedBatch], values: Sequence[Tensor], trees: Sequence[RolloutTree]
) -> list[dict[int, np.ndarray]]:
    """Per-edge values (one [E] per batch) by tree and node.

    Tree → node → float32, one per own token of the node.

    The inverse of the gather in `pack`: what the learner said of root rows can be given to rows
    that share tokens with them. Nodes that no row passes are absent; tokens that no row reaches, or
    that carry no loss, are NaN.
    """
    out: list[dict[int, np.ndarray]] = [{} for _ in trees]
    for batch, value in zip(batches, values, strict=True):
        known = np.where(batch.mask.cpu().numpy(), value.float().cpu().numpy(), np.nan)
        ends = batch.offsets.tolist()
        for (i, leaf), at, end in zip(batch.rows, ends, ends[1:]):
            for n, k in _response_nodes(trees[i], leaf):
                own = out[i].setdefault(
                    n, np.full(len(trees[i].nodes[n].token_ids), np.nan, np.float32)
                )
                own[:k] = np.where(np.isnan(known[at : at + k]), own[:k], known[at : at + k])
                at += k
            assert at == end, "these are not the trees that the batch was packed from"
    return out


def _response_nodes(tree: RolloutTree, leaf: int) -> list[tuple[int, int]]:
    """(node, number of its own tokens on the path) after the prompt, to the end of `leaf`."""
    n = tree.leaves[leaf].node
    k = len(tree.nodes[n].token_ids)
    chain = []
    while (parent := tree.nodes[n].parent) is not None:
        chain.append((n, k))
        n, k = parent, tree.nodes[n].fork_at
    return chain[::-1]


def pack_sequences(sequences: Sequence[Sequence[int]]) -> PackedBatch:
    """Independent sequences side by side in one stream.

    Edges are tokens 1 … n-1 of each, all unmasked.

    Used to score probes: behavior_logp and advantage are zero. Raises DataError for a sequence of
    fewer than two tokens.
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
        subtree_end=torch.from_numpy(np.repeat(starts + lengths, lengths).astype(np.int32)),
        source=torch.from_numpy(target_at - 1),
        target=torch.from_numpy(token_ids[target_at]),
        offsets=torch.from_numpy(np.cumsum([0, *(lengths - 1)]).astype(np.int64)),
        mask=torch.ones(edges, dtype=torch.bool),
        behavior_logp=torch.zeros(edges),
        version=torch.full((edges,), -1),
        advantage=torch.zeros(edges),
        weight=torch.ones(len(lengths)),
        rows=[(i, 0) for i in range(len(lengths))],
        total_tokens=len(token_ids),
    )


def interval_mask(subtree_end: Tensor) -> Tensor:
    """bool[T, T]: True where query (row) sees key (column), k ≤ q < subtree_end[k].

    For short streams and tests.
    """
    at = torch.arange(subtree_end.numel(), device=subtree_end.device)
    return (at[None, :] <= at[:, None]) & (at[:, None] < subtree_end[None, :])
