"""Everything that only a GPU can answer, in one command.

Tests, accuracy, sweeps, and a table against other packages.

    python bench/gpu/suite.py [--quick] [--only PART] [--minutes N] [--json FILE] [--report FILE.md] [--require-gpu]

Parts, each in a process of its own, so that a crash or a hang is reported and the rest goes on:

    tests     pytest -m gpu
    matrix    every backend against float64 on the same inputs, on the device
    forward, cublas32, backward   sweeps over tile settings and block sizes; the tables of
                                  kernels/common/gpu/config.py come from here
    peers     PyTorch eager, torch.compile, F.linear_cross_entropy, Liger, Cut-Cross-Entropy: those
              that are installed

Times are medians of CUDA events with a cold L2, alternating, with the SM clock beside them.
--minutes (default 8) is shared out over the parts. Without a CUDA device nothing is measured and
the report says so: exit code 0, or 2 with --require-gpu. Exit code 1: a test, a comparison or a
part failed.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[2]))  # the checkout, for `bench`

from bench.common import machine, parser

ROOT = Path(__file__).resolve().parents[2]
# Share of the remaining time that a part may take; what it leaves over goes to those after it.
PARTS = {
    "tests": 0.3,
    "matrix": 0.25,
    "forward": 0.35,
    "cublas32": 0.3,
    "backward": 0.4,
    "peers": 1.0,
}
GRACE = 15.0  # seconds between the moment a part should stop by itself and the moment it is killed


@dataclass
class Result:
    """What came of one part.

    Status "ok", "failed" or "skipped", why, and its rows (see gpu_parts.py).
    """

    part: str
    status: str
    why: str = ""
    seconds: float = 0.0
    rows: list[dict[str, Any]] = field(default_factory=list)


def main() -> int:
    args = arguments()
    missing = why_no_gpu()
    if missing:
        print(
            f"No CUDA device: {missing}. Skipped: {', '.join(args.only)}. No figure was measured."
        )
        results = [Result(part, "skipped", missing) for part in args.only]
    else:
        results = run_parts(args.only, args.quick, 60 * args.minutes)
    page = as_markdown(results, document(results, args))
    if args.report:
        args.report.write_text(page)
    if args.json:
        args.json.write_text(json.dumps(document(results, args), indent=2) + "\n")
    if not missing:
        print(page)
    if missing and args.require_gpu:
        return 2
    return 1 if any(result.status == "failed" for result in results) else 0


def arguments() -> argparse.Namespace:
    options = parser(__doc__ or "")
    options.add_argument("--report", metavar="FILE", type=Path, help="write the tables as Markdown")
    options.add_argument(
        "--only", choices=tuple(PARTS), action="append", help="repeatable; default: all parts"
    )
    options.add_argument("--minutes", type=float, default=8.0, help="for everything together")
    options.add_argument(
        "--require-gpu", action="store_true", help="no CUDA device is an error (exit code 2)"
    )
    args = options.parse_args()
    if args.minutes <= 0:
        options.error(f"--minutes is {args.minutes:g}, expected more than 0")
    args.only = [part for part in PARTS if part in (args.only or PARTS)]
    return args


def why_no_gpu() -> str:
    """Empty if there is a device."""
    import torch

    if torch.cuda.is_available():
        return ""
    if torch.version.cuda is None and torch.version.hip is None:
        return f"torch {torch.__version__} was built without CUDA"
    return f"torch {torch.__version__} finds none (driver, or CUDA_VISIBLE_DEVICES?)"


def run_parts(parts: Sequence[str], quick: bool, seconds: float) -> list[Result]:
    end = time.monotonic() + seconds
    results = []
    for part in parts:
        share = 1.0 if part == parts[-1] else PARTS[part]
        limit = max(0.0, end - time.monotonic()) * share
        print(f"{part}: at most {limit:.0f} s", file=sys.stderr, flush=True)
        if limit < 1:
            results.append(Result(part, "failed", "no time was left for it"))
            continue
        start = time.monotonic()
        result = run_tests(limit) if part == "tests" else run_part(part, quick, limit)
        result.seconds = round(time.monotonic() - start, 1)
        results.append(result)
    return results


def run_part(part: str, quick: bool, limit: float, script: Path | None = None) -> Result:
    """One process; what it wrote before it crashed, hung or was killed still counts."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "rows.jsonl")
        command = [
            sys.executable,
            str(script or ROOT / "bench/gpu/parts.py"),
            part,
            "--rows",
            str(file),
        ]
        command += ["--seconds", f"{limit:.0f}"] + ["--quick"] * quick
        why = finish(command, limit + GRACE)
        written = file.read_text() if file.is_file() else ""
    whole = written.rpartition("\n")[0].splitlines()  # a killed process may have left half a line
    rows = [json.loads(line) for line in whole]
    wrong = sum("error" in row for row in rows)
    if not why and wrong:
        why = f"{wrong} of its rows report an error"
    return Result(part, "failed" if why else "ok", why, rows=rows)


