"""What a fork costs, how time and memory grow with the tree, and 10,000 random operations.

    OMP_NUM_THREADS=1 python bench/engine/growth.py [--quick] [--json FILE] [--only copy,batching,vllm,llama] [--venvs FOLDER]

Forks: at the end of a computed sequence of 256 … 16,384 tokens, against the peers of
bench/engine/rollout.py, in turn; medians. "call" is the fork alone (engines that find a prefix by
its tokens have none), "first token" the fork and the token drawn after it, "computed" the rows that
the model was run on for that. "prefill again" is what a fork costs without any cache: what the
cache-copying peer took to compute the sequence.

Growth: ours alone; one of roots, branches, prompt and drawn tokens moves, the others stay at 4, 3,
512 and 64; tools answer at once; medians of 3. KV in use: the blocks taken while the whole tree is
alive, against its tokens × bytes per token (goal ≤ 1.02).

One thread; weights and environments as in bench/engine/rollout.py. The segment tree alone has
bench/engine/tree_soak.py.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import Any

from appo.models.resolve import default_cache

sys.path.append(str(Path(__file__).resolve().parents[2]))  # the checkout, for `bench`

from bench.common import Case, parser, report_by_implementation
from bench.engine.rollout_soak import soak
from bench.peers.rollout.engines import (
    OURS,
    EngineFailed,
    Running,
    chosen,
    last_line,
    start,
)
from bench.peers.rollout.model_files import prepare, vocab_of
from bench.peers.rollout.workload import Workload

FIGURES = {
    "call_us": ("call", "µs"),
    "first_ms": ("first token", "ms"),
    "rows": ("computed", "rows"),
}
GROWTH = (
    "a tree: seconds",
    "a tree: drawn tokens a second",
    "a tree: rows computed, as by its formula",
    "a tree: KV in use",
    "a tree: KV in use against its tokens",
)
COPY = "HF cache copy"
CONTEXT = 16_384 + 64
ROUNDS, FORKS_A_ROUND = 5, 3


def arguments() -> Namespace:
    p = parser(__doc__ or "")
    p.add_argument("--only", metavar="PEERS", help="peers of the forks, separated by commas")
    p.add_argument("--venvs", type=Path, default=default_cache() / "bench", metavar="FOLDER")
    return p.parse_args()


def settings_of(folder: Path, gguf: Path, sequences: int) -> dict[str, Any]:
    """As in bench/engine/rollout.py, with room for the deepest fork."""
    return {
        "model": str(folder), "gguf": str(gguf), "vocab": vocab_of(folder), "threads": 1, "sequences": sequences,
        "max_context": CONTEXT, "kv_tokens": 2 * 16_384 + 1024, "kv_bytes": 1 << 30,
    }  # fmt: skip


def forks(
    args: Namespace, folder: Path, gguf: Path, notes: dict[str, str]
) -> dict[str, list[Case]]:
    depths = (256,) if args.quick else (256, 1024, 4096, 16_384)
    settings = settings_of(folder, gguf, 4)
    engines = chosen("copy,batching,vllm,llama" if args.only is None else args.only)
    running = start(engines, args.venvs, settings, notes)
    try:
        return {
            f"fork at {depth:,}": fork_cases(running, depth, settings["vocab"], notes)
            for depth in depths
        }
    finally:
        for peer in running:
            peer.close()


def fork_cases(running: list[Running], depth: int, vocab: int, notes: dict[str, str]) -> list[Case]:
    """A peer that fails is taken out of `running`, and its note says why."""
    prefill: dict[str, float] = {}
    found: dict[str, list[dict[str, Any]]] = {}
    for k in range(ROUNDS + 1):
        for peer in list(running):
            name = peer.engine.name
            try:
                if k == 0:
                    prefill[name] = peer.ask("trunk", depth=depth, vocab=vocab)["prefill_ms"]
                    found[name] = []
                # The first round warms up what is allocated at the first use of a depth.
                answer = peer.ask("forks", repeats=FORKS_A_ROUND)["forks"]
                found[name] += answer if k else []
            except EngineFailed as e:
                notes[name] = f"error: {last_line(e)}"
                found.pop(name, None)
                running.remove(peer)
    if "ours" not in found:
        raise SystemExit(f"our engine failed: {notes['ours']}")
    cases = []
    for key, (name, unit) in FIGURES.items():
        median = {
            who: statistics.median(fork[key] for fork in got)
            for who, got in found.items()
            if got[0][key] is not None
        }
        again = {"first_ms": prefill.get(COPY), "rows": float(depth)}.get(key)
        if again is not None:
            median["prefill again"] = again
        cases.append(Case(name, unit, median.pop("ours"), median))
    return cases


def trees(quick: bool, vocab: int) -> dict[str, Workload]:
    """Name → tree: the one in the middle, then those that differ from it in one number."""
    base = Workload(new=16 if quick else 64, prompt=128 if quick else 512, wait_s=0.0, vocab=vocab)
    values: dict[str, tuple[int, ...]] = {
        "roots": (8,) if quick else (1, 16),
        "branches": (0,) if quick else (0, 7),
        "prompt": (256,) if quick else (128, 2048, 8192),
        "new": (32,) if quick else (32, 256),
    }
    moved = {f"{name} {v:,}": replace(base, **{name: v}) for name, vs in values.items() for v in vs}
    return {"all as said": base} | moved


def growth(args: Namespace, folder: Path, gguf: Path) -> dict[str, list[Case]]:
    """Raises SystemExit if rows differ from the formula of the tree.

    Then something is computed twice, or not at all.
    """
    notes: dict[str, str] = {}
    running = start([OURS], args.venvs, settings_of(folder, gguf, 64), notes)
    if not running:
        raise SystemExit(f"our engine failed: {notes['ours']}")
    seconds, rate, rows, memory, ratio = sections = [[] for _ in GROWTH]
    warm_up = Workload(prompt=64, new=16, wait_s=0.0, vocab=vocab_of(folder), round=-1)
    try:
        running[0].ask("hold", work=warm_up.as_dict())
        for name, work in trees(args.quick, vocab_of(folder)).items():
            wall, stats = held(running[0], work, 1 if args.quick else 3)
            used = stats["blocks_used"] * stats["block_bytes"]
            unique = work.unique_tokens() * bytes_per_token(folder)
            pool = {"held by the pool": stats["kv_bytes"] / 2**20}
            seconds.append(Case(name, "s", wall))
            rate.append(Case(name, "tokens/s", work.generated / wall, higher_is_better=True))
            rows.append(Case(name, "rows", work.needed_rows()))
            memory.append(Case(name, "MiB", used / 2**20, variants=pool))
            ratio.append(Case(name, "×", used / unique))
    finally:
        running[0].close()
    return dict(zip(GROWTH, sections))


def held(peer: Running, work: Workload, repeats: int) -> tuple[float, dict[str, float]]:
    """Median seconds of growing the tree, and the engine's stats while all of it is alive."""
    walls = []
    for k in range(repeats):
        got = peer.ask("hold", work=replace(work, round=k).as_dict())
        if got["rows"] != work.needed_rows():
            raise SystemExit(f"{work}: {got['rows']} rows, the tree needs {work.needed_rows()}")
        walls.append(got["wall"])
    return statistics.median(walls), got["stats"]


def bytes_per_token(folder: Path) -> int:
    """Keys and values of one position in all layers, bfloat16."""
    c = json.loads((folder / "config.json").read_text())
    head = c.get("head_dim") or c["hidden_size"] // c["num_attention_heads"]
    return 2 * 2 * c["num_hidden_layers"] * head * c["num_key_value_heads"]


def main() -> None:
    args = arguments()
    notes: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder, gguf = prepare(Path(scratch), args.quick, CONTEXT)
        sections = forks(args, folder, gguf, notes)
        sections |= growth(args, folder, gguf)
    sections["random operations"] = soak(1000 if args.quick else 10_000)
    report_by_implementation(sections, notes, args)


if __name__ == "__main__":
    main()
