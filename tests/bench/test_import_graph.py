"""Figures of made-up checkouts, whose rooms, arrows and circles are known."""

import importlib.util
import itertools
import json
import os
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

ROOT = Path(__file__).resolve().parents[2]
spec = importlib.util.spec_from_file_location(
    "import_graph", ROOT / "bench" / "evidence" / "import_graph.py"
)
import_graph = importlib.util.module_from_spec(spec)
sys.modules["import_graph"] = import_graph
spec.loader.exec_module(import_graph)

TYPES_ONLY = """\
from typing import TYPE_CHECKING
if TYPE_CHECKING:
    from appo.rollout.native.b import B
"""

PLAIN = {
    "appo/__init__.py": "",
    "appo/errors.py": "import os\n",
    "appo/algo/__init__.py": "",
    "appo/algo/credit.py": "from appo import errors\nfrom appo.kernels import scan\n",
    "appo/kernels/__init__.py": "",
    "appo/rollout/__init__.py": "",
    "appo/rollout/native/__init__.py": "",
    "appo/rollout/native/a.py": "from appo.errors import X\n",
    "appo/rollout/native/b.py": "from appo.rollout.native.a import f\nfrom . import a\n",
    "appo/cli.py": "import appo.algo.credit, appo.rollout.native.b\n",
    "kernels/scan.py": "import torch\nimport appo.errors as e\n",
    "kernels/gpu/tile.py": "from appo.kernels.scan import f\nfrom appo.kernels import scan\n",
    "csrc/tree.h": "#pragma once\n",
    "csrc/tree.cpp": '#include <vector>\n#include "tree.h"\n#include "checks.h"\n',
    "csrc/checks.h": "",
}


def checkout(folder, files):
    for name, text in files.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return folder


def test_rooms_floors_and_arrows_of_a_flat_checkout(tmp_path):
    found = import_graph.measure(checkout(tmp_path, PLAIN))
    house = found["appo"]
    names = ["__init__", "algo", "cli", "errors", "kernels", "rollout"]
    assert house["room_names"] == names and house["rooms"] == 6
    # algo → errors, kernels · rollout → errors · kernels → errors · cli → algo, rollout
    assert house["arrows"] == 6
    assert house["floors"] == 4  # cli → algo → kernels → errors
    assert (house["upward"], house["circles"]) == (0, [])
    assert found["rollout/native"]["room_names"] == ["__init__", "a", "b"]
    assert found["rollout/native"]["arrows"] == 1  # twice from b to a; the one to errors leads out
    assert found["kernels"]["room_names"] == ["__init__", "gpu", "scan"]
    assert found["kernels"]["arrows"] == 1
    csrc = found["csrc"]
    assert (csrc["room_names"], csrc["arrows"], csrc["floors"]) == (["checks", "tree"], 1, 2)
    assert found["crowded"] == {} and found["unread"] == []


@pytest.mark.parametrize(
    "back",
    [
        "from appo.rollout.native.b import B\n",
        "import appo.rollout.native.b\n",
        "from . import b\n",
        "from .b import B\n",
        "from ..native import b\n",
        TYPES_ONLY,
        "def f():\n    from appo.rollout.native import b\n    return b\n",
        "from importlib import import_module\nb = import_module('appo.rollout.native.b')\n",
    ],
)
def test_a_planted_circle_is_found(tmp_path, back):
    files = PLAIN | {"appo/rollout/native/a.py": back}
    found = import_graph.measure(checkout(tmp_path, files))
    circle = ["appo.rollout.native.a", "appo.rollout.native.b"]
    assert found["appo"]["circles"] == found["rollout/native"]["circles"] == [circle]
    assert found["appo"]["upward"] == 0  # within one room
    assert found["rollout/native"]["upward"] == 1
    assert found["rollout/native"]["arrows"] == 2
    assert found["rollout/native"]["floors"] == 1  # the two share a floor


def test_a_circle_of_rooms(tmp_path):
    files = PLAIN | {"appo/errors.py": "def f():\n    import appo.cli\n"}
    house = import_graph.measure(checkout(tmp_path, files))["appo"]
    assert house["upward"] == 1
    (circle,) = house["circles"]
    assert {"appo.errors", "appo.cli", "appo.algo.credit", "appo.kernels.scan"} < set(circle)


def test_names_made_at_run_time_are_listed(tmp_path):
    text = (
        "from importlib import import_module\n\ndef f(x):\n    return import_module(f'appo.{x}')\n"
    )
    found = import_graph.measure(checkout(tmp_path, PLAIN | {"appo/cli.py": text}))
    assert found["unread"] == ["appo.cli:4"]


def test_links_are_not_walked_a_second_time(tmp_path):
    """Kernels by operation, linked into the package: the figures are those without the links."""
    files = {name: text for name, text in PLAIN.items() if not name.startswith("kernels/")} | {
        "kernels/branching/op.py": "from appo.kernels.common import native\n",
        "kernels/branching/gpu/scan.py": "from appo.kernels.branching.op import f\n",
        "kernels/common/native.py": "",
    }
    checkout(tmp_path, files)
    without = import_graph.measure(tmp_path)
    for name in ("branching", "common"):
        os.symlink(f"../../kernels/{name}", tmp_path / "appo" / "kernels" / name)
    linked = import_graph.measure(tmp_path)
    assert linked == without
    assert linked["kernels"]["room_names"] == ["__init__", "branching", "common"]
    assert linked["kernels"]["arrows"] == 1
    modules = import_graph.python_files(tmp_path)
    assert "appo.kernels.branching.gpu.scan" in modules
    assert len(set(modules.values())) == len(modules)


