"""Random lives of a segment tree: seconds, leaked blocks, memory; cost of a fork by depth.

    OMP_NUM_THREADS=1 python bench/engine/tree_soak.py [--quick] [--json FILE]

"soak": forks, growth, truncation, eviction, cancellation, new weights and release at random, on a
tree of at most 256 blocks that is often full; every block must be back at the end and resident
memory flat from then on. "fork": the call alone, for prefixes of up to 16k tokens and for chains of
forks of forks. "plan": what precedes every decode step. No model runs: this is bookkeeping.
"plain Python" is the definition of the same tree, used where the native library is not there.
"""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from appo.rollout.native.tree.integrity import check_tree
from appo.rollout.native.tree.layout import Layout
from appo.rollout.native.tree.native_tree import NativeTree, make_tree
from appo.rollout.native.tree.segment_tree import SegmentTree

sys.path.append(str(Path(__file__).resolve().parents[2]))  # the checkout, for `bench`

from bench.common import Case, _resident, arguments, medians, report

MAX_BLOCKS = 256
MOST_LIVE = 64


def life(tree: Any, operations: int, seed: int) -> dict[str, int]:
    """So many random operations; returns how often each was done.

    Everything is released at the end.
    """
    rng = random.Random(seed)
    live: list[int] = []
    done = dict.fromkeys(OPERATIONS, 0)
    for _ in range(operations):
        name = rng.choice(list(OPERATIONS))
        if not live:
            name = "add"
        elif len(live) >= MOST_LIVE or (name == "weights" and rng.random() < 0.95):
            name = "release"
        OPERATIONS[name](tree, live, rng)
        done[name] += 1
    for seq in live:
        tree.release(seq)
    return done


def add(tree: Any, live: list[int], rng: random.Random) -> None:
    live.append(tree.add(range(rng.randint(1, 300))))


def fork(tree: Any, live: list[int], rng: random.Random) -> None:
    seq = rng.choice(live)
    if tree.stale(seq):
        score(tree, seq)
    if not tree.stale(seq):
        live.append(tree.fork(seq, rng.randint(1, tree.length(seq))))


def extend(tree: Any, live: list[int], rng: random.Random) -> None:
    seq = rng.choice(live)
    if tree.length(seq) < 1000:
        tree.extend(seq, range(rng.randint(1, 40)))


def truncate(tree: Any, live: list[int], rng: random.Random) -> None:
    seq = rng.choice(live)
    tree.truncate(seq, rng.randint(max(1, tree.length(seq) - 50), tree.length(seq)))


def evict(tree: Any, live: list[int], rng: random.Random) -> None:
    tree.evict(rng.choice(live))


def release(tree: Any, live: list[int], rng: random.Random) -> None:
    tree.release(live.pop(rng.randrange(len(live))))


def weights(tree: Any, live: list[int], rng: random.Random) -> None:
    tree.new_version(tree.version + 1)


def step(tree: Any, live: list[int], rng: random.Random) -> None:
    """Plan a forward pass and commit it, or now and then not.

    Make room first if the pool is full.
    """
    seqs = [seq for seq in rng.sample(live, min(16, len(live))) if not tree.stale(seq)]
    layout = tree.plan(seqs, 512)
    if not isinstance(layout, Layout):
        for seq in seqs:
            tree.evict(seq, {})
    elif rng.random() < 0.1:
        tree.abort(layout)
    else:
        tree.commit(layout)
        for seq in layout.seqs:
            tree.extend(seq, [seq])


def score(tree: Any, seq: int) -> None:
    """Run all positions on the path but the last under the new weights, if there is room."""
    *above, (leaf, own) = tree.path(seq)
    layout = tree.layout(
        [unit for unit in ((n, 0, c) for n, c in (*above, (leaf, own - 1))) if unit[2]]
    )
    if isinstance(layout, Layout):
        tree.commit(layout)


OPERATIONS: dict[str, Callable[[Any, list[int], random.Random], None]] = {
    f.__name__: f for f in (add, fork, extend, truncate, evict, release, weights, step)
}


def soak(make: Callable[[int], Any], operations: int) -> tuple[float, int]:
    """Seconds for that many operations, and blocks and nodes left when all is released."""
    tree = make(MAX_BLOCKS)
    start = time.perf_counter()
    life(tree, operations, seed=0)
    seconds = time.perf_counter() - start
    check_tree(tree)
    return seconds, tree.used + tree.live_nodes


