"""Who imports whom, as numbers: rooms, floors, arrows and circles of Python packages and csrc.

    python bench/evidence/import_graph.py [--root DIR] [--json FILE]

Four houses are drawn: `appo` with the kernels as one room, `rollout/native`, `kernels` and `csrc`.

    room      first-level file or folder of a house, with everything below it; `__init__` is one.
              csrc: a folder, or the .h and .cpp files of one stem
    arrow     pair of rooms, one of which imports (includes) the other, however often
    floors    rooms of the longest chain of imports; rooms that form a circle share a floor
    upward    fewest arrows without which no circle of rooms is left
    circle    strongly connected group of two or more modules (files of csrc) within the house
    crowded   folder with more than 25 files directly in it, anywhere below the root

An import counts wherever it stands: at the top, inside a function, under `if TYPE_CHECKING`.
`from package import name` is an arrow to the module `package.name` if there is one, else to the
package. `import_module` counts with a literal name. Names made at run time cannot be followed and
are listed.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

Graph = dict[str, set[str]]  # node → nodes it imports; every node is a key

# house → package whose first level are its rooms
PACKAGES = {
    "appo": "appo",
    "rollout/native": "appo.rollout.native",
    "kernels": "appo._kernels",
}
_ROOMS = {"_kernels": "kernels"}  # the source and its facade `appo.kernels` are one room of appo
HOUSES = (*PACKAGES, "csrc")
CROWD = 25
_INCLUDE = re.compile(r'^\s*#\s*include\s*"([^"]+)"', re.MULTILINE)
_SKIPPED = re.compile(r"\..*|__pycache__|_native|build|dist|runs|.*\.egg-info|venv")
_EXACT = 16  # rooms of one circle up to which `upward` tries every order


@dataclass
class House:
    """What is counted of one house; the module describes each."""

    rooms: int
    floors: int
    arrows: int
    upward: int
    circles: list[list[str]]
    room_names: list[str]


# -- graphs --------------------------------------------------------------------------------------


def groups(graph: Graph) -> list[list[str]]:
    """Strongly connected groups, each after all groups that it imports (Tarjan)."""
    number: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    waiting: set[str] = set()
    out: list[list[str]] = []
    for start in sorted(graph):
        work = [] if start in number else [(start, iter(sorted(graph[start])))]
        while work:
            node, targets = work[-1]
            if node not in number:
                number[node] = low[node] = len(number)
                stack.append(node)
                waiting.add(node)
            for target in targets:
                if target not in number:
                    work.append((target, iter(sorted(graph[target]))))
                    break
                if target in waiting:
                    low[node] = min(low[node], number[target])
            else:
                work.pop()
                if work:
                    above = work[-1][0]
                    low[above] = min(low[above], low[node])
                if low[node] == number[node]:
                    at = stack.index(node)
                    out.append(sorted(stack[at:]))
                    waiting.difference_update(stack[at:])
                    del stack[at:]
    return out


def floors(graph: Graph) -> int:
    """Groups on the longest chain of imports."""
    height: dict[str, int] = {}
    for group in groups(graph):
        below = [height[t] for node in group for t in graph[node] if t not in group]
        height |= dict.fromkeys(group, 1 + max(below, default=0))
    return max(height.values(), default=0)


def upward(graph: Graph) -> int:
    """Fewest arrows that point up, over all orders of the rooms.

    In a circle of more than _EXACT rooms: an upper bound, by arrows out minus arrows in.
    """
    return sum(_upward_in(group, graph) for group in groups(graph) if len(group) > 1)


def _upward_in(group: list[str], graph: Graph) -> int:
    place = {node: i for i, node in enumerate(group)}
    out = [sum(1 << place[t] for t in graph[node] if t in place) for node in group]
    if len(group) > _EXACT:
        inward = [sum(row >> i & 1 for row in out) for i in range(len(group))]
        order = sorted(range(len(group)), key=lambda i: out[i].bit_count() - inward[i])
        return sum(sum(out[i] >> j & 1 for j in order[k:]) for k, i in enumerate(order))
    # best[s]: fewest arrows from a room of the set s to a later one, s being the lowest rooms
    best = [0] + [len(group) ** 2] * ((1 << len(group)) - 1)
    for lower in range(1 << len(group)):
        for i, row in enumerate(out):
            if not lower >> i & 1:
                after = best[lower] + (row & ~lower).bit_count()
                best[lower | 1 << i] = min(best[lower | 1 << i], after)
    return best[-1]


def house(modules: Graph, room_of: Callable[[str], str]) -> House:
    """Count one house. modules: its own modules; arrows to others are left out."""
    inner = {m: {t for t in targets if t in modules} - {m} for m, targets in modules.items()}
    rooms: Graph = {room_of(m): set() for m in inner}
    for module, targets in inner.items():
        rooms[room_of(module)] |= {room_of(t) for t in targets} - {room_of(module)}
    return House(
        rooms=len(rooms),
        floors=floors(rooms),
        arrows=sum(map(len, rooms.values())),
        upward=upward(rooms),
        circles=sorted(group for group in groups(inner) if len(group) > 1),
        room_names=sorted(rooms),
    )


# -- Python --------------------------------------------------------------------------------------


def python_files(root: Path) -> dict[str, Path]:
    """Module name → file of `appo` and `kernels`, each once; kernels/a.py is appo._kernels.a.

    Links inside `appo` lead to files that are found in kernels/ itself: they are not followed.
    """
    found: dict[str, Path] = {}
    for top, prefix in (("kernels", kernels_package(root)), ("appo", "appo")):
        for file in _files(root / top):
            if file.suffix == ".py":
                inner = file.relative_to(root / top).with_suffix("").parts
                inner = inner[:-1] if inner[-1] == "__init__" else inner
                found[".".join([prefix, *inner])] = file
    return found


def kernels_package(root: Path) -> str:
    """What kernels/ is imported as: appo._kernels where that link is, else (older) appo.kernels."""
    linked = os.path.lexists(root / "appo" / "_kernels")
    return PACKAGES["kernels"] if linked else "appo.kernels"


def python_graph(files: dict[str, Path]) -> tuple[Graph, list[str]]:
    """(module → modules that it imports, "module:line" of imports that cannot be read)."""
    graph: Graph = {}
    unread: list[str] = []
    for module, file in files.items():
        tree = ast.parse(file.read_text(), str(file))
        package = module if file.name == "__init__.py" else module.rpartition(".")[0]
        graph[module] = set()
        for name, line in _imported(tree, package):
            if name is None:
                unread.append(f"{module}:{line}")
            elif (target := _module_of(name, files)) is not None and target != module:
                graph[module].add(target)
    return graph, unread


def _imported(tree: ast.AST, package: str) -> Iterator[tuple[str | None, int]]:
    """(dotted name, line) of all imports anywhere in a file; None for a name made at run time."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1]
            parts = [*(above if node.level else []), *([node.module] if node.module else [])]
            yield from ((".".join([*parts, alias.name]), node.lineno) for alias in node.names)
        elif isinstance(node, ast.Call) and _called(node.func) in ("import_module", "__import__"):
            name = node.args[0] if node.args else None
            literal = name.value if isinstance(name, ast.Constant) else None
            yield (literal if isinstance(literal, str) else None), node.lineno


