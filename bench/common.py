"""What every benchmark script shares: `--quick`, `--json FILE`, fair timing, one table on the screen.

A script builds a list of `Case`s and calls `report`. Times are medians of alternating runs: ours, peer, ours, peer, …,
so that a neighbour on a shared machine slows all of them alike.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class Case:
    """One row: our figure beside those of the peers, in one unit; `error` is our largest error against float64."""

    name: str
    unit: str
    ours: float
    peers: dict[str, float] = field(default_factory=dict)
    error: float | None = None
    higher_is_better: bool = False

    @property
    def ratio_best_peer(self) -> float | None:
        """How many times better than the best peer we are (below 1: worse)."""
        if not self.peers:
            return None
        if self.higher_is_better:
            return self.ours / max(self.peers.values())
        return min(self.peers.values()) / self.ours

    def row(self) -> dict[str, Any]:
        return {**asdict(self), "ratio_best_peer": self.ratio_best_peer}


def arguments(description: str) -> argparse.Namespace:
    """`--quick` (small sizes, for CI) and `--json FILE`."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument(
        "--quick", action="store_true", help="small sizes: shows that it runs, not how fast"
    )
    parser.add_argument("--json", metavar="FILE", type=Path, help="also write the table as JSON")
    return parser.parse_args()


def medians(runs: Mapping[str, Callable[[], object]], repeats: int = 7) -> dict[str, float]:
    """Seconds per call: median wall time of `repeats` calls each, alternating, after one warm-up call each."""
    for run in runs.values():
        run()
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(t) for name, t in times.items()}


def peak_bytes(run: Callable[[], object]) -> int:
    """The most CPU tensor memory that was alive at once during one call, beyond what was alive before it."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        run()
    events = [e for e in prof.profiler.kineto_results.events() if e.name() == "[memory]"]
    alive = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        alive += event.nbytes()
        peak = max(peak, alive)
    return peak


def machine() -> dict[str, Any]:
    """The hardware and the versions a figure depends on; no host name."""
    import torch

    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        models = [
            line.split(":", 1)[1].strip()
            for line in info.read_text().splitlines()
            if line.startswith("model name")
        ]
        cpu = models[0] if models else cpu
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "cpu": cpu,
        "cores": usable,
        "gpus": gpus,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.system(),
    }


def report(title: str, cases: Sequence[Case], args: argparse.Namespace) -> None:
    """Print the table; with --json write {machine, date, command, quick, cases}."""
    from rich.console import Console
    from rich.table import Table

    where = machine()
    peers = list(dict.fromkeys(name for case in cases for name in case.peers))
    table = Table(title=title)
    for column in ("case", "unit", "ours", *peers, "× best peer", "max error"):
        table.add_column(column, justify="left" if column in ("case", "unit") else "right")
    for case in cases:
        ratio = case.ratio_best_peer
        table.add_row(
            case.name,
            case.unit,
            f"{case.ours:.4g}",
            *(f"{case.peers[p]:.4g}" if p in case.peers else "" for p in peers),
            "" if ratio is None else f"{ratio:.3g}",
            "" if case.error is None else f"{case.error:.1e}",
        )
    console = Console(width=max(120, Console().width))
    console.print(table)
    console.print(
        f"{where['cpu']}, {where['cores']} cores, {where['threads']} threads, torch {where['torch']}"
    )
    if args.json:
        document = {
            "machine": where,
            "date": datetime.date.today().isoformat(),
            "command": shlex.join(["python", *sys.argv]),
            "quick": args.quick,
            "cases": [case.row() for case in cases],
        }
        args.json.write_text(json.dumps(document, indent=2) + "\n")