def test_a_linked_package_is_found_in_the_kernels_folder(tmp_path):
    files = {n: t for n, t in PLAIN.items() if n != "appo/kernels/__init__.py"}
    checkout(tmp_path, files)
    os.symlink("../kernels", tmp_path / "appo" / "kernels")
    found = import_graph.measure(tmp_path)
    assert found["appo"]["arrows"] == 6 and found["kernels"]["room_names"] == ["gpu", "scan"]


def test_kernels_beside_a_facade(tmp_path):
    """Source seen as appo._kernels, facade appo.kernels: one room of appo; the facade is no room of kernels."""
    files = {n: t for n, t in PLAIN.items() if not n.startswith("kernels/")} | {
        "appo/kernels/__init__.py": "from appo._kernels.branching.op import f\n",
        "kernels/branching/op.py": "from appo._kernels.common import native\n",
        "kernels/branching/gpu/scan.py": "from appo._kernels.branching.op import f\n",
        "kernels/common/native.py": "import appo.errors\n",
    }
    checkout(tmp_path, files)
    os.symlink("../kernels", tmp_path / "appo" / "_kernels")
    found = import_graph.measure(tmp_path)
    assert found["appo"]["room_names"] == [
        "__init__",
        "algo",
        "cli",
        "errors",
        "kernels",
        "rollout",
    ]
    assert found["appo"]["arrows"] == 6 and found["appo"]["circles"] == []
    assert found["kernels"]["room_names"] == ["branching", "common"]
    assert found["kernels"]["arrows"] == 1  # within branching, and to appo.errors: not counted


def test_folders_of_csrc_are_rooms(tmp_path):
    files = {
        "appo/__init__.py": "",
        "csrc/common/checks.h": "",
        "csrc/common/simd/avx2.h": '#include "../checks.h"\n',
        "csrc/branching/scan.cpp": '#include "common/simd/avx2.h"\n#include "scan.h"\n',
        "csrc/branching/scan.h": '#include "../common/checks.h"\n',
    }
    csrc = import_graph.measure(checkout(tmp_path, files))["csrc"]
    assert csrc["room_names"] == ["branching", "common"]
    assert (csrc["arrows"], csrc["floors"], csrc["upward"], csrc["circles"]) == (1, 2, 0, [])
    files["csrc/common/checks.h"] = '#include "branching/scan.h"\n'
    csrc = import_graph.measure(checkout(tmp_path, files))["csrc"]
    assert (csrc["arrows"], csrc["floors"], csrc["upward"]) == (2, 1, 1)
    assert csrc["circles"] == [["branching/scan.h", "common/checks.h"]]


@pytest.mark.parametrize("number", [25, 26])
def test_crowded_folders(tmp_path, number):
    files = {f"csrc/deep/x{i}.h": "" for i in range(number)} | {"appo/__init__.py": ""}
    files |= {f"build/x{i}.h": "" for i in range(99)} | {f".git/x{i}": "" for i in range(99)}
    found = import_graph.measure(checkout(tmp_path, files))
    assert found["crowded"] == ({"csrc/deep": 26} if number > 25 else {})


GRAPHS = st.sets(st.tuples(st.integers(0, 4), st.integers(0, 4)), max_size=14)


@given(arrows=GRAPHS)
def test_figures_agree_with_their_definitions(arrows):
    """Circles by reachability and upward arrows by all orders, on small graphs."""
    nodes = [str(i) for i in range(5)]
    graph = {n: {str(b) for a, b in arrows if str(a) == n != str(b)} for n in nodes}
    reach = {n: {n} for n in nodes}
    for _ in nodes:
        reach = {n: reach[n] | {t for m in reach[n] for t in graph[m]} for n in nodes}
    together = {frozenset(m for m in nodes if m in reach[n] and n in reach[m]) for n in nodes}
    found = import_graph.groups(graph)
    assert {frozenset(g) for g in found} == together
    place = {n: i for i, group in enumerate(found) for n in group}
    assert all(place[t] <= place[n] for n in nodes for t in graph[n])
    fewest = min(
        sum(order.index(t) > order.index(n) for n in nodes for t in graph[n])
        for order in itertools.permutations(nodes)
    )
    assert import_graph.upward(graph) == fewest


def test_a_large_circle_has_an_upper_bound():
    ring = {f"{i:02}": {f"{(i + 1) % 20:02}"} for i in range(20)}
    assert 1 <= import_graph.upward(ring) <= 20
    assert len(import_graph.groups(ring)) == import_graph.floors(ring) == 1


def test_the_command(tmp_path, capsys):
    root = checkout(tmp_path / "root", PLAIN | {"appo/rollout/native/a.py": TYPES_ONLY})
    assert import_graph.main(["--root", str(root), "--json", str(tmp_path / "figures.json")]) == 0
    said = capsys.readouterr().out
    circle = "circle in rollout/native: appo.rollout.native.a appo.rollout.native.b"
    assert circle in said.splitlines()
    assert json.loads((tmp_path / "figures.json").read_text()) == import_graph.measure(root)
    with pytest.raises(SystemExit):
        import_graph.main(["--root", str(tmp_path)])
    assert "holds no folder appo" in capsys.readouterr().err


def test_this_checkout_can_be_measured():
    found = import_graph.measure(ROOT)
    assert set(import_graph.HOUSES) < set(found)
    assert all(found[h]["rooms"] > 3 and found[h]["arrows"] > 3 for h in import_graph.HOUSES)
