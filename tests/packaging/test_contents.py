"""Wheel, sdist and editable install hold every file once and import the kernels by the same names."""

import shutil
from collections import Counter
from pathlib import Path

import pytest
from support import builds

FACADE = "appo/kernels/__init__.py"
# (code, what it prints): the facade, the deep import, and where the source lies
USE = (
    "import pathlib, torch, appo.kernels as k; from appo._kernels.branching import future_value as deep; "
    "assert k.future_value is deep.future_value; "
    "x = torch.ones(2); assert k.future_value(x, x, torch.tensor([0, 2]), 0.5).tolist() == [1.5, 1.0]; "
    "print(pathlib.Path(deep.__file__).parent)"
)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return builds.copy_tree(tmp_path_factory.mktemp("source") / "appo")


@pytest.fixture(scope="module")
def sdist(source, tmp_path_factory):
    return builds.build(source, tmp_path_factory.mktemp("sdist"), "sdist")[0]


@pytest.fixture(scope="module")
def wheel(source, tmp_path_factory):
    """Pure, from the checkout, in which an older build has left files behind."""
    for name in ("appo/kernels/scan.py", "appo/_kernels/scan.py", "appo/obs/report.py"):
        old = source / "build" / "lib" / name
        old.parent.mkdir(parents=True, exist_ok=True)
        old.write_text("")
    out = tmp_path_factory.mktemp("wheel")
    return builds.build(source, out, "wheel", APPO_NO_NATIVE="1")[0]


def python_files(source):
    return {f for f in builds.below(source, "appo") if f.endswith(".py")}


@pytest.mark.slow
def test_wheel_holds_every_file_once(source, wheel):
    found = builds.names(wheel)
    assert [name for name, n in Counter(found).items() if n > 1] == []
    kernels = {f"appo/_{f}" for f in builds.below(source, "kernels")}
    expected = python_files(source) | kernels
    assert {f for f in found if f.endswith(".py")} == expected
    assert [f for f in found if f.startswith("appo/kernels/")] == [FACADE]
    data = {f for f in builds.below(source, "appo") if not f.endswith(".py")}
    assert "appo/py.typed" in data
    built = {f for f in found if not f.endswith(".py") and ".dist-info/" not in f}
    assert built == data | {"appo/_native/build_info.json"}


@pytest.mark.slow
def test_sdist_holds_the_checkout_once(source, sdist):
    found = builds.names(sdist)
    assert [name for name, n in Counter(found).items() if n > 1] == []
    folders = ("appo", "kernels", "csrc", "tests", "bench", "docs", "examples", "requirements")
    expected = set().union(*(builds.below(source, folder) for folder in folders))
    expected |= {p.name for p in source.iterdir() if p.is_file() and p.name[0] != "."}
    written = {f for f in found if f.startswith("appo.egg-info/")} | {"PKG-INFO", "setup.cfg"}
    assert set(found) - written == expected
    assert not any(f.startswith(("appo/_kernels", "appo/_native")) for f in found)


@pytest.mark.slow
def test_wheel_of_the_sdist_is_that_of_the_checkout(sdist, wheel, tmp_path):
    unpacked = builds.unpack(sdist, tmp_path / "unpacked")
    second, _ = builds.build(unpacked, tmp_path / "dist", "wheel", APPO_NO_NATIVE="1")
    assert builds.names(second) == builds.names(wheel)


@pytest.mark.slow
def test_wheel_imports(wheel, tmp_path):
    shutil.unpack_archive(wheel, tmp_path / "site", "zip")
    python = builds.environment(tmp_path / "venv")
    env = builds.clean(PYTHONPATH=str(tmp_path / "site"))
    said = builds.run([str(python), "-c", USE], cwd=tmp_path, env=env)
    assert Path(said.split()[-1]) == tmp_path / "site" / "appo" / "_kernels" / "branching"


@pytest.mark.slow
def test_editable_install_of_an_sdist_makes_the_link(sdist, tmp_path):
    unpacked = builds.unpack(sdist, tmp_path / "unpacked")
    assert not (unpacked / "appo" / "_kernels").exists()
    python = builds.environment(tmp_path / "venv")
    install = [str(python), "-m", "pip", "install", "--no-deps", "--no-build-isolation", "-e"]
    builds.run([*install, str(unpacked)], cwd=tmp_path, env=builds.clean(APPO_NO_NATIVE="1"))
    assert (unpacked / "appo" / "_kernels").readlink() == Path("..", "kernels")
    said = builds.run([str(python), "-c", USE], cwd=tmp_path, env=builds.clean())
    assert Path(said.split()[-1]).resolve() == unpacked / "kernels" / "branching"


def test_checkout_imports(tmp_path):
    """A copy that was never built or installed, run from its own folder."""
    source = builds.copy_tree(tmp_path / "clone")
    python = builds.environment(tmp_path / "venv")
    said = builds.run([str(python), "-c", USE], cwd=source, env=builds.clean(APPO_NO_NATIVE="1"))
    assert Path(said.split()[-1]).resolve() == source / "kernels" / "branching"
