"""What every benchmark script shares.

`--quick`, `--json FILE`, fair timing, one table on the screen.

A script builds a list of `Case`s and calls `report`. Times are medians of alternating runs: ours,
peer, ours, peer, …, so that a neighbour on a shared machine slows all of them alike. CPU-seconds
stand beside wall time where they matter.
"""

from __future__ import annotations

import argparse
import ctypes
import datetime
import gc
import json
import os
import platform
import re
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple


@dataclass
class Case:
    """One row: our figure beside those of the peers, in one unit.

    `error` is our largest error against float64.

    `variants` are figures of ours under other settings; they are shown, and never count as a peer.
    """

    name: str
    unit: str
    ours: float
    peers: dict[str, float] = field(default_factory=dict)
    error: float | None = None
    higher_is_better: bool = False
    variants: dict[str, float] = field(default_factory=dict)

    @property
    def ratio_best_peer(self) -> float | None:
        """How many times better than the best peer we are (below 1: worse).

        None if that is nothing to divide by.
        """
        if not self.peers:
            return None
        best = max(self.peers.values()) if self.higher_is_better else min(self.peers.values())
        above, below = (self.ours, best) if self.higher_is_better else (best, self.ours)
        return above / below if below else None

    def row(self) -> dict[str, Any]:
        return {**asdict(self), "ratio_best_peer": self.ratio_best_peer}


