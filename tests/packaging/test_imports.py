"""Who may import whom, and that importing the package stays cheap."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import appo

ROOT = Path(__file__).resolve().parents[2]
# Low imports nothing above it. `obs` may be used by everything above `types` and itself uses only errors and types.
LEVELS = [
    {"errors", "types"},
    {"obs"},
    {"config"},
    {"kernels"},
    {"algo"},
    {"data", "reward", "tools"},
    {"rollout"},
    {"learner"},
    {"evals"},
    # Commands put the rooms together: every single file beside the rooms (cli, run, training, …) is one.
    {p.stem for p in (ROOT / "appo").glob("*.py")} - {"__init__", "errors", "types", "config"},
]
LEVEL = {room: level for level, rooms in enumerate(LEVELS) for room in rooms}
OBS_USES = {"errors", "types"}
HEAVY = {"torch", "transformers", "deepspeed", "peft", "numpy", "tvm_ffi", "triton", "vllm"}


def source_files():
    """(module path under appo, file): kernels/ counts as appo/kernels."""
    for file in sorted((ROOT / "appo").rglob("*.py")):
        yield file.relative_to(ROOT / "appo"), file
    for file in sorted((ROOT / "kernels").rglob("*.py")):
        yield Path("kernels") / file.relative_to(ROOT / "kernels"), file


def room_of(path):
    return path.parts[0].removesuffix(".py")


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
    return {name.split(".")[1] for name in names} & set(LEVEL)


def test_import_direction():
    wrong = []
    for path, file in source_files():
        room = room_of(path)
        if room == "__init__":
            continue
        assert room in LEVEL, f"{file}: give the room {room!r} a level in this test"
        for used in rooms_used(file) - {room}:
            if LEVEL[used] > LEVEL[room] or {used, room} == {"rollout", "learner"}:
                wrong.append(f"{path} ({room}) imports appo.{used}")
            if room == "obs" and used not in OBS_USES:
                wrong.append(f"{path} (obs) imports appo.{used}")
    assert not wrong, "\n".join(wrong)


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
    file.write_text("def f():\n    from appo.learner import trainer\n    import appo.cli\n")
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
