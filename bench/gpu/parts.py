"""One measuring part of bench/gpu/suite.py, in a process of its own.

So a broken device ends one part only.

    python bench/gpu/parts.py PART --rows FILE [--quick] [--seconds N]

Rows are appended to FILE as JSON, one a line, as soon as they are known: {"case", "values"} and,
where something of ours is wrong, "error", of others, "unavailable"; {"note"} for a remark. A part
that runs out of time says what it left out.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2]))  # the checkout, for `bench`

from bench.gpu import matrix as gpu_matrix
from bench.gpu import speed as gpu_speed
from bench.gpu.rows import Rows
from bench.gpu.timing import Stopwatch

TIMED = {
    "forward": gpu_speed.forward,
    "cublas32": gpu_speed.cublas32,
    "backward": gpu_speed.backward,
    "peers": gpu_speed.peers,
}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("part", choices=("matrix", *TIMED))
    options.add_argument("--rows", type=Path, required=True)
    options.add_argument("--quick", action="store_true")
    options.add_argument("--seconds", type=float, default=float("inf"))
    args = options.parse_args()
    rows = Rows(args.rows, args.seconds)
    if args.part == "matrix":
        gpu_matrix.matrix(rows, args.quick)
    else:
        TIMED[args.part](rows, args.quick, Stopwatch())


if __name__ == "__main__":
    main()
