"""Build: copy `kernels/` into the wheel as `appo/_kernels/` and compile `csrc/` into `appo/_native/`.

Everything else is in pyproject.toml.  One shared library without CPython and without libtorch symbols serves every
Python and every torch, so the wheel is tagged `py3-none-<platform>`.  Without a C++ compiler or CMake, or with
APPO_NO_NATIVE=1, a pure Python wheel (`py3-none-any`) is built; `appo doctor` then says why.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import ClassVar

from setuptools import Command, Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build import build

ROOT = Path(__file__).resolve().parent
NATIVE = Path("appo", "_native")
LINK = Path("appo", "_kernels")  # how a checkout sees kernels/: a link, which sdists leave out


def find_cmake() -> str | None:
    """CMake on PATH, beside this interpreter (`pip install --no-build-isolation` without activation), or none."""
    beside = shutil.which("cmake", path=str(Path(sys.executable).parent))
    return beside or shutil.which("cmake")


def why_pure() -> str | None:
    """The reason not to compile, or None when the native library can be built."""
    if os.environ.get("APPO_NO_NATIVE", "") not in ("", "0"):
        return "APPO_NO_NATIVE is set"
    compilers = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++", "cl"]
    if not any(shutil.which(c.split()[0]) for c in compilers):
        return f"no C++ compiler found (looked for {', '.join(compilers)}); install one, or set CXX"
    if find_cmake() is None:
        return "no cmake found; install it with `pip install cmake ninja`"
    return None


PURE = why_pure()


def native_files() -> list[str]:
    """Every file under csrc/, relative to the checkout, in an order that no platform changes."""
    return sorted(p.relative_to(ROOT).as_posix() for p in (ROOT / "csrc").rglob("*") if p.is_file())


def source_digest() -> str:
    """Hash of what the library is built from; appo._kernels.common.native compares it to notice a stale build."""
    digest = hashlib.sha256()
    for path in ("CMakeLists.txt", *native_files()):
        digest.update(path.encode() + b"\0" + (ROOT / path).read_bytes())
    return digest.hexdigest()[:16]


class BuildKernels(Command):
    """One build step: kernel definitions into the wheel, native library into `appo/_native/`."""

    description = "copy kernels/ and compile csrc/"
    user_options: ClassVar[list[tuple[str, str | None, str]]] = []
    build_lib: str | None
    editable_mode: bool = False

    def initialize_options(self) -> None:
        self.build_lib = None

    def finalize_options(self) -> None:
        self.set_undefined_options("build", ("build_lib", "build_lib"))

    def run(self) -> None:
        base = ROOT if self.editable_mode else Path(self.build_lib or "build/lib")
        if self.editable_mode:
            if not (ROOT / LINK).is_dir():  # an unpacked sdist, or a checkout without links
                (ROOT / LINK).unlink(missing_ok=True)
                (ROOT / LINK).symlink_to(Path("..", "kernels"), target_is_directory=True)
        else:
            for path in self.kernel_files():
                target = base / LINK / path.relative_to("kernels")
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(ROOT / path, target)
        self.build_native(base / NATIVE)

    @staticmethod
    def kernel_files() -> list[Path]:
        return sorted(p.relative_to(ROOT) for p in (ROOT / "kernels").rglob("*.py"))

    def build_native(self, target: Path) -> None:
        """Compile into `target`, which afterwards holds the library (if any) and build_info.json."""
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir(parents=True)
        info: dict[str, object] = {"native": PURE is None, "sources": source_digest()}
        if PURE is not None:
            info["reason"] = PURE
            self.warn(f"appo: building WITHOUT the native library: {PURE}. PyTorch code is used.")
        else:
            info.update(self.compile(target))
        (target / "build_info.json").write_text(json.dumps(info, indent=2) + "\n")

    def compile(self, target: Path) -> dict[str, object]:
        cmake = find_cmake()
        assert cmake is not None
        bin_dir = str(Path(sys.executable).parent)
        env = {**os.environ, "PATH": bin_dir + os.pathsep + os.environ.get("PATH", "")}
        generator = ["-G", "Ninja"] if shutil.which("ninja", path=env["PATH"]) else []
        # A fresh directory each time: a kept CMake cache remembers tools of pip's deleted build environment.
        with tempfile.TemporaryDirectory(prefix="appo-build-") as temp:
            configure = [cmake, "-S", str(ROOT), "-B", temp, *generator]
            configure += ["-DCMAKE_BUILD_TYPE=Release", f"-DPython_EXECUTABLE={sys.executable}"]
            configure += [f"-DCMAKE_INSTALL_PREFIX={target.resolve()}"]
            try:
                subprocess.run(configure, check=True, env=env)
                subprocess.run([cmake, "--build", temp, "--target", "install"], check=True, env=env)
            except subprocess.CalledProcessError as error:
                raise SystemExit(
                    f"appo: compiling csrc/ failed ({' '.join(error.cmd[:2])} … exit {error.returncode}); the "
                    "compiler's message is above. Set APPO_NO_NATIVE=1 to install without the native library."
                ) from error
            details: dict[str, object] = json.loads(Path(temp, "toolchain.json").read_text())
        return details

    # What setuptools asks of a build step (SubCommand protocol), needed for editable installs.
    def get_source_files(self) -> list[str]:
        return [*map(str, self.kernel_files()), "CMakeLists.txt", *native_files()]

    def get_outputs(self) -> list[str]:
        return []

    def get_output_mapping(self) -> dict[str, str]:
        return {}


class Build(build):
    sub_commands: ClassVar = [*build.sub_commands, ("build_kernels", None)]

    def run(self) -> None:
        # setuptools adds to what an earlier build left there: a file that has moved would be in the wheel twice.
        # An editable install runs the steps below by themselves and never comes here.
        shutil.rmtree(Path(self.build_lib, "appo"), ignore_errors=True)
        super().run()


class NativeDistribution(Distribution):
    def has_ext_modules(self) -> bool:  # a platform wheel although no Python extension is built
        return PURE is None


class Wheel(bdist_wheel):
    def get_tag(self) -> tuple[str, str, str]:
        _, _, platform = super().get_tag()
        return "py3", "none", platform if PURE is None else "any"


setup(
    distclass=NativeDistribution,
    cmdclass={"build": Build, "build_kernels": BuildKernels, "bdist_wheel": Wheel},
)
