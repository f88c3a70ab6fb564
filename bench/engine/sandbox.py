"""What a sandboxed call costs beyond a bare interpreter: start per level, calls a second.

`python bench/engine/sandbox.py [--quick] [--json FILE]`. The peer of every start is `python -I -S
-c` by subprocess.run, the least that running a program in a fresh interpreter can cost; the peer of
the throughput is the same from as many threads.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from appo.tools.sandbox import SandboxLevel, probe, run_python
from appo.tools.sandbox.files import interpreter

sys.path.append(str(Path(__file__).resolve().parents[2]))  # the checkout, for `bench`

from bench.common import Case, arguments, medians, report

CODE = "print(6 * 7)"
LEVELS: tuple[SandboxLevel, ...] = ("rlimit", "landlock", "strict")


def bare() -> None:
    """The floor: a fresh interpreter without any wall."""
    done = subprocess.run(
        [interpreter(), "-I", "-S", "-B", "-c", CODE],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        env={"LANG": "C.UTF-8"},
    )
    assert done.stdout == b"42\n"


def boxed(level: SandboxLevel) -> Callable[[], None]:
    def run() -> None:
        assert run_python(CODE, level=level).stdout == "42\n"

    return run


def burst(run: Callable[[], object], calls: int) -> Callable[[], None]:
    """`calls` calls of `run` from as many threads as there are cores."""

    def go() -> None:
        with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            list(pool.map(lambda _: run(), range(calls)))

    return go


def main() -> None:
    args = arguments(__doc__ or "")
    works = {level: probe(level).works for level in LEVELS}
    for level in LEVELS:
        print(f"{level}: {probe(level).reason}")
    levels = [level for level in LEVELS if works[level]]

    runs: dict[str, Callable[[], object]] = {"bare": bare, **{lv: boxed(lv) for lv in levels}}
    start = medians(runs, repeats=5 if args.quick else 60)
    cases = [
        Case(f"start, {lv}", "ms", start[lv] * 1e3, {"bare python": start["bare"] * 1e3})
        for lv in levels
    ]

    calls = 8 if args.quick else 40
    bursts = medians(
        {k: burst(run, calls) for k, run in runs.items()}, repeats=3 if args.quick else 9
    )
    rate = {name: calls / seconds for name, seconds in bursts.items()}
    cases += [
        Case(
            f"throughput, {lv}",
            "calls/s",
            rate[lv],
            {"bare python": rate["bare"]},
            higher_is_better=True,
        )
        for lv in levels
    ]
    report("sandbox", cases, args)


if __name__ == "__main__":
    main()
