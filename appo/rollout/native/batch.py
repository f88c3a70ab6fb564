"""One forward pass laid out: which rows, where their keys go, which segments they read.

Rows are sorted by path, so the readers of every segment are neighbours. Each segment on some row's path is attended
once, by all rows below it. In native code one call per layer does it all (segments.py). The definition in PyTorch, for
devices and machines without it: single rows meet their own KV in one padded call over the slab; a chunk of several rows
meets itself causally. Partial results land in [rank, row] and are merged once per layer, whatever the tree's shape.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from appo.rollout.native import segments
from appo.rollout.native.attention import NO_KEYS, attend, merge
from appo.rollout.native.kv import KVStore
from appo.rollout.native.tree import Node

PAD = 32  # slab lengths are rounded up to this, so that views are rebuilt every 32 steps only


@dataclass
class Unit:
    """Work for one node: run own positions start … start+count-1."""

    node: Node
    start: int
    count: int
    sampled: bool = False  # the last row's logits are wanted for a token
    single: bool = False  # one new row of a node in the slab: goes into the padded call


@dataclass
class Shared:
    """Rows a … b-1 read the first `count` positions of a segment."""

    a: int
    b: int
    rank: int
    keys: tuple[Tensor, ...]  # per layer [Hkv, count, D]
    values: tuple[Tensor, ...]
    mask: Tensor | None  # [rows * group, count] when rows inherit different lengths
    others: Tensor | None  # rows in between that do not read this segment here


@dataclass
class Span:
    """Rows a … b-1 are consecutive tokens of one node; KV of the first `skip` rows is there already."""

    a: int
    b: int
    skip: int
    into: tuple[Tensor, ...]  # per layer [2, Hkv, rows - skip, D]


class Batch:
    """The plan of one forward. `advance` turns the plan of a pure decode step into the next one's."""

    def __init__(self, units: list[Unit], store: KVStore, heads: int, pad_rows: int = 0):
        self.store, self.heads = store, heads
        self.group = heads // store.kv_heads
        self.units = sorted(units, key=lambda u: _order(u.node))
        self.epoch = store.epoch
        self.rows = sum(u.count for u in self.units)
        self.padded = max(self.rows, pad_rows)
        self.single_units = [u for u in self.units if u.single]
        self._lay_out()
        self.plan = segments.lay_out(self.units, self.first_row, store) if store.native else None
        if self.plan is not None:
            self.out = torch.empty(self.padded, heads, store.head_dim, dtype=store.dtype)
        else:
            self._prepare()

    def _prepare(self) -> None:
        store = self.store
        self._find_spans()
        self._find_shared()
        ranks = 1 + max((s.rank for s in self.shared), default=0)
        device, dtype = store.device, store.dtype
        shape = (ranks, self.padded, self.heads)
        self.o = torch.zeros(*shape, store.head_dim, dtype=dtype, device=device)
        self.lse = torch.full(shape, NO_KEYS, device=device)
        if self.single_units:
            self._lay_out_slab()

    def _lay_out(self) -> None:
        ids: list[int] = []
        positions: list[int] = []
        self.first_row: dict[int, int] = {}
        for u in self.units:
            node = u.node
            self.first_row[node.id] = len(ids)
            ids += node.tokens[u.start : u.start + u.count]
            positions += range(node.base + u.start, node.base + u.start + u.count)
        pad = [0] * (self.padded - self.rows)
        self.ids = torch.tensor(ids + pad, device=self.store.device)
        self.positions = torch.tensor(positions + pad, device=self.store.device)
        self.advances = torch.tensor([1] * self.rows + pad, device=self.store.device)

    def _find_spans(self) -> None:
        self.spans: list[Span] = []
        self.single_rows: list[int] = []
        for u in self.units:
            a, node = self.first_row[u.node.id], u.node
            if u.single:
                self.single_rows.append(a)
            else:
                skip = min(max(node.kv - u.start, 0), u.count)
                into = self.store.view(node, u.start + skip, u.start + u.count).unbind(0)
                self.spans.append(Span(a, a + u.count, skip, into))

    def _find_shared(self) -> None:
        readers: dict[int, list[tuple[int, int, int]]] = {}
        nodes: dict[int, tuple[Node, int]] = {}
        for u in self.units:
            a = self.first_row[u.node.id]
            chain = list(u.node.chain())
            if not u.single and u.start:
                readers.setdefault(u.node.id, []).append((a, a + u.count, u.start))
                nodes[u.node.id] = (u.node, len(chain) + 1)
            for depth, (node, count) in enumerate(chain):
                if u.single and node.base >= u.node.local:
                    continue  # copied into the slot
                readers.setdefault(node.id, []).append((a, a + u.count, count))
                nodes[node.id] = (node, len(chain) - depth)
        self.shared = [self._share(*nodes[i], readers[i]) for i in readers]

    def _share(self, node: Node, rank: int, readers: list[tuple[int, int, int]]) -> Shared:
        # A chunk of a node with descendants in the same batch reads its own past by the same call; the rows of
        # readers need not be neighbours when some in between found the segment in their slot: those are masked.
        a, b = min(r[0] for r in readers), max(r[1] for r in readers)
        count = max(r[2] for r in readers)
        kv = self.store.view(node, 0, count)
        mask = others = None
        if any(r[2] != count for r in readers) or sum(r[1] - r[0] for r in readers) != b - a:
            limit = torch.zeros(b - a, dtype=torch.long)
            for first, last, n in readers:
                limit[first - a : last - a] = n
            if not limit.all():
                others = (a + (limit == 0).nonzero().squeeze(1)).to(self.store.device)
            limit.clamp_(min=1)  # a row without any key would be NaN
            hidden = torch.arange(count) >= limit.repeat_interleave(self.group)[:, None]
            mask = torch.zeros(hidden.shape, dtype=self.store.dtype).masked_fill_(
                hidden, float("-inf")
            )
            mask = mask.to(self.store.device)
        return Shared(a, b, rank, kv[:, 0].unbind(0), kv[:, 1].unbind(0), mask, others)

    def _lay_out_slab(self) -> None:
        store, device = self.store, self.store.device
        self.hi = 1 + max(u.node.slot for u in self.single_units)
        slots = [u.node.slot for u in self.single_units]
        row_of = [
            self.single_rows[0]
        ] * self.hi  # idle slots compute something finite that nobody reads
        for row, slot in zip(self.single_rows, slots):
            row_of[slot] = row
        self.in_order = slots == list(range(self.rows))  # row i is slot i: nothing to permute
        self.only_single = not self.spans and self.padded == self.rows
        self.row_of_slot = torch.tensor(row_of, device=device)
        self.slot_of_row = torch.tensor(slots, device=device)
        self.single_index = torch.tensor(self.single_rows, device=device)
        heads = torch.arange(store.kv_heads, device=device)
        self.lengths = [u.node.off + u.start for u in self.single_units]  # KV already there
        at = torch.tensor(self.lengths, device=device)
        keys = (
            (self.slot_of_row[:, None] * store.kv_heads + heads) * store.capacity + at[:, None]
        ).reshape(-1)
        values = keys + store.slab.shape[2] * store.kv_heads * store.capacity
        self.write = torch.cat(
            (keys, values)
        )  # rows of a layer's slab seen as [2 * slots * Hkv * capacity, D]
        self.flat = store.slab.view(store.layers, -1, store.head_dim).unbind(0)
        self._view_slab()

    def _view_slab(self) -> None:
        store = self.store
        self.width = min(-(-(max(self.lengths) + 1) // PAD) * PAD, store.capacity)
        slab = store.slab[:, :, : self.hi, :, : self.width]
        self.slab_k, self.slab_v = slab[:, 0].unbind(0), slab[:, 1].unbind(0)
        length = torch.ones(self.hi, dtype=torch.long, device=store.device)
        length[self.slot_of_row] = torch.tensor(self.lengths, device=store.device) + 1
        hidden = torch.arange(self.width, device=store.device) >= length[:, None]
        self.mask = torch.zeros(hidden.shape, dtype=store.dtype, device=store.device)
        self.mask = self.mask.masked_fill_(hidden, float("-inf"))[
            :, None, None
        ]  # [slots, 1, 1, width]

    def advance(self, tokens: list[int]) -> None:
        """Next decode step of the same single rows; tokens in row order."""
        self.ids[: self.rows] = torch.tensor(tokens, device=self.ids.device)
        self.positions += self.advances
        for u in self.single_units:
            u.start += 1
        if self.plan is not None:
            self.plan.advance()
            return
        self.write += 1
        self.lengths = [n + 1 for n in self.lengths]
        if max(self.lengths) >= self.width:
            self._view_slab()
        else:
            at = torch.tensor(self.lengths, device=self.mask.device)
            self.mask[self.slot_of_row, 0, 0, at] = 0.0

    def attention(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Write k, v[M,Hkv,D], attend q[M,Hq,D] over everything on each row's path: [M, Hq*D].

        In native code the result is one buffer, valid until the next call.
        """
        if self.plan is not None:
            segments.attend_segments(q, k, v, self.plan, layer, self.out)
            return self.out.view(self.padded, -1)
        for s in self.spans:
            if s.skip < s.b - s.a:
                s.into[layer][0].copy_(k[s.a + s.skip : s.b].transpose(0, 1))
                s.into[layer][1].copy_(v[s.a + s.skip : s.b].transpose(0, 1))
        if self.single_units:
            self._slab(layer, q, k, v)
        for s in self.spans:
            self._causal(s, q, k, v)
        for shared in self.shared:
            self._shared(layer, shared, q)
        return merge(self.o, self.lse).view(self.padded, -1)

    def _slab(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> None:
        heads, group, dim = self.store.kv_heads, self.group, self.store.head_dim
        if not self.only_single:
            k, v = k.index_select(0, self.single_index), v.index_select(0, self.single_index)
        self.flat[layer].index_copy_(0, self.write, torch.cat((k, v)).view(-1, dim))
        queries = q[: self.hi] if self.in_order else q.index_select(0, self.row_of_slot)
        queries = queries.view(self.hi, heads, group, dim)
        o, lse = attend(
            queries, self.slab_k[layer], self.slab_v[layer], mask=self.mask
        )  # [slots, Hkv, group, D]
        if self.in_order:
            self.o[0, : self.hi].view(self.hi, heads, group, dim).copy_(o)
            self.lse[0, : self.hi].view(self.hi, heads, group).copy_(lse)
            return
        o, lse = o.index_select(0, self.slot_of_row), lse.index_select(0, self.slot_of_row)
        self.o[0].index_copy_(0, self.single_index, o.view(-1, self.heads, dim))
        self.lse[0].index_copy_(0, self.single_index, lse.view(-1, self.heads))

    def _causal(self, s: Span, q: Tensor, k: Tensor, v: Tensor) -> None:
        heads, group, dim, t = self.store.kv_heads, self.group, self.store.head_dim, s.b - s.a
        queries = q[s.a : s.b].view(t, heads, group, dim).permute(1, 2, 0, 3)  # [Hkv, group, T, D]
        keys = k[s.a : s.b].permute(1, 0, 2).unsqueeze(1).expand(heads, group, t, dim)
        values = v[s.a : s.b].permute(1, 0, 2).unsqueeze(1).expand(heads, group, t, dim)
        o, lse = attend(queries, keys, values, causal=True)
        self.o[0, s.a : s.b].view(t, heads, group, dim).copy_(o.permute(2, 0, 1, 3))
        self.lse[0, s.a : s.b].view(t, heads, group).copy_(lse.permute(2, 0, 1))

    def _shared(self, layer: int, s: Shared, q: Tensor) -> None:
        heads, group, dim, r = self.store.kv_heads, self.group, self.store.head_dim, s.b - s.a
        queries = (
            q[s.a : s.b]
            .view(r, heads, group, dim)
            .permute(1, 0, 2, 3)
            .reshape(1, heads, r * group, dim)
        )
        o, lse = attend(
            queries, s.keys[layer].unsqueeze(0), s.values[layer].unsqueeze(0), mask=s.mask
        )
        self.o[s.rank, s.a : s.b].view(r, heads, group, dim).copy_(
            o.view(heads, r, group, dim).permute(1, 0, 2, 3)
        )
        self.lse[s.rank, s.a : s.b].view(r, heads, group).copy_(
            lse.view(heads, r, group).permute(1, 0, 2)
        )
        if s.others is not None:
            self.lse[s.rank].index_fill_(0, s.others, NO_KEYS)


def _order(node: Node) -> list[tuple[int, int]]:
    """Depth-first key: ancestors first, siblings by where they left the parent."""
    path = [(node.base, node.id)] + [(a.base, a.id) for a, _ in node.chain()]
    return path[::-1]
