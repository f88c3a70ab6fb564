"""Where the native library comes from, and that its absence or damage is told, not swallowed."""

import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import setuptools
import torch
from support import builds

from appo._kernels.common import native
from appo.kernels import backend_info, future_value

ARGS = (torch.ones(3), torch.ones(3), torch.tensor([0, 3]), 0.5)


@pytest.fixture
def fresh(monkeypatch):
    """The loader remembers its answer; forget it before and after."""
    for name in ("APPO_NO_NATIVE", "APPO_NATIVE_DIR"):
        monkeypatch.delenv(name, raising=False)
    native.load.cache_clear()
    yield monkeypatch
    native.load.cache_clear()


def test_backend_info_says_what_runs(fresh):
    info = backend_info()
    if info["backend"] == "cpu":
        assert Path(info["library"]).is_file()
        assert info["reason"] is None
        assert "-O3" in info["build"]["flags"]
        assert info["build"]["compiler"]
    else:
        assert info["reason"]
    assert info["torch"] == torch.__version__


def test_switched_off(fresh):
    fresh.setenv("APPO_NO_NATIVE", "1")
    assert backend_info()["backend"] == "torch"
    assert "APPO_NO_NATIVE is set" in backend_info()["reason"]
    assert future_value(*ARGS).tolist() == [1.75, 1.5, 1.0]
    with pytest.raises(
        RuntimeError, match="backend='cpu' needs the native library.*APPO_NO_NATIVE"
    ):
        future_value(*ARGS, backend="cpu")


def test_not_built(fresh, tmp_path):
    fresh.setattr(native, "_native_dir", lambda: tmp_path)
    info = backend_info()
    assert (info["backend"], info["library"]) == ("torch", None)
    assert "not built" in info["reason"]
    (tmp_path / "build_info.json").write_text(
        '{"native": false, "reason": "no C++ compiler found"}'
    )
    native.load.cache_clear()
    assert "no C++ compiler found" in backend_info()["reason"]


def test_another_folder(fresh, tmp_path):
    fresh.setenv("APPO_NATIVE_DIR", str(tmp_path))
    info = backend_info()
    assert (info["backend"], info["library"]) == ("torch", None)
    assert str(tmp_path) in info["reason"]


def test_damaged_library_is_reported(fresh, tmp_path):
    fresh.setattr(native, "_native_dir", lambda: tmp_path)
    native.library_path().write_bytes(b"not a library")
    with pytest.warns(RuntimeWarning, match="does not load"):
        assert future_value(*ARGS).tolist() == [1.75, 1.5, 1.0]  # still works, in PyTorch
    assert "does not load" in backend_info()["reason"]


@pytest.mark.skipif(native.load()[0] is None, reason="native library not built")
def test_library_of_another_version(fresh):
    fresh.setattr(native, "ABI_VERSION", native.ABI_VERSION + 1)
    with pytest.warns(RuntimeWarning, match="its interface is version"):
        native.load()


def test_one_digest_of_the_sources(monkeypatch, tmp_path):
    """setup.py and the loader hash the same files; a changed or moved file changes both."""
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    root = tmp_path / "checkout"
    shutil.copytree(builds.ROOT / "csrc", root / "csrc")
    for name in ("CMakeLists.txt", "setup.py"):
        shutil.copy(builds.ROOT / name, root / name)
    built = runpy.run_path(str(root / "setup.py"))["source_digest"]

    def both():
        assert built() == native._source_digest(root)
        return built()

    seen = [both()]
    nested = root / "csrc" / "common" / "simd" / "math.h"
    nested.write_text(nested.read_text() + "// changed\n")
    seen.append(both())
    nested.rename(root / "csrc" / "common" / "math.h")
    seen.append(both())
    assert len(set(seen)) == 3


TREE = """abort add base blocks_of check commit counts evict evict_path extend fork free_blocks kv layout length need
new new_version path plan release stale tables tokens truncate"""


