"""Packing speed.

Trees of a large mini-batch into token streams, in tokens of the streams per second.

    OMP_NUM_THREADS=1 python bench/learner/packing.py [--quick] [--json FILE] [--old FILE]

16 prompts × 16 leaves × about 2,000 tokens in four shapes: flat roots of one node each; agents (4
roots and 12 branches, model turns of 60 tokens between tool results of 100); deep trees of small
nodes (8 tokens a turn, hundreds of nodes on a path); chains of nodes of one token. Every row
trains. --old FILE times another version of appo/packing/pack.py beside it, e.g. one that
`git show COMMIT:appo/packing/pack.py` wrote to FILE. Every rank packs its own trees: the notes
compare with one of eight GPUs that train 100,000 tokens a second together (a CPU core trains a few
thousand).
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from appo.packing.pack import PackedBatch, pack
from appo.types import Credit, Leaf, Node, RolloutTree, Task

sys.path.append(str(Path(__file__).resolve().parents[2]))  # the checkout, for `bench`

from bench.common import Case, medians, parser, report

RANK_TOKENS_PER_S = 12_500  # what one of eight GPUs trains

# name: (roots, branches, tokens of a model node, tokens of a tool node)
SHAPES = {
    "flat, one node a row": (16, 0, 2000, 0),
    "agent, turns of 60 + 100": (4, 12, 60, 100),
    "deep, turns of 8 + 8": (4, 12, 8, 8),
    "chain, nodes of 1": (4, 12, 1, 0),
}


def node(role: str, parent: int, fork_at: int, tokens: int, rng: np.random.Generator) -> Node:
    ids = rng.integers(50_000, size=tokens).tolist()
    drawn = [-1.0] * tokens if role == "model" else None
    return Node(parent, role, fork_at, ids, drawn, drawn, 0)  # type: ignore[arg-type]


def grow(
    nodes: list[Node], parent: int, fork_at: int, space: int, turn: tuple[int, int], rng: Any
) -> int:
    """Append turns until `space` tokens are used; → the last node."""
    role = "model"
    while space > 0:
        tokens = min(space, turn[0] if role == "model" else turn[1])
        nodes.append(node(role, parent, fork_at, tokens, rng))
        parent, fork_at, space = len(nodes) - 1, tokens, space - tokens
        role = "tool" if role == "model" and turn[1] else "model"
    return parent


def tree(
    shape: tuple[int, int, int, int], length: int, prompt: int, rng: np.random.Generator
) -> RolloutTree:
    """Roots of `length` response tokens.

    Each branch leaves a random node of a random root and is as long in all.
    """
    roots, branches, model, tool = shape
    nodes = [Node(None, "prompt", 0, rng.integers(50_000, size=prompt).tolist())]
    leaves = [
        Leaf(grow(nodes, 0, prompt, length, (model, tool), rng), root) for root in range(roots)
    ]
    ends = [-1, *(leaf.node for leaf in leaves)]
    for b in range(branches):
        root = int(rng.integers(roots))
        first = ends[root] + 1 if root else 1
        at = int(rng.integers(first, ends[root + 1] + 1))
        at -= nodes[at].role == "tool"  # branches leave tokens that the policy drew
        used = sum(len(n.token_ids) for n in nodes[first : at + 1])
        fork_at = int(rng.integers(len(nodes[at].token_ids)))
        space = length - used + len(nodes[at].token_ids) - fork_at
        leaves.append(Leaf(grow(nodes, at, fork_at, space, (model, tool), rng), root, branch=b))
    return RolloutTree(Task("bench", [], None), nodes, leaves)


def mini_batch(name: str, quick: bool) -> tuple[list[RolloutTree], list[list[Credit]]]:
    rng = np.random.default_rng(0)
    prompts, length = (2, 200) if quick else (16, 2000)
    trees = [tree(SHAPES[name], length, 150, rng) for _ in range(prompts)]
    credits = []
    for t in trees:
        views = [t.trajectory(leaf) for leaf in range(len(t.leaves))]
        credits.append([Credit(i, rng.normal(size=len(v)), v.mask) for i, v in enumerate(views)])
    return trees, credits


def other_pack(file: Path) -> Callable[..., Sequence[PackedBatch]]:
    """`pack` of another version of the module."""
    spec = importlib.util.spec_from_file_location("old_packing", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["old_packing"] = module
    spec.loader.exec_module(module)
    return module.pack


def figures(name: str, budget: int, args: Any) -> tuple[Case, str]:
    """Speed of one shape at one token budget, and what its packing came to."""
    trees, credits = mini_batch(name, args.quick)
    packs = {"ours": pack} | ({"old": other_pack(args.old)} if args.old else {})
    runs = {k: partial(p, trees, credits, token_budget=budget) for k, p in packs.items()}
    seconds = medians(runs, repeats=3)
    batches = {k: run() for k, run in runs.items()}
    tokens = {k: sum(b.unique_tokens for b in found) for k, found in batches.items()}
    ours, *old = [tokens[k] / s / 1e6 for k, s in seconds.items()]
    case = Case(f"{name}, budget {budget:,}", "M tokens/s", ours,
                {"old": old[0]} if old else {}, higher_is_better=True)  # fmt: skip
    streams = ", ".join(f"{len(found)} streams ({k})" for k, found in batches.items())
    share = RANK_TOKENS_PER_S / 1e6 / ours
    return case, f"{tokens['ours']:,} tokens, {streams}; {share:.2%} of a GPU's step"


def main() -> None:
    args_of = parser(__doc__ or "")
    args_of.add_argument("--old", metavar="FILE", type=Path, help="another packing.py to time")
    args = args_of.parse_args()
    found = [figures(name, budget, args) for name in SHAPES for budget in (16_384, 4_096)]
    notes = {case.name: note for case, note in found}
    report("Packing trees into streams", [case for case, _ in found], args, notes)


if __name__ == "__main__":
    main()