def run_tests(limit: float, *arguments: str) -> Result:
    """pytest -m gpu; a row for every test that failed and one with the counts."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "junit.xml")
        command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", f"--junitxml={file}"]
        why = finish([*command, *(arguments or ("tests",))], limit)
        if not file.is_file():
            return Result("tests", "failed", why or "pytest wrote no result")
        cases = list(ElementTree.parse(file).iter("testcase"))
    outcome = {
        kind: [c for c in cases if c.find(kind) is not None]
        for kind in ("failure", "error", "skipped")
    }
    counts = {"tests": len(cases), **{kind: len(found) for kind, found in outcome.items()}}
    rows: list[dict[str, Any]] = [{"case": "pytest -m gpu", "values": counts}]
    for kind in ("failure", "error"):
        for case in outcome[kind]:
            message = case.find(kind).get("message", "").splitlines() or [kind]  # type: ignore[union-attr]
            name = f"{case.get('classname')}::{case.get('name')}"
            rows.append({"case": name, "values": {}, "error": message[0][:200]})
    if not cases:
        why = "no test is marked gpu"
    return Result("tests", "failed" if why else "ok", why, rows=rows)


def finish(command: Sequence[str], seconds: float) -> str:
    """Run a command; empty if it ended well, else what happened, with the last line that it said."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=said, stderr=said, start_new_session=True
        )
        try:
            code = process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            return f"killed after {seconds:.0f} s"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # its compile workers too
            process.wait()
        said.seek(0)
        last = ([line for line in said.read().splitlines() if line.strip()] or ["-"])[-1]
    return "" if code == 0 else f"exit code {code}: {last.strip()[:300]}"


def document(results: Sequence[Result], args: argparse.Namespace) -> dict[str, Any]:
    return {
        "machine": machine(),
        "date": datetime.date.today().isoformat(),
        "command": shlex.join(["python", *sys.argv]),
        "quick": args.quick,
        "parts": [{k: v for k, v in asdict(r).items() if k != "rows"} for r in results],
        "cases": [_case(r.part, row) for r in results for row in r.rows if "case" in row],
        "notes": [f"{r.part}: {row['note']}" for r in results for row in r.rows if "note" in row],
    }


def _case(part: str, row: dict[str, Any]) -> dict[str, Any]:
    """A row in the form that all benchmarks share.

    `values` has every figure, ours is the one called so, if any.
    """
    values = row["values"]
    ours = values.get("ours")
    rest = {"peers": {}, "unit": "", "ratio_best_peer": None, "error": None}
    return {**rest, "part": part, "name": row["case"], "ours": ours, **row}


def as_markdown(results: Sequence[Result], facts: dict[str, Any]) -> str:
    where = facts["machine"]
    gpus = ", ".join(where["gpus"]) or "no CUDA device, so no figure was measured"
    lines = [
        "# GPU suite",
        "",
        f"{gpus}; torch {where['torch']}; {facts['date']}; `{facts['command']}`",
        "",
    ]
    for result in results:
        why = f": {result.why}" if result.why else ""
        lines += [f"## {result.part}: {result.status}{why}", ""]
        if result.rows:
            lines += [*table([row for row in result.rows if "case" in row]), ""]
            lines += [f"- {row['note']}" for row in result.rows if "note" in row] + [""]
    return "\n".join(lines).rstrip() + "\n"


def table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """A Markdown table with a column for every key of the rows' values.

    Remarks have a column if there are any.
    """
    columns = list(dict.fromkeys(key for row in rows for key in row["values"]))
    remarks = [row.get("error") or row.get("unavailable", "") for row in rows]
    told = any(remarks)
    lines = ["| " + " | ".join(["case", *columns, *["remark"] * told]) + " |"]
    lines.append("|---|" + "---:|" * len(columns) + "---|" * told)
    for row, remark in zip(rows, remarks):
        values = [cell(row["values"].get(column)) for column in columns]
        cells = [row["case"], *values, *[remark] * told]
        lines.append("| " + " | ".join(x.replace("|", "\\|") for x in cells) + " |")
    return lines


def cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    sys.exit(main())