@pytest.mark.skipif(native.load()[0] is None, reason="native library not built")
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads ELF symbols")
@pytest.mark.skipif(shutil.which("nm") is None, reason="nm is not installed")
def test_library_exports_only_its_functions():
    """Hidden visibility: nothing but tvm-ffi entry points; no torch, no CPython, no OpenMP."""
    lib = native.library_path()
    listed = subprocess.run(["nm", "-D", lib], capture_output=True, text=True, check=True).stdout
    lines = [line.split() for line in listed.splitlines()]
    exported = {words[-1] for words in lines if words[-2] == "T"}
    functions = ("abi_version", "future_value", "tree_future_value", "branch_scores", "select_branch_points",
                 "policy_loss", "native_isa", "linear_logprob_stats", "linear_logprob_grads", "segment_attention",
                 "tree_attention_forward", "tree_attention_backward",
                 "rms_norm_forward", "rms_norm_backward", "swiglu_forward", "swiglu_backward", "rotary",
                 "decoder_stack", "decoder_stack_bytes", "decoder_stack_norms", "decoder_stack_pack", "decoder_stack_adapt",
                 "decoder_step", "decoder_head", "decoder_head_bytes", "decoder_head_pack",
                 "decoder_head_logits", "decoder_head_sample", "sample_logits", "sample_bits")  # fmt: skip
    functions += tuple(f"kv_tree_{name}" for name in TREE.split())
    assert exported == {f"__tvm_ffi_{name}" for name in functions}
    wanted = " ".join(words[-1] for words in lines if words[-2] == "U")
    assert not any(
        word in wanted for word in ("at4_ops", "aoti_torch", "PyObject", "PyErr", "GOMP", "omp_")
    )


def install_and_scan(wheel, folder):
    """Unpack a wheel with pip and use it from another directory; → what backend_info says."""
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target"]
    builds.run([*pip, str(folder), str(wheel)], timeout=120)
    code = (
        f"import sys; sys.path.insert(0, {str(folder)!r}); import appo, appo.kernels as k, torch; "
        f"assert appo.__file__.startswith({str(folder)!r}), appo.__file__; "
        "assert k.future_value(torch.ones(2), torch.ones(2), torch.tensor([0, 2]), 0.5).tolist() == [1.5, 1.0]; "
        "i = k.backend_info(); print(i['backend'], '|', i['reason'])"
    )
    return builds.run([sys.executable, "-c", code], cwd=folder, env=builds.clean(), timeout=120)


@pytest.mark.slow
@pytest.mark.timeout(1000)  # compiles all of csrc/
def test_native_wheel_of_an_sdist(tmp_path):
    """sdist → wheel → install: the library is in it if there is a compiler, and it runs."""
    sdist, _ = builds.build(builds.copy_tree(tmp_path / "src"), tmp_path / "sdist", "sdist")
    unpacked = builds.unpack(sdist, tmp_path / "unpacked")
    wheel, _ = builds.build(unpacked, tmp_path / "wheel", "wheel", timeout=900)
    has_compiler = any(shutil.which(c) for c in ("c++", "g++", "clang++"))
    assert ("appo/_native/libappo_native.so" in builds.names(wheel)) == (
        has_compiler and sys.platform.startswith("linux")
    )
    assert "-py3-none-" in wheel.name
    backend = install_and_scan(wheel, tmp_path / "site")
    expected = "cpu | None" if has_compiler else "torch | no native library"
    assert backend.startswith(expected)


@pytest.mark.slow
def test_pure_wheel(tmp_path):
    source = builds.copy_tree(tmp_path / "src")
    wheel, said = builds.build(source, tmp_path / "dist", "wheel", APPO_NO_NATIVE="1")
    assert "WITHOUT the native library: APPO_NO_NATIVE is set" in said
    assert wheel.name.endswith("-py3-none-any.whl")
    backend = install_and_scan(wheel, tmp_path / "site")
    assert backend.startswith("torch | ")
    assert "APPO_NO_NATIVE is set" in backend