def parser(description: str) -> argparse.ArgumentParser:
    """A parser with `--quick` (small sizes, for CI) and `--json FILE`.

    For scripts that add options of their own.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--quick", action="store_true", help="small sizes: shows that it runs, not how fast"
    )
    parser.add_argument("--json", metavar="FILE", type=Path, help="also write the table as JSON")
    return parser


def arguments(description: str) -> argparse.Namespace:
    """`--quick` and `--json FILE`, parsed."""
    return parser(description).parse_args()


class Timing(NamedTuple):
    """Median seconds per call: on the clock, and of CPU time over all threads of the process."""

    wall: float
    cpu: float


def timings(
    runs: Mapping[str, Callable[[], object]], repeats: int = 7, warm: bool = True
) -> dict[str, Timing]:
    """Medians of `repeats` calls each, alternating, after one warm-up call each.

    Unless warm is False.
    """
    if warm:
        for run in runs.values():
            run()
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            wall, cpu = time.perf_counter(), time.process_time()
            run()
            times[name].append((time.perf_counter() - wall, time.process_time() - cpu))
    return {name: Timing(*map(statistics.median, zip(*t))) for name, t in times.items()}


def medians(runs: Mapping[str, Callable[[], object]], repeats: int = 7) -> dict[str, float]:
    """Seconds per call.

    Median wall time of `repeats` calls each, alternating, after one warm-up call each.
    """
    return {name: t.wall for name, t in timings(runs, repeats).items()}


def peak_bytes(run: Callable[[], object]) -> int:
    """The most CPU tensor memory that was alive at once during one call.

    What was alive before it is not counted.

    Counts torch's allocator only; native code has its own, see `resident_bytes`.
    """
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        run()
    events = [e for e in prof.profiler.kineto_results.events() if e.name() == "[memory]"]
    alive = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        alive += event.nbytes()
        peak = max(peak, alive)
    return peak


class Resident(NamedTuple):
    """Bytes of physical memory, all allocators together.

    peak  the most that one later call held beyond what was there before it, its results included
    kept  what the first call left behind after its results were freed: packed weights, compiled
          code, scratch
    """

    peak: int
    kept: int


def resident_bytes(run: Callable[[], object]) -> Resident | None:
    """Memory of the whole process around two calls.

    None where the kernel does not tell (not Linux).

    Only meaningful in a process that did nothing else before: use it through `in_fresh_process`.
    """
    if not Path("/proc/self/clear_refs").exists():
        return None
    empty = _resident("VmRSS")
    run()
    before = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark falls to what is held now
    run()
    return Resident(max(0, _resident("VmHWM", trim=False) - before), max(0, before - empty))


def _resident(line: str, trim: bool = True) -> int:
    """A line of /proc/self/status in bytes, after free memory went back to the system."""
    if trim:
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
    found = re.search(rf"{line}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def in_fresh_process(function: Callable[..., Any], *args: Any) -> Any:
    """function(*args) in a new interpreter whose memory goes back when it is freed.

    Every block over 64 KiB is mapped there.

    `function` must be importable: a function of a module, not a closure.
    """
    with (
        _environment(MALLOC_MMAP_THRESHOLD_="65536", MALLOC_TRIM_THRESHOLD_="65536"),
        ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool,
    ):
        return pool.submit(function, *args).result()


@contextmanager
def _environment(**values: str) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


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


def report(
    title: str,
    cases: Sequence[Case],
    args: argparse.Namespace,
    notes: Mapping[str, str] | None = None,
) -> None:
    """Print one row per case.

    With --json write {machine, date, command, quick, cases} and `notes`, if there are any.
    """
    from rich.table import Table

    others = list(dict.fromkeys(name for case in cases for name in (*case.variants, *case.peers)))
    table = Table(title=title)
    for column in ("case", "unit", "ours", *others, "× best peer", "max error"):
        table.add_column(column, justify="left" if column in ("case", "unit") else "right")
    for case in cases:
        ratio = case.ratio_best_peer
        figures = case.variants | case.peers
        table.add_row(
            case.name,
            case.unit,
            f"{case.ours:.4g}",
            *(f"{figures[p]:.4g}" if p in figures else "" for p in others),
            "" if ratio is None else f"{ratio:.3g}",
            "" if case.error is None else f"{case.error:.1e}",
        )
    _show([table], notes)
    _write(args, cases=[case.row() for case in cases], **({"notes": dict(notes)} if notes else {}))


def report_by_implementation(
    sections: Mapping[str, Sequence[Case]],
    notes: Mapping[str, str],
    args: argparse.Namespace,
    **content: Any,
) -> None:
    """For many peers: one table per section with a row per implementation and a column per case.

    The last row says how many times better we are than the best peer. With --json the cases are
    named "section: case". `notes` (implementation → remark) is printed below and written too;
    `content` is written only.
    """
    from rich.table import Table

    tables = []
    for title, cases in sections.items():
        table = Table(title=title, title_justify="left")
        table.add_column("implementation")
        for case in cases:
            table.add_column(", ".join(filter(None, (case.name, case.unit))), justify="right")
        figures = [{"ours": case.ours} | case.variants | case.peers for case in cases]
        for name in dict.fromkeys(name for column in figures for name in column):
            table.add_row(name, *(f"{c[name]:.3g}" if name in c else "" for c in figures))
        ratios = [case.ratio_best_peer for case in cases]
        if any(r is not None for r in ratios):
            table.add_section()
            table.add_row("ours better by, ×", *("" if r is None else f"{r:.3g}" for r in ratios))
        tables.append(table)
    _show(tables, notes)
    named = [
        {**c.row(), "name": f"{title}: {c.name}"} for title, cs in sections.items() for c in cs
    ]
    _write(args, cases=named, notes=dict(notes), **content)


def _show(tables: Sequence[Any], notes: Mapping[str, str] | None = None) -> None:
    from rich.console import Console

    where = machine()
    console = Console(width=max(120, Console().width), highlight=False)
    for table in tables:
        console.print(table)
    for name, text in (notes or {}).items():
        console.print(f"{name}: {text}", markup=False)
    console.print(
        f"{where['cpu']}, {where['cores']} cores, {where['threads']} threads, torch {where['torch']}"
    )


def _write(args: argparse.Namespace, **content: Any) -> None:
    if args.json:
        document = {
            "machine": machine(),
            "date": datetime.date.today().isoformat(),
            "command": shlex.join(["python", *sys.argv]),
            "quick": args.quick,
            **content,
        }
        args.json.write_text(json.dumps(document, indent=2) + "\n")
