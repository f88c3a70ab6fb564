"""Attention over a packed tree for training.

Ours against masks, independent sequences and FlexAttention.

    OMP_NUM_THREADS=1 python bench/kernels/tree_attention.py [--quick] [--json FILE] [--only TEXT] [--repeats N] [--no-memory]

Trees of one prompt, N rollouts and B branches of each, forked evenly; every sequence ends after the
same number of response tokens. Heads of SmolLM2-135M (9 query heads, 3 key heads of 64), bfloat16.
Rows:

    wall, CPU   ms of one layer, medians of alternating calls; CPU suffers less from neighbours
    memory      MiB of resident memory that a call holds at its peak, in a fresh process, results
                included

Columns: `sdpa mask` torch's SDPA with the N × N boolean mask · `sdpa plan` SDPA per subtree under
the prompt, which is copied before each · `sdpa sequences` every sequence for itself, shared tokens
again and again · `flex` FlexAttention with a block mask, compiled. Peers that fail are listed below
the table.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from appo.kernels import tree_attention
from appo.packing.pack import interval_mask

sys.path.append(str(Path(__file__).resolve().parents[2]))  # the checkout, for `bench`

from bench.common import Case, in_fresh_process, parser, report, resident_bytes, timings
from bench.kernels.sdpa_plan import attend, plan_attention

HEADS, KV_HEADS, DIM = 9, 3, 64
MIB = 2**20
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]  # q[N, Hq, D], k, v[N, Hkv, D] → [N, Hq, D]


class Shape(NamedTuple):
    rollouts: int
    branches: int
    prompt: int
    response: int

    def __str__(self) -> str:
        return f"N={self.rollouts} B={self.branches} {self.prompt}+{self.response}"


FULL = [Shape(4, 3, 512, 1024), Shape(8, 1, 512, 1024)]
QUICK = [Shape(2, 1, 40, 60)]


class Tree(NamedTuple):
    """subtree_end[N] int32, and the stream indices of every sequence, root to leaf."""

    subtree_end: Tensor
    sequences: list[Tensor]


def tree(shape: Shape) -> Tree:
    """Branch b of a rollout leaves it after a share b / (B + 1) of its response.

    The latest fork comes first.
    """
    prompt, response = shape.prompt, shape.response
    forks = [response * b // (shape.branches + 1) for b in range(shape.branches, 0, -1)]
    own = response + sum(response - f for f in forks)
    subtree_end = [prompt + shape.rollouts * own] * prompt
    sequences = []
    for _ in range(shape.rollouts):
        start = len(subtree_end)
        ends, at = torch.full((response,), start + response), start + response
        before = torch.arange(prompt)
        sequences.append(torch.cat([before, torch.arange(start, start + response)]))
        for fork in forks:
            rest = torch.arange(at, at + response - fork)
            sequences.append(torch.cat([before, torch.arange(start, start + fork), rest]))
            at += response - fork
            ends[:fork] = at
        subtree_end += ends.tolist()
        at = start + response
        for fork in forks:
            at += response - fork
            subtree_end += [at] * (response - fork)
    return Tree(torch.tensor(subtree_end, dtype=torch.int32), sequences)


def ours(t: Tree) -> Attend:
    return lambda q, k, v: tree_attention(q, k, v, t.subtree_end)


def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Tokens first, as everywhere here; causal without a mask."""
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    o = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True
    )
    return o[0].transpose(0, 1)


def sdpa_mask(t: Tree) -> Attend:
    mask = interval_mask(t.subtree_end)  # once for all layers, as a model would
    return lambda q, k, v: sdpa(q, k, v, mask)


def sdpa_plan(t: Tree) -> Attend:
    segments = plan_attention(t.subtree_end)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        heads = (x.transpose(0, 1)[None] for x in (q, k, v))
        return attend(*heads, segments)[0].transpose(0, 1)

    return run


def sdpa_sequences(t: Tree) -> Attend:
    """[Σ lengths, Hq, D]: a row for every token of every sequence."""

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.cat([sdpa(q[rows], k[rows], v[rows]) for rows in t.sequences])

    return run


