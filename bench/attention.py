"""One layer's attention in a decode step of siblings over a long shared prefix: read once, or once per sequence.

    OMP_NUM_THREADS=1 python bench/attention.py [--quick] [--json FILE]

Every sequence has its own last 64 tokens, and the prefix either as a segment that all share or, as engines without a
tree keep it, as a copy of its own. "one cache" reads the shared memory once per sequence (no
copies, no grouping). Sibling counts, prefix lengths and head shapes vary around SmolLM2-135M's (9 query heads, 3
key heads of 64, bfloat16). The error is the largest against float64. "torch" is the PyTorch definition that the native
code replaces.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable

import torch
from common import Case, arguments, medians, report
from torch import Tensor

from appo.rollout.native import segments
from appo.rollout.native.attention import attend, merge
from appo.rollout.native.segments import Frozen, Plan, attend_segments

OWN = 64  # tokens of each sequence after the prefix, the new one included


class Siblings:
    """Random queries and caches: shared[1, 2, Hkv, P, D], a copy of it per sequence, own[1, 2, rows, Hkv, OWN, D]."""

    def __init__(
        self, rows: int, prefix: int, heads: int, kv_heads: int, dim: int, dtype: torch.dtype
    ):
        generator = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(dtype)

        self.rows, self.heads, self.kv_heads, self.dim = rows, heads, kv_heads, dim
        self.shared = normal(1, 2, kv_heads, prefix, dim)
        self.own = normal(1, 2, rows, kv_heads, OWN, dim)
        self.copies = torch.cat(
            (self.shared.unsqueeze(2).expand(-1, -1, rows, *[-1] * 3), self.own), 4
        )
        self.q = normal(rows, heads, dim)
        self.k, self.v = (
            self.own[0, :, :, :, -1].clone().unbind(0)
        )  # written again, to where they are
        self.out = torch.empty_like(self.q)

    def plan(self, how: str) -> Frozen:
        """`shared`: one read of the prefix · `one cache`: a read per row · `copies`: a cache per row."""
        plan, prefix = Plan(), self.shared.shape[3]
        if how == "shared":
            plan.read(plan.segment(self.shared), 0, [prefix] * self.rows)
        for row in range(self.rows):
            if how == "one cache":
                plan.read(plan.segment(self.shared), row, [prefix])
            own = plan.segment((self.copies if how == "copies" else self.own)[:, :, row])
            count = OWN + (prefix if how == "copies" else 0)
            plan.read(own, row, [count])
            plan.write(row, own, count - 1)
        return plan.freeze()

    def ours(self, how: str) -> Callable[[], Tensor]:
        plan = self.plan(how)

        def run() -> Tensor:
            attend_segments(self.q, self.k, self.v, plan, 0, self.out)
            return self.out

        return run

    def torch_copies(self) -> Tensor:
        q = self.q.view(self.rows, self.kv_heads, -1, self.dim)
        return attend(q, self.copies[0, 0], self.copies[0, 1])[0]

    def torch_shared(self) -> Tensor:
        """The definition: the prefix for all rows in one call, what is their own in another, merged."""
        group = self.heads // self.kv_heads
        q = self.q.view(self.rows, self.kv_heads, group, self.dim)
        o, lse = attend(q, self.own[0, 0], self.own[0, 1])
        all_rows = q.transpose(0, 1).reshape(1, self.kv_heads, -1, self.dim)
        shared, shared_lse = attend(all_rows, self.shared[:, 0], self.shared[:, 1])

        def by_row(x: Tensor) -> Tensor:
            return (
                x.view(self.kv_heads, self.rows, group, -1)
                .transpose(0, 1)
                .reshape(self.rows, self.heads, -1)
            )

        parts = torch.stack((o.reshape(self.rows, self.heads, -1), by_row(shared)))
        sizes = torch.stack((lse.reshape(self.rows, self.heads), by_row(shared_lse)[..., 0]))
        return merge(parts, sizes)

    def error(self) -> float:
        k, v = self.copies[0].double()
        q = self.q.double().view(self.rows, self.kv_heads, -1, self.dim)
        exact = torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(self.dim), -1) @ v
        return (self.ours("shared")().double() - exact.view(self.out.shape)).abs().max().item()


def case(name: str, siblings: Siblings, repeats: int) -> Case:
    runs: dict[str, Callable[[], object]] = {
        "shared": siblings.ours("shared"),
        "one cache": siblings.ours("one cache"),
        "copies": siblings.ours("copies"),
        "torch shared": siblings.torch_shared,
        "torch copies": siblings.torch_copies,
    }
    ms = {run: 1e3 * seconds for run, seconds in medians(runs, repeats).items()}
    ours, one_cache = ms.pop("shared"), {"one cache": ms.pop("one cache")}
    return Case(name, "ms per layer", ours, peers=ms, variants=one_cache, error=siblings.error())


def cases(args: argparse.Namespace) -> list[Case]:
    smol, wide = (9, 3, 64), (32, 8, 128)
    shapes = [
        (16, 3072, smol),
        (16, 1024, smol),
        (16, 256, smol),
        (4, 3072, smol),
        (64, 3072, smol),
        (16, 3072, wide),
    ]
    if args.quick:
        shapes = [(4, 200, smol), (3, 130, wide)]
    done = []
    for rows, prefix, (heads, kv_heads, dim) in shapes:
        for dtype in (torch.bfloat16, torch.float32):
            name = f"{rows} siblings, prefix {prefix}, heads {heads}/{kv_heads}x{dim}, {str(dtype)[6:]}"
            siblings = Siblings(rows, prefix, heads, kv_heads, dim, dtype)
            done.append(case(name, siblings, 3 if args.quick else 9))
    return done


def main() -> None:
    args = arguments(__doc__ or "")
    if not segments.available(torch.bfloat16, 64, torch.device("cpu")):
        raise SystemExit("bench/attention.py needs the native library: pip install -e .")
    torch.manual_seed(0)
    report("Attention of one decode step over a shared prefix", cases(args), args)


if __name__ == "__main__":
    with torch.inference_mode():
        main()
