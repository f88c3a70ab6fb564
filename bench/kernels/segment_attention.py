"""Attention of one layer over a tree of sequences.

What they share is read once, or once per sequence.

    OMP_NUM_THREADS=1 python bench/kernels/segment_attention.py [--quick] [--json FILE]

siblings  a decode step of sequences below one prefix, each with 64 tokens of its own; sibling
          counts, prefix lengths and head shapes vary around SmolLM2-135M's (9 query heads, 3 key
          heads of 64, bfloat16)
tree      a decode step of the tree workload: 16 sequences, a prompt of 512 tokens and 300 tokens of
          their own each
prefill   512 tokens of one prompt at once, with and without tokens before them

"ours" reads the pool through the tree. "per sequence" is the same kernel over a cache of its own
for every sequence, as engines without a tree keep it; "one cache" reads the shared blocks once per
sequence. "torch" is one call of scaled_dot_product_attention over padded caches, one per sequence,
that lie ready for it. Layers are attended in turn, as a model does, so that a cache comes from
memory where it does not fit the processor's. Times are CPU time. "memory" is the time in which one
thread adds up as many bytes as are read, from end to end: a bound for a step. The error is the
largest against float64.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from appo.rollout.native.attention.pool import KVPool, available
from appo.rollout.native.attention.segments import segment_attention
from appo.rollout.native.tree.block_list import BLOCK

sys.path.append(str(Path(__file__).resolve().parents[2]))  # the checkout, for `bench`

from bench.common import Case, arguments, report, timings

Shape = tuple[int, int, int]  # query heads, key heads, head dimension
SMOL: Shape = (9, 3, 64)


@dataclass
class Reads:
    """Tables of a batch (see segments.Reads), built segment by segment."""

    slots: Tensor
    segments: Tensor
    blocks: Tensor
    reads: Tensor
    limits: Tensor

    @classmethod
    def of(cls, rows: int, parts: list[tuple[list[int], int, list[int]]]) -> Reads:
        """parts: (blocks, first row, limits) of each read.

        A row's keys go where its last read ends.
        """
        slots, sizes, blocks, reads, limits = [-1] * rows, [], [], [], []
        for number, (some, first, counts) in enumerate(parts):
            sizes.append((len(blocks), max(counts)))
            reads.append((number, first, first + len(counts), len(limits)))
            for row, count in enumerate(counts, first):
                block, at = divmod(count - 1, BLOCK)
                slots[row] = some[block] * BLOCK + at
            blocks += some
            limits += counts
        return cls(*map(torch.tensor, (slots, sizes, blocks, reads, limits)))


class Sequences:
    """Rows of sequences that share a prefix, in a pool of random numbers.

    Prefix blocks first, then their own.
    """

    def __init__(
        self, new: list[int], prefix: int, own: int, shape: Shape, dtype: torch.dtype, layers: int
    ):
        """new: how many rows, the last tokens of its own, each sequence has in this batch."""
        self.heads, kv_heads, dim = shape
        self.new, self.prefix, self.own, self.layers = new, prefix, own, layers
        generator = torch.Generator().manual_seed(0)
        self.pool = KVPool(layers, kv_heads, dim, dtype, layout="packed")
        self.shared = list(range(-(-prefix // BLOCK)))
        per = -(-own // BLOCK)
        self.mine = [[len(self.shared) + per * i + j for j in range(per)] for i in range(len(new))]
        copied = -(-(prefix + own) // BLOCK)
        start = len(self.shared) + per * len(new)
        self.copies = [[start + copied * i + j for j in range(copied)] for i in range(len(new))]
        self.pool.ensure(start + copied * len(new))
        for arena in self.pool.arenas:
            arena.normal_(generator=generator)
        x = torch.randn(sum(new), self.heads + 2 * kv_heads, dim, generator=generator).to(dtype)
        self.q, self.k, self.v = x.split((self.heads, kv_heads, kv_heads), dim=1)
        self.out = torch.empty(self.q.shape, dtype=dtype)

    def path(self, layer: int, i: int) -> Tensor:
        """[2, Hkv, prefix + own, D] of a sequence, with what this batch writes."""
        parts = [self.pool.read(self.shared, self.prefix, layer)]
        parts.append(self.pool.read(self.mine[i], self.own, layer))
        first = sum(self.new[:i])
        for side, x in enumerate((self.k, self.v)):
            parts[1][side, :, self.own - self.new[i] :] = x[first : first + self.new[i]].transpose(
                0, 1
            )
        return torch.cat(parts, dim=2)

    def reads(self, how: str) -> Reads:
        """`shared`: one read of the prefix · `one cache`.

        A read per sequence · `copies`: a cache per sequence.
        """
        rows, parts = sum(self.new), []
        if how == "shared" and self.prefix:
            parts.append((self.shared, 0, [self.prefix] * rows))
        first = 0
        for i, new in enumerate(self.new):
            if how == "one cache" and self.prefix:
                parts.append((self.shared, first, [self.prefix] * new))
            end = 1 + self.own + (self.prefix if how == "copies" else 0)
            blocks = self.copies[i] if how == "copies" else self.mine[i]
            parts.append((blocks, first, list(range(end - new, end))))
            first += new
        return Reads.of(rows, parts)

    def ours(self, how: str) -> Callable[[], None]:
        """All layers in turn."""
        reads = self.reads(how)

        def run() -> None:
            for layer in range(self.layers):
                segment_attention(self.q, self.k, self.v, reads, self.pool, layer, self.out)

        return run

    def torch_per_sequence(self) -> Callable[[], None]:
        """Padded caches lie ready; every sequence has the same number of new rows."""
        n, batch = self.new[0], len(self.new)
        _, kv_heads, dim = self.k.shape
        shape = (self.layers, 2, batch, kv_heads, self.prefix + self.own, dim)
        caches = torch.randn(shape, dtype=self.q.dtype)
        # The heads that share keys stand as further rows: [B, Hkv, group * n, D].
        q = self.q.view(batch, n, kv_heads, -1, dim).permute(0, 2, 3, 1, 4).flatten(2, 3)
        mask = None
        if n > 1:
            end = self.prefix + self.own
            mask = torch.arange(end) <= torch.arange(end - n, end)[:, None]
            mask = mask.repeat(self.heads // kv_heads, 1)

        def run() -> None:
            for k, v in caches:  # [B, Hkv, N, D] each
                scaled_dot_product_attention(q, k, v, attn_mask=mask)

        return run

    def bytes(self) -> int:
        """What one layer's step reads."""
        blocks = len(self.shared) + sum(map(len, self.mine))
        return blocks * self.pool.block_bytes // self.layers

    def memory(self) -> Callable[[], object]:
        return torch.ones(self.bytes() * self.layers // 4).sum

    def error(self) -> float:
        """Of the last layer, over all rows."""
        self.ours("shared")()
        worst, first = 0.0, 0
        for i, new in enumerate(self.new):
            kv = self.path(self.layers - 1, i).double()
            k, v = kv.repeat_interleave(self.heads // kv.shape[1], dim=1)  # [Hq, N, D]
            for row in range(first, first + new, max(1, new // 8)):
                n = k.shape[1] - new + 1 + row - first
                scores = torch.einsum("hd,hnd->hn", self.q[row].double(), k[:, :n])
                p = (scores / k.shape[2] ** 0.5).softmax(-1)
                exact = torch.einsum("hn,hnd->hd", p, v[:, :n])
                worst = max(worst, (self.out[row].double() - exact).abs().max().item())
            first += new
        return worst


def case(name: str, s: Sequences, repeats: int) -> Case:
    runs: dict[str, Callable[[], object]] = {
        "ours": s.ours("shared"),
        "one cache": s.ours("one cache"),
        "memory": s.memory(),
        "per sequence": s.ours("copies"),
        "torch": s.torch_per_sequence(),
    }
    times = timings(runs, repeats)
    ms = {run: 1e3 * time.cpu / s.layers for run, time in times.items()}
    variants = {name: ms.pop(name) for name in ("one cache", "memory")}
    return Case(name, "CPU ms per layer", ms.pop("ours"), ms, s.error(), variants=variants)


def cases(args: argparse.Namespace) -> list[Case]:
    """(name, new rows per sequence, prefix, own tokens, heads, layers)."""
    wide: Shape = (32, 8, 128)
    some = [
        ("16 siblings, prefix 3072", [1] * 16, 3072, 64, SMOL, 4),
        ("16 siblings, prefix 1024", [1] * 16, 1024, 64, SMOL, 4),
        ("16 siblings, prefix 256", [1] * 16, 256, 64, SMOL, 4),
        ("4 siblings, prefix 3072", [1] * 4, 3072, 64, SMOL, 4),
        ("64 siblings, prefix 1024", [1] * 64, 1024, 64, SMOL, 4),
        ("16 siblings, prefix 3072", [1] * 16, 3072, 64, wide, 2),
        ("tree, 16 x 300 after 512", [1] * 16, 512, 300, SMOL, 30),
        ("prefill 512", [512], 0, 512, SMOL, 4),
        ("prefill 512 after 3072", [512], 3072, 512, SMOL, 4),
    ]
    if args.quick:
        some = [("3 siblings", [1] * 3, 130, 20, SMOL, 2), ("prefill", [40], 20, 40, wide, 2)]
    done = []
    for name, new, prefix, own, shape, layers in some:
        for dtype in (torch.bfloat16, torch.float32):
            heads, kv_heads, dim = shape
            full = f"{name}, heads {heads}/{kv_heads}x{dim}, {str(dtype)[6:]}"
            s = Sequences(new, prefix, own, shape, dtype, layers)
            done.append(case(full, s, 2 if args.quick else 5))
    return done


def main() -> None:
    args = arguments(__doc__ or "")
    if not available(torch.bfloat16, 64, torch.device("cpu")):
        raise SystemExit(
            "bench/kernels/segment_attention.py needs the native library: pip install -e ."
        )
    report("Attention of one layer", cases(args), args)


if __name__ == "__main__":
    with torch.inference_mode():
        main()