def flex(t: Tree) -> Attend:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    subtree_end, n = t.subtree_end, t.subtree_end.numel()

    def sees(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (k <= q) & (q < subtree_end[k])

    mask = create_block_mask(sees, None, None, n, n, device="cpu")
    compiled = torch.compile(flex_attention)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        heads = (x.transpose(0, 1)[None].contiguous() for x in (q, k, v))
        return compiled(*heads, block_mask=mask, enable_gqa=True)[0].transpose(0, 1)

    return run


MAKE = {
    "ours": ours,
    "sdpa mask": sdpa_mask,
    "sdpa plan": sdpa_plan,
    "sdpa sequences": sdpa_sequences,
    "flex": flex,
}


def problem(n: int) -> tuple[Tensor, ...]:
    """q, k, v and the upstream gradient."""
    g = torch.Generator().manual_seed(0)
    heads = (HEADS, KV_HEADS, KV_HEADS, HEADS)
    return tuple(torch.randn(n, h, DIM, generator=g).bfloat16() for h in heads)


def step(name: str, t: Tree, inputs: tuple[Tensor, ...], backward: bool) -> Callable[[], object]:
    """A call of an implementation, or its gradients of q, k and v."""
    attend, upstream = MAKE[name](t), inputs[3]
    if name == "sdpa sequences":
        upstream = upstream[torch.cat(t.sequences)]

    def forward_only() -> Tensor:
        with torch.no_grad():
            return attend(*inputs[:3])

    def both() -> tuple[Tensor, ...]:
        leaves = [x.detach().requires_grad_() for x in inputs[:3]]
        return torch.autograd.grad(attend(*leaves), leaves, upstream)

    return both if backward else forward_only


def memory(name: str, shape: Shape, backward: bool) -> float | None:
    """MiB; to be called in a fresh process."""
    torch.set_num_threads(1)
    t = tree(shape)
    found = resident_bytes(step(name, t, problem(t.subtree_end.numel()), backward))
    return None if found is None else found.peak / MIB


def error(t: Tree, inputs: tuple[Tensor, ...], queries: int = 256) -> float:
    """The largest of ours against float64, over the last queries."""
    got = step("ours", t, inputs, False)()
    assert isinstance(got, Tensor)
    n = t.subtree_end.numel()
    first = max(0, n - queries)
    seen = interval_mask(t.subtree_end)[first:]
    q, k, v = (x.double().transpose(0, 1)[None] for x in inputs[:3])
    want = F.scaled_dot_product_attention(q[:, :, first:], k, v, attn_mask=seen, enable_gqa=True)
    return (got[first:].double() - want[0].transpose(0, 1)).abs().max().item()


def cases(shape: Shape, args: argparse.Namespace, notes: dict[str, str]) -> list[Case]:
    t = tree(shape)
    inputs = problem(t.subtree_end.numel())
    ratio = sum(len(s) for s in t.sequences) / t.subtree_end.numel()
    name = f"{shape}, {t.subtree_end.numel():,} tokens, shared {ratio:.2f}×"
    largest = error(t, inputs)
    done = []
    for backward in (False, True):
        what = f"{name}, forward{'+backward' if backward else ''}"
        runs = {}
        for peer in MAKE:
            if args.only not in peer and peer != "ours":
                continue
            try:
                run = step(peer, t, inputs, backward)
                if peer == "flex" or args.quick:
                    run()  # compiles
            except Exception as reason:  # somebody else's code: told below the table
                if peer == "ours":
                    raise
                notes[f"{peer}, {what}"] = f"{type(reason).__name__}: {str(reason).splitlines()[0]}"
                continue
            runs[peer] = run
        times = timings(runs, args.repeats, warm=args.repeats > 1)
        for clock in ("wall", "CPU"):
            ms = {p: 1e3 * getattr(x, clock.lower()) for p, x in times.items()}
            done.append(Case(f"{what}, {clock}", "ms", ms.pop("ours"), ms, error=largest))
        if args.memory and not args.quick:
            mib = {p: in_fresh_process(memory, p, shape, backward) for p in runs}
            if mib["ours"] is not None:
                done.append(Case(f"{what}, memory", "MiB", mib.pop("ours"), mib))
        print(
            *(f"{c.name}: {c.ours:.4g} {c.unit}, {c.peers}" for c in done[-3:]),
            sep="\n",
            file=sys.stderr,
        )
    return done


def main() -> int:
    options = parser(__doc__ or "")
    options.add_argument("--only", default="", metavar="TEXT", help="peers with TEXT in their name")
    options.add_argument("--repeats", type=int, default=3)
    options.add_argument("--no-memory", dest="memory", action="store_false")
    args = options.parse_args()
    notes: dict[str, str] = {}
    rows = [case for shape in (QUICK if args.quick else FULL) for case in cases(shape, args, notes)]
    report("One layer of attention over a packed tree", rows, args)
    for name, reason in notes.items():
        print(f"{name}: {reason}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