def growth(operations: int, lives: int) -> float:
    """Bytes of resident memory that `lives` more lives of one tree add after the first ones."""
    tree = make_tree(MAX_BLOCKS)
    for seed in range(2):
        life(tree, operations, seed)
    before = _resident("VmRSS")
    for seed in range(lives):
        life(tree, operations, seed)
    return _resident("VmRSS") - before


def prefix(make: Callable[[], Any], tokens: int) -> tuple[Any, int]:
    """A tree with one sequence of that many tokens, all with KV."""
    tree = make()
    seq = tree.add(range(tokens))
    tree.commit(tree.plan([seq], tokens))
    return tree, seq


def chain(make: Callable[[], Any], levels: int) -> tuple[Any, int]:
    """A tree with a chain of forks of forks, 16 tokens each."""
    tree, seq = prefix(make, 16)
    for _ in range(levels):
        seq = tree.fork(seq, tree.length(seq))
        tree.extend(seq, range(16))
    return tree, seq


def fork_seconds(tree: Any, seq: int, count: int = 1000) -> Callable[[], None]:
    """A call that forks the sequence at its end `count` times and releases the forks."""
    at = tree.length(seq)

    def run() -> None:
        for child in [tree.fork(seq, at) for _ in range(count)]:
            tree.release(child)

    return run


def fork_cases(quick: bool) -> list[Case]:
    cases, count = [], 100 if quick else 1000
    places: list[tuple[str, Callable[[Callable[[], Any]], tuple[Any, int]]]] = [
        *((f"at {n} tokens", lambda make, n=n: prefix(make, n)) for n in (256, 1024, 4096, 16384)),
        *((f"under {n} forks", lambda make, n=n: chain(make, n)) for n in (3, 30)),
    ]
    for name, build in places[:2] if quick else places:
        runs = {
            "ours": fork_seconds(*build(make_tree), count),
            "plain Python": fork_seconds(*build(SegmentTree), count),
        }
        us = {n: s / count * 1e6 for n, s in medians(runs, 3 if quick else 7).items()}
        cases.append(Case(f"fork and release {name}", "us", us.pop("ours"), variants=us))
    return cases


def memory_per_node(count: int) -> float:
    """Resident bytes per fork of one prefix, its handle included, with one token and no KV yet."""
    tree, seq = prefix(make_tree, 1024)
    before = _resident("VmRSS")
    children = [tree.fork(seq, 1024) for _ in range(count)]
    after = _resident("VmRSS")
    for child in children:
        tree.release(child)
    return (after - before) / count


def plan_cases(quick: bool) -> list[Case]:
    """Planning a decode step of 32 rows under a prompt.

    Tree of four levels, as a layout in tensors.
    """
    cases = []
    for tokens in (256,) if quick else (256, 4096, 16384):
        runs = {
            "ours": planner(make_tree, tokens),
            "plain Python": planner(SegmentTree, tokens),
        }
        us = {name: s * 1e6 for name, s in medians(runs, 5 if quick else 51).items()}
        name = f"plan 32 rows, 4 levels, prompt {tokens}"
        cases.append(Case(name, "us", us.pop("ours"), variants=us))
    return cases


def planner(make: Callable[[], Any], tokens: int) -> Callable[[], None]:
    """A call that plans one decode step of the 32 leaves of a tree and aborts it.

    The tree has 4 · 2 · 4 forks, 64 tokens each.
    """
    tree, root = prefix(make, tokens)
    level = [root]
    for width in (4, 2, 4):
        level = [tree.fork(seq, tree.length(seq) - 8) for seq in level for _ in range(width)]
        for seq in level:
            tree.extend(seq, range(64))
    tree.commit(tree.plan(level, 10**6))
    for seq in level:
        tree.extend(seq, [1])
    return lambda: tree.abort(tree.plan(level, 0))


def main() -> None:
    args = arguments(__doc__ or "")
    operations = 1000 if args.quick else 10_000
    ours, left = soak(make_tree, operations)
    plain, plain_left = soak(SegmentTree, operations)
    cases = [
        Case(f"{operations} random operations", "s", ours, variants={"plain Python": plain}),
        Case("blocks and nodes left", "count", left, variants={"plain Python": plain_left}),
        Case("resident memory after 10 more lives", "KiB", growth(operations, 10) / 1024),
        Case("memory of a fork", "B", memory_per_node(1000 if args.quick else 50_000)),
        *fork_cases(args.quick),
        *plan_cases(args.quick),
    ]
    kind = "C++" if isinstance(make_tree(), NativeTree) else "plain Python (no native library)"
    report(f"Segment tree, {kind}", cases, args)
    if left or plain_left:
        raise SystemExit(f"leaked blocks and nodes: {left}, in plain Python {plain_left}")


if __name__ == "__main__":
    main()
