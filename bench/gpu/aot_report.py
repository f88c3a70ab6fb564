"""Every shipped GPU kernel compiled for GPUs that are not here.

Registers, spills, shared memory, tensor-core use.

    python bench/gpu/aot_report.py [--quick] [--arch sm_90] [--only NAME] [--json FILE]
                                   [--markdown docs/kernels/index.md]

Collects `aot_cases(arch)` of the modules of kernels/*/gpu; --quick takes the first case of each
kernel, which is its default configuration. TRITON_CACHE_DIR keeps what was compiled. Exit code 0:
every budget holds. 1: a kernel spills, wants more than the device has, multiplies without tensor
cores, or does not compile. 2: the report could not be made at all.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import json
import pkgutil
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from appo._kernels.common.gpu.aot import ARCHS

sys.path.append(str(Path(__file__).resolve().parents[2]))  # the checkout, for `bench`

from bench.common import machine, parser

MARKERS = ("<!-- aot-table -->", "<!-- /aot-table -->")
COLUMNS = {
    "kernel": "name",
    "target": "arch",
    "warps": "warps",
    "stages": "stages",
    "registers": "registers",
    "stack": "stack",
    "spills": "spills",
    "shared memory": "shared",
    "of the limit": None,
    "tensor-core": "tensor_core",
    "cp.async": "async_copies",
    "bulk": "bulk_copies",
}


def main() -> int:
    args = arguments()
    try:
        import triton
    except ImportError:
        return refuse("triton is not installed: pip install 'triton>=3.7'")
    if triton.knobs.runtime.interpret:
        return refuse(
            "TRITON_INTERPRET is set, and interpreted kernels cannot be compiled in the same process. "
            "Run: env -u TRITON_INTERPRET python bench/gpu/aot_report.py"
        )
    if args.markdown and not has_marks(args.markdown):
        return refuse(f"{args.markdown} has no {MARKERS[0]} … {MARKERS[1]} block to write into")

    from bench.gpu.aot_compile import compile_case  # needs triton, and the answer above

    chosen = [(arch, case) for arch in args.arch for case in cases(arch, args)]
    if not chosen:
        return refuse(f"no case on {', '.join(args.arch)} has {args.only!r} in its name")
    rows = []
    for i, (arch, case) in enumerate(chosen, 1):
        print(f"[{i}/{len(chosen)}] {arch} {case.name}", file=sys.stderr, flush=True)
        rows.append(compile_case(case, arch))

    show(rows, triton.__version__)
    if args.json:
        args.json.write_text(json.dumps(document(rows, triton.__version__, args), indent=2) + "\n")
    if args.markdown:
        rewrite(args.markdown, markdown(rows, triton.__version__))
    return 1 if any(row.problems for row in rows) else 0


def arguments() -> argparse.Namespace:
    options = parser(__doc__ or "")
    options.add_argument(
        "--markdown", metavar="FILE", type=Path, help=f"rewrite the {MARKERS[0]} block of this page"
    )
    options.add_argument("--arch", choices=ARCHS, action="append", help="repeatable; default: all")
    options.add_argument("--only", metavar="NAME", default="", help="cases with NAME in their name")
    options.add_argument(
        "--module",
        action="append",
        help="module with aot_cases(); repeatable; default: every gpu folder of kernels/",
    )
    args = options.parse_args()
    args.arch = args.arch or list(ARCHS)
    return args


def refuse(why: str) -> int:
    print(f"aot_report: {why}", file=sys.stderr)
    return 2


def cases(arch: str, args: argparse.Namespace) -> list[Any]:
    """The cases of the chosen modules on `arch`; with --quick the first of every kernel."""
    found = [case for module in modules(args.module) for case in module.aot_cases(arch)]
    if args.quick:
        first = {id(case.kernel): case for case in reversed(found)}
        found = [case for case in found if first[id(case.kernel)] is case]
    return [case for case in found if args.only in case.name]


def modules(names: Sequence[str] | None) -> list[Any]:
    if names:
        return [importlib.import_module(name) for name in names]
    import appo._kernels as package

    found = [
        importlib.import_module(info.name)
        for info in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
        if ".gpu." in info.name
    ]
    return [module for module in found if hasattr(module, "aot_cases")]


def cells(row: Any) -> list[str]:
    values = [
        getattr(row, key) if key else row.shared / row.shared_limit for key in COLUMNS.values()
    ]
    return [
        f"{v:.0%}" if isinstance(v, float) else f"{v:,}" if isinstance(v, int) else v
        for v in values
    ]


def show(rows: Sequence[Any], version: str) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"Compiled ahead of time, Triton {version}")
    for i, column in enumerate(COLUMNS):
        table.add_column(column, justify="left" if i < 2 else "right", no_wrap=i == 0)
    table.add_column("s", justify="right")
    for row in rows:
        style = "red" if row.problems else None
        table.add_row(*cells(row), f"{row.seconds:.1f}", style=style)
    console = Console(width=max(170, Console().width))
    console.print(table)
    for row in rows:
        for problem in row.problems:
            console.print(f"{row.arch} {row.name}: {problem}", style="red", markup=False)
    broken = sum(bool(row.problems) for row in rows)
    console.print(f"{len(rows)} kernels compiled, {broken} over budget")


def document(rows: Sequence[Any], version: str, args: argparse.Namespace) -> dict[str, Any]:
    return {
        "machine": {**machine(), "triton": version},
        "date": datetime.date.today().isoformat(),
        "command": shlex.join(["python", *sys.argv]),
        "quick": args.quick,
        "cases": [
            {"unit": "bytes of stack", "ours": row.stack, "peers": {}, "ratio_best_peer": None, "error": None}
            | asdict(row) | {"shared_limit": row.shared_limit} for row in rows
        ],
    }  # fmt: skip


def has_marks(page: Path) -> bool:
    return page.is_file() and all(mark in page.read_text() for mark in MARKERS)


def markdown(rows: Sequence[Any], version: str) -> str:
    lines = [
        f"`python bench/gpu/aot_report.py --markdown docs/kernels/index.md`, Triton {version}.",
        "Compiled, not run; registers per thread, sizes in bytes, instruction counts static.",
        "",
        "| " + " | ".join(COLUMNS) + " |",
        "|---|---|" + "---:|" * (len(COLUMNS) - 2),
        *("| " + " | ".join(cells(row)) + " |" for row in rows),
    ]
    return "\n".join(lines)


def rewrite(page: Path, table: str) -> None:
    before, rest = page.read_text().split(MARKERS[0], 1)
    after = rest.split(MARKERS[1], 1)[1]
    page.write_text(f"{before}{MARKERS[0]}\n{table}\n{MARKERS[1]}{after}")


if __name__ == "__main__":
    sys.exit(main())
