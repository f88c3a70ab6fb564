"""What the GPU kernels must move and compute, and how long an H100 would need at least.

**Estimates: nothing is run.**

    python bench/gpu/roofline.py [--quick] [--json FILE]

Bytes and operations come from the kernels' own `traffic` formulas, each launch reading every
operand once (a perfect cache inside a launch, none between launches). Peaks: 798 TFLOP/s (a bf16
product of 8192³) and 3.0 TB/s (a copy), both measured by others on an H100. `minimum` is any
implementation that keeps no logits: h, w and 16 bytes per token. tests/bench/test_roofline.py holds
the formulas against what a call really allocates.
"""

from __future__ import annotations

import argparse
import datetime
import json
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

from appo._kernels.common.gpu import config

sys.path.append(str(Path(__file__).resolve().parents[2]))  # the checkout, for `bench`

from bench.common import parser

PEAK_FLOPS = 798e12
PEAK_BYTES = 3.0e12
ARCH = "sm_90"
PROCESSORS = 132


@dataclass(frozen=True)
class Work:
    """Bytes moved, floating-point operations done, bytes of workspace beside inputs and results."""

    bytes: int
    flop: int
    workspace: int = 0

    @property
    def milliseconds(self) -> float:
        """The larger of the two times: nothing overlaps better than perfectly."""
        return 1e3 * max(self.bytes / PEAK_BYTES, self.flop / PEAK_FLOPS)

    @property
    def limit(self) -> str:
        return "bytes" if self.bytes / PEAK_BYTES > self.flop / PEAK_FLOPS else "FLOP"


def minimum(n: int, hidden: int, v: int) -> Work:
    """Forward without logits in memory.

    H and w read once, four float32 numbers per token written.
    """
    return Work(2 * (n + v) * hidden + 16 * n, 2 * n * v * hidden)


def forward_triton(n: int, hidden: int, v: int) -> Work:
    """partial.py on blocks of tokens, merge.py after each."""
    from appo._kernels.linear_logprob.gpu import merge, partial

    tile = config.pick(config.PARTIAL, ARCH, True)
    plan = config.cut(n, v, tile, True, PROCESSORS)
    moved = done = 0
    for tokens in split(n, plan.tokens):
        for work in (
            partial.traffic(tokens, v, hidden, plan.slots),
            merge.traffic(tokens, plan.slots),
        ):
            moved, done = moved + work[0], done + work[1]
    return Work(moved, done, config.stats_workspace_bytes(n, v, ARCH))


def forward_cublas32(n: int, hidden: int, v: int) -> Work:
    """A library product into each block of float32 logits, rowstats.py over it."""
    from appo._kernels.linear_logprob.gpu import rowstats

    tokens, columns = config.logit_block(n, v)
    moved = done = 0
    for t in split(n, tokens):
        for c in split(v, columns):
            read, operations = rowstats.traffic(t, c)
            moved += 2 * (t + c) * hidden + 4 * t * c + read
            done += 2 * t * c * hidden + operations
    return Work(moved, done, config.logit_workspace_bytes(n, v))


def backward_triton(n: int, hidden: int, v: int) -> Work:
    """dlogits.py into a strip of bf16 gradients, then dh += G w and dW += Gᵀ h in float32.

    Both are rounded once at the end.
    """
    from appo._kernels.linear_logprob.gpu import dlogits

    tokens, columns = config.gradient_block(n, v)
    moved = done = 0
    for j, c in enumerate(split(v, columns)):
        for i, t in enumerate(split(n, tokens)):
            read, operations = dlogits.traffic(t, c, hidden)
            strip = 2 * t * c
            dh = strip + 2 * c * hidden + 4 * t * hidden * (1 + (j > 0))
            dw = strip + 2 * t * hidden + 4 * c * hidden * (1 + (i > 0))
            moved += read + dh + dw
            done += operations + 4 * t * c * hidden
    rounded = 6 * (n + v) * hidden
    return Work(moved + rounded, done, config.gradient_workspace_bytes(n, v, hidden))


def split(n: int, block: int) -> list[int]:
    return [min(block, n - i) for i in range(0, n, block)]


ROWS = {
    "forward, minimum": minimum,
    "forward, triton": forward_triton,
    "forward, cublas32": forward_cublas32,
    "backward, triton": backward_triton,
}


def main() -> None:
    args = parser(__doc__ or "").parse_args()
    hidden, v = 4096, 152_064
    tokens = (256, 32_768) if args.quick else (1, 256, 4096, 32_768, 131_072, 1_048_576)
    table = [(n, name, work(n, hidden, v)) for n in tokens for name, work in ROWS.items()]
    show(table, f"Estimates, never measured: H100, bf16, H={hidden}, V={v:,}")
    if args.json:
        args.json.write_text(json.dumps(document(table, args), indent=2) + "\n")


def show(table: list[tuple[int, str, Work]], title: str) -> None:
    from rich.console import Console
    from rich.table import Table

    out = Table(title=title)
    for column in ("tokens", "pass", "GB", "TFLOP", "ms at least", "limited by", "workspace, MiB"):
        out.add_column(column, justify="left" if column in ("pass", "limited by") else "right")
    for n, name, work in table:
        out.add_row(
            f"{n:,}",
            name,
            f"{work.bytes / 1e9:.2f}",
            f"{work.flop / 1e12:.3g}",
            f"{work.milliseconds:.3g}",
            work.limit,
            f"{work.workspace / 2**20:.1f}",
            end_section=name == list(ROWS)[-1],
        )
    Console(width=100).print(out)


def document(table: list[tuple[int, str, Work]], args: argparse.Namespace) -> dict[str, object]:
    return {
        "machine": {"cpu": "none: computed from formulas"},
        "date": datetime.date.today().isoformat(),
        "command": shlex.join(["python", *sys.argv]),
        "quick": args.quick,
        "cases": [
            {
                "name": f"{name}, T={n:,}",
                "unit": "ms at least, by formula",
                "ours": work.milliseconds,
                "peers": {},
                "ratio_best_peer": None,
                "error": None,
                "bytes": work.bytes,
                "flop": work.flop,
                "workspace": work.workspace,
            }
            for n, name, work in table
        ],
    }


if __name__ == "__main__":
    main()
