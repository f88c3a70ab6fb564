"""Who may import whom, and that importing the package stays cheap."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import appo

ROOT = Path(__file__).resolve().parents[2]
# A room imports rooms of lower levels only, and none of its own level: those do not know one another.
LEVELS = [
    {"errors", "types"},
    {"imports"},
    {"kernels"},
    {"observability"},  # writes and shows; knows nothing of what it is told about
    {"config"},
    {"algo", "packing", "tools"},
    {"reward", "dist"},
    {"data"},
    {"models"},
    {"trainer", "rollout", "learner"},  # they meet in `run`, through protocols
    {"run"},
    {"doctor"},
    {"cli"},
    {"__main__"},
]
LEVEL = {room: level for level, rooms in enumerate(LEVELS) for room in rooms}
# The same inside the one room that has rooms of its own; files beside the folders stand above them.
NATIVE_LEVELS = [{"tree"}, {"attention"}, {"sampling"}, {"model"}, {"device"}]
# Who looks behind the facade `appo.kernels`, and why: code that calls single kernels, not operations.
BEHIND_THE_FACADE = {
    "doctor.py",  # reports backends one by one
    "learner/fused_layers.py",  # exchanges layers of a model for fused ones
    "rollout/native",  # composes a forward of kernels
}
HEAVY = {"torch", "transformers", "deepspeed", "peft", "numpy", "tvm_ffi", "triton", "vllm"}


def source_files():
    """(module path under appo, file): kernels/ counts as appo/kernels."""
    for file in sorted((ROOT / "appo").rglob("*.py")):
        if "_kernels" not in file.parts:
            yield file.relative_to(ROOT / "appo"), file
    for file in sorted((ROOT / "kernels").rglob("*.py")):
        yield Path("kernels") / file.relative_to(ROOT / "kernels"), file


def room_of(path):
    return path.parts[0].removesuffix(".py").replace("_kernels", "kernels")


def imported_modules(file):
    """Absolute names of everything imported, anywhere in the file, except under `if TYPE_CHECKING`."""
    tree = ast.parse(file.read_text())
    typing_only = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if node in typing_only:
            continue
        if isinstance(node, ast.Import):
            yield from (a.name for a in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno}: relative import"
            yield node.module
            yield from (f"{node.module}.{a.name}" for a in node.names)


def rooms_used(file):
    names = {name for name in imported_modules(file) if name.startswith("appo.")}
    return {room_of(Path(name.split(".")[1])) for name in names} & set(LEVEL)


def test_import_direction():
    wrong = []
    for path, file in source_files():
        room = room_of(path)
        if path == Path("__init__.py"):
            continue
        assert room in LEVEL, f"{file}: give the room {room!r} a level in this test"
        wrong += [
            f"{path} ({room}) imports appo.{used}"
            for used in rooms_used(file) - {room}
            if LEVEL[used] >= LEVEL[room]
        ]
    assert not wrong, "\n".join(wrong)


def test_page_and_picture_show_this_order():
    page = (ROOT / "docs" / "architecture.md").read_text()
    block = page.split("## Order of imports")[1].split("```text\n")[1].split("```")[0]
    shown = [room for line in block.split("\n") for room in sorted(line.split(", ")) if room]
    assert shown == [room for rooms in LEVELS for room in sorted(rooms)][: len(shown)]
    assert set(LEVEL) - set(shown) == {"__main__"}
    script = (ROOT / "docs" / "pictures" / "draw_architecture.py").read_text()
    places = [script.index(f'"{rooms}"') for rooms in ("appo.kernels", "observability", "config")]
    assert places == sorted(places)


def test_import_direction_inside_the_native_engine():
    base = "appo.rollout.native."
    level = {room: i for i, rooms in enumerate(NATIVE_LEVELS) for room in rooms}
    wrong = []
    for path, file in source_files():
        if path.parts[:2] != ("rollout", "native") or path.parts[2] not in level:
            continue
        names = {n.removeprefix(base) for n in imported_modules(file) if n.startswith(base)}
        wrong += [
            f"{path} imports {base}{name}"
            for name in names
            if level.get(name.split(".")[0], len(level)) > level[path.parts[2]]
        ]
    assert not wrong, "\n".join(wrong)


def test_only_a_few_look_behind_the_facade_of_kernels():
    found = {
        path.as_posix()
        for path, file in source_files()
        if room_of(path) != "kernels"
        and any(name.startswith("appo._kernels") for name in imported_modules(file))
    }
    assert not {f for f in found if not f.startswith(tuple(BEHIND_THE_FACADE))}
    assert all(any(f.startswith(known) for f in found) for known in BEHIND_THE_FACADE)


def test_no_circles_and_no_crowded_folder():
    """Counted at the level of modules, imports under TYPE_CHECKING and inside functions included."""
    from bench.evidence import import_graph

    found = import_graph.measure(ROOT)
    circles = {house: found[house]["circles"] for house in import_graph.HOUSES}
    assert not any(circles.values()), circles
    assert all(found[house]["upward"] == 0 for house in import_graph.HOUSES)
    assert found["crowded"] == {}


def test_kernels_need_torch_only():
    allowed = {"torch", "tvm_ffi", "triton", "appo"} | sys.stdlib_module_names
    used = {
        (file.name, name.split(".")[0])
        for path, file in source_files()
        if room_of(path) == "kernels"
        for name in imported_modules(file)
    }
    assert {pair for pair in used if pair[1] not in allowed} == set()
    assert any(name == "torch" for _, name in used)  # the walk sees imports at all


def test_nothing_imports_bench_or_tests():
    for path, file in source_files():
        tops = {name.split(".")[0] for name in imported_modules(file)}
        assert not tops & {"bench", "tests", "kernels"}, path


def test_the_parser_sees_imports_inside_functions(tmp_path):
    file = tmp_path / "x.py"
    file.write_text("def f():\n    from appo.learner import zero\n    import appo.cli\n")
    assert rooms_used(file) == {"learner", "cli"}


def test_import_is_cheap():
    """`import appo` loads nothing heavy and takes less than 150 ms (best of three, interpreter start not counted)."""
    code = (
        "import sys, time; t = time.perf_counter(); import appo; dt = time.perf_counter() - t; "
        f"print(dt, *(set(sys.modules) & {HEAVY!r}))"
    )
    out = [
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
        ).stdout.split()
        for _ in range(3)
    ]
    assert all(len(words) == 1 for words in out), f"heavy modules were imported: {out[0][1:]}"
    assert min(float(words[0]) for words in out) < 0.150


@pytest.mark.parametrize("name", sorted(appo._PUBLIC))
def test_public_names_exist(name):
    """Every lazy name is defined in the module it is promised to be in (read, not imported)."""
    module = ROOT.joinpath(*appo._PUBLIC[name].split("."))
    file = module / "__init__.py" if module.is_dir() else module.with_suffix(".py")
    defined = {
        getattr(node, "name", None) or ast.unparse(node.targets[0])
        for node in ast.parse(file.read_text()).body
        if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Assign)
    }
    assert name in defined, f"{file} does not define {name}"


def test_unknown_name():
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        _ = appo.trian