def _called(function: ast.expr) -> str:
    return getattr(function, "id", getattr(function, "attr", ""))


def _module_of(name: str, files: dict[str, Path]) -> str | None:
    """The longest beginning of a dotted name that is a module: of a.b.f the module a.b."""
    parts = name.split(".")
    beginnings = (".".join(parts[:n]) for n in range(len(parts), 0, -1))
    return next((b for b in beginnings if b in files), None)


# -- C++ -----------------------------------------------------------------------------------------


def include_graph(folder: Path) -> Graph:
    """File → files that it includes, both by path below `folder`, an absolute path.

    A name is looked up beside the file that includes it, then below `folder`.
    """
    files = {f for f in _files(folder) if f.suffix in (".h", ".hpp", ".cpp", ".cu", ".cuh")}
    graph: Graph = {}
    for file in sorted(files):
        found = graph.setdefault(file.relative_to(folder).as_posix(), set())
        for name in _INCLUDE.findall(file.read_text()):
            places = [Path(os.path.normpath(base / name)) for base in (file.parent, folder)]
            target = next((p for p in places if p in files), None)
            if target is not None:
                found.add(target.relative_to(folder).as_posix())
    return graph


# -- the whole -----------------------------------------------------------------------------------


def measure(root: Path) -> dict[str, Any]:
    """All figures of a checkout as JSON types.

    {name of HOUSES: fields of House, "crowded": {folder: files}, "unread": ["module:line"]}.
    A house that does not exist under `root` is left out.
    """
    root = root.resolve()
    files = python_files(root)
    graph, unread = python_graph(files)
    out: dict[str, Any] = {}
    for name, prefix in (PACKAGES | {"kernels": kernels_package(root)}).items():
        modules = {m: t for m, t in graph.items() if m == prefix or m.startswith(prefix + ".")}
        if modules:
            out[name] = asdict(house(modules, partial(_room, depth=prefix.count(".") + 1)))
    if includes := include_graph(root / "csrc"):
        out["csrc"] = asdict(house(includes, lambda file: re.split("[/.]", file)[0]))
    return out | {"crowded": crowded(root), "unread": sorted(unread)}


def _room(module: str, depth: int) -> str:
    room = [*module.split("."), "__init__"][depth]
    return _ROOMS.get(room, room)


def crowded(root: Path) -> dict[str, int]:
    """Folder → number of files directly in it, where they are more than CROWD."""
    count: dict[str, int] = defaultdict(int)
    for file in _files(root):
        count[file.parent.relative_to(root).as_posix()] += 1
    return {folder: n for folder, n in sorted(count.items()) if n > CROWD}


def _files(folder: Path) -> Iterator[Path]:
    """Files below a folder, sorted. Links, hidden folders and build outputs are left out."""
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if path.is_symlink() or _SKIPPED.fullmatch(path.name):
            continue
        if path.is_dir():
            yield from _files(path)
        else:
            yield path


def lines(found: dict[str, Any]) -> Iterable[str]:
    """The figures for a person."""
    yield f"{'house':16}{'rooms':>6}{'floors':>8}{'arrows':>8}{'upward':>8}{'circles':>9}"
    houses = {name: found[name] for name in HOUSES if name in found}
    for name, h in houses.items():
        yield (
            f"{name:16}{h['rooms']:>6}{h['floors']:>8}{h['arrows']:>8}{h['upward']:>8}"
            f"{len(h['circles']):>9}"
        )
    for name, h in houses.items():
        for circle in h["circles"]:
            yield f"circle in {name}: {' '.join(circle)}"
    for folder, n in found["crowded"].items():
        yield f"crowded: {folder} ({n} files)"
    yield f"names made at run time, not followed: {' '.join(found['unread']) or 'none'}"


def main(argv: list[str] | None = None) -> int:
    """Print the figures of a checkout."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    here = Path(__file__).resolve().parents[2]
    parser.add_argument("--root", type=Path, default=here, help="checkout; default: this one")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there, too")
    args = parser.parse_args(argv)
    if not (args.root / "appo").is_dir():
        parser.error(f"--root is {args.root}, which holds no folder appo; name a checkout")
    found = measure(args.root)
    print("\n".join(lines(found)))
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
