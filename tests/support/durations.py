"""Which tests are slow.

Read off the report of a whole run, kept in tests/slow_tests.txt, marked by tests/conftest.py.

    pytest -q -n 2 --dist loadfile -o junit_family=xunit1 --junitxml=REPORT.xml
    python tests/support/durations.py REPORT.xml [--over 10]

A report may also be the output of `pytest -vv --durations=0`. A test counts with its setup and
teardown.
"""

from __future__ import annotations

import argparse
import ast
import datetime
import platform
import re
import xml.etree.ElementTree as ElementTree
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LIST = ROOT / "tests" / "slow_tests.txt"
OVER = 10.0  # seconds
LINE = re.compile(r"^\s*([\d.]+)s (?:call|setup|teardown)\s+(\S.*?)\s*$", re.M)


def durations(report: Path) -> dict[str, float]:
    """Node id → seconds, from a JUnit file with `file` attributes or from pytest's own lines.

    Raises ValueError for a report without durations.
    """
    text = report.read_text()
    found: defaultdict[str, float] = defaultdict(float)
    if text.lstrip().startswith("<"):
        for case in ElementTree.fromstring(text).iter("testcase"):
            if (node := node_id(case.attrib)) is not None:
                found[node] += float(case.get("time", 0))
    else:
        for seconds, node in LINE.findall(text):
            found[node] += float(seconds)
    if not found:
        raise ValueError(
            f"{report} holds no durations; run pytest with -o junit_family=xunit1 --junitxml=FILE, "
            "or with -vv --durations=0"
        )
    return dict(found)


def node_id(case: dict[str, str]) -> str | None:
    """`tests/a/test_b.py::Class::test[x]` of a JUnit test case.

    None where no file is named (a failed collection).
    """
    path = case.get("file")
    if path is None:
        return None
    module = path.removesuffix(".py").replace("/", ".")
    classes = case["classname"].removeprefix(module).strip(".")
    return "::".join([path, *filter(None, classes.split(".")), case["name"]])


def slow(found: dict[str, float], over: float = OVER) -> dict[str, float]:
    """Those above `over` seconds, by file, the longest of a file first."""
    items = [(node, s) for node, s in found.items() if s > over]
    return dict(sorted(items, key=lambda x: (x[0].partition("::")[0], -x[1], x[0])))


def write(tests: dict[str, float], over: float, path: Path = LIST) -> None:
    """The list, with date and processor: a line is `seconds node-id`."""
    head = [
        f"# Tests that took more than {over:g} s with setup and teardown. They get the mark `slow`.",
        "# Written by tests/support/durations.py, which says how; do not edit.",
        f"# {datetime.date.today()} · {processor()}",
    ]
    path.write_text("\n".join([*head, *(f"{s:.0f} {node}" for node, s in tests.items())]) + "\n")


def read(path: Path = LIST) -> dict[str, float]:
    """Node id → seconds of the list; {} where there is none."""
    if not path.is_file():
        return {}
    lines = [line for line in path.read_text().splitlines() if line and not line.startswith("#")]
    return {node: float(s) for s, _, node in (line.partition(" ") for line in lines)}


def missing(tests: dict[str, float], root: Path = ROOT) -> list[str]:
    """Node ids whose file, class or function is not there (parameters are not looked at)."""
    return [node for node in tests if not _defined(root, node.partition("[")[0].split("::"))]


def _defined(root: Path, parts: list[str]) -> bool:
    if not (root / parts[0]).is_file():
        return False
    body: list[ast.stmt] = ast.parse((root / parts[0]).read_text()).body
    for name in parts[1:]:
        named = [
            n for n in body if isinstance(n, ast.ClassDef | ast.FunctionDef) and n.name == name
        ]
        if not named:
            return False
        body = named[0].body
    return True


def processor() -> str:
    """Model name of the processor and how many there are."""
    info = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*: (.*)$", info.read_text(), re.M) if info.exists() else []
    return f"{len(names)} × {names[0]}" if names else platform.processor() or "unknown processor"


def main() -> None:
    """Write the list and say how many there are."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("report", type=Path)
    parser.add_argument("--over", type=float, default=OVER, metavar="SECONDS")
    parser.add_argument("--list", type=Path, default=LIST, metavar="FILE")
    args = parser.parse_args()
    found = durations(args.report)
    tests = slow(found, args.over)
    write(tests, args.over, args.list)
    share = sum(tests.values()) / max(sum(found.values()), 1e-9)
    print(f"{len(tests)} of {len(found)} tests, {share:.0%} of the time → {args.list}")


if __name__ == "__main__":
    main()
