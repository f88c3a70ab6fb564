"""What the parts of bench/gpu/suite.py share.

The rows they write, the time they may take, shapes and inputs.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.append(str(Path(__file__).resolve().parents[2]))  # the checkout, for `bench`

from bench.gpu.timing import Measured, Stopwatch

Runs = Mapping[str, Callable[[], object]]


@dataclass
class Rows:
    """Where a part writes what it finds, and how long it may take."""

    file: Path
    seconds: float = float("inf")
    started: float = field(default_factory=time.monotonic)

    def add(self, case: str, wrong: str | None = None, ours: bool = True, **values: Any) -> None:
        """A row of the report.

        What is wrong with it counts as an error where it is ours, and as unavailable where it is
        not.
        """
        remark = {"error" if ours else "unavailable": wrong} if wrong else {}
        self._write({"case": case, "values": values, **remark})

    def note(self, text: str) -> None:
        self._write({"note": text})

    def out_of_time(self) -> bool:
        return time.monotonic() - self.started > self.seconds

    def _write(self, row: dict[str, Any]) -> None:
        with self.file.open("a") as out:
            out.write(json.dumps(row) + "\n")

    def timed(self, case: str, watch: Stopwatch, runs: Runs, flop: float, repeats: int) -> None:
        """One row per name of `runs`.

        TFLOP/s count `flop` for all of them, whatever they really do.

        Only "default" and "ours…" must work: a peer may be broken, a tile may ask for more than the
        device has.
        """
        found = watch.measure(runs, repeats, self.out_of_time)
        best = min(
            (name for name, m in found.items() if isinstance(m, Measured)),
            key=lambda name: found[name].median,
            default=None,
        )
        for name, measured in found.items():
            if isinstance(measured, str):
                self.add(f"{case}: {name}", measured, ours=name.startswith(("default", "ours")))
                continue
            ms = measured.median
            values = {"ms": ms, "fastest": measured.fastest, "TFLOP/s": flop / ms / 1e9}
            self.add(f"{case}: {name}", **values, MiB=measured.peak)
        if best is not None:
            clock = watch.clock(runs[best])
            mhz = f"{clock} MHz under it" if clock else "unknown"
            self.note(f"{case}: fastest is {best}; SM clock {mhz}")


@dataclass(frozen=True)
class Shape:
    tokens: int
    hidden: int
    vocab: int

    def __str__(self) -> str:
        return f"T={self.tokens:,} H={self.hidden} V={self.vocab:,}"

    @property
    def product(self) -> float:
        """Floating-point operations of one product of h and w."""
        return 2.0 * self.tokens * self.hidden * self.vocab


def inputs(
    shape: Shape, device: str, dtype: torch.dtype = torch.bfloat16
) -> tuple[Tensor, Tensor, Tensor]:
    """h, w and targets; logits of deviation 3, targets that include the first and the last id."""
    g = torch.Generator(device=device).manual_seed(0)
    h = torch.randn(shape.tokens, shape.hidden, generator=g, device=device)
    w = torch.randn(shape.vocab, shape.hidden, generator=g, device=device)
    y = torch.randint(shape.vocab, (shape.tokens,), generator=g, device=device)
    y[0], y[-1] = 0, shape.vocab - 1
    return h.to(dtype), w.mul_(3 / shape.hidden**0.5).to(dtype), y
