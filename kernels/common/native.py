"""Finding and loading the native library, and saying plainly what was found.

The library is `appo/_native/libappo_native.*`, beside the package in a wheel and in a checkout
alike. Where it is absent the PyTorch definitions are used; where it is present but does not load,
that is a fault and is reported.

APPO_NO_NATIVE=1   the library is not used
APPO_NATIVE_DIR    folder of another library, such as one built to be tested
                   (tests/sanitizer/run.sh)
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import appo

ABI_VERSION = 7
_SUFFIX = {"darwin": ".dylib", "win32": ".dll"}.get(sys.platform, ".so")


def _native_dir() -> Path:
    named = os.environ.get("APPO_NATIVE_DIR")
    return Path(named) if named else Path(appo.__file__).resolve().parent / "_native"


def library_path() -> Path:
    """Where the native library is expected to be."""
    return _native_dir() / f"libappo_native{_SUFFIX}"


def build_info() -> dict[str, Any]:
    """What the build wrote down.

    {"native": bool, "reason"|"compiler"|"flags"|"target": str, "sources": hash}.
    """
    path = _native_dir() / "build_info.json"
    return json.loads(path.read_text()) if path.is_file() else {}


@functools.cache
def load() -> tuple[Any | None, str | None]:
    """(module, None) or (None, reason).

    A library that exists but fails to load also raises a RuntimeWarning, once.
    """
    if os.environ.get("APPO_NO_NATIVE", "") not in ("", "0"):
        return None, "switched off: APPO_NO_NATIVE is set"
    path = library_path()
    if not path.is_file():
        reason = build_info().get("reason", "not built; run `pip install -e .` in the checkout")
        return None, f"no native library at {path}: {reason}"
    try:
        import tvm_ffi  # brings libtvm_ffi into the process, which the library needs

        module = tvm_ffi.load_module(path)
        found = module["abi_version"]()
        if found != ABI_VERSION:
            raise RuntimeError(f"its interface is version {found}, this source needs {ABI_VERSION}")
    except Exception as error:  # whatever it is, it is told below
        reason = f"{path} does not load: {type(error).__name__}: {error}; rebuild with `pip install -e .`"
        warnings.warn(
            f"appo: PyTorch code replaces the native library. {reason}", RuntimeWarning, 2
        )
        return None, reason
    return module, None


def function(name: str) -> Any | None:
    """The native function `name`, or None where the library is not used."""
    module, _ = load()
    return None if module is None else module[name]


def require(name: str) -> Any:
    """The native function `name`; RuntimeError that says why where the library is not used."""
    module, reason = load()
    if module is None:
        raise RuntimeError(f"backend='cpu' needs the native library. {reason}")
    return module[name]


def _stale(info: dict[str, Any]) -> bool:
    """True when a checkout's csrc/ is not what the library was built from."""
    root = Path(appo.__file__).resolve().parents[1]
    if "sources" not in info or not (root / "csrc").is_dir():
        return False
    return _source_digest(root) != info["sources"]


def _source_digest(root: Path) -> str:
    """Hash of CMakeLists.txt and csrc/ of a checkout; the same as `source_digest` of setup.py."""
    files = sorted(
        p.relative_to(root).as_posix() for p in (root / "csrc").rglob("*") if p.is_file()
    )
    digest = hashlib.sha256()
    for path in ("CMakeLists.txt", *files):
        digest.update(path.encode() + b"\0" + (root / path).read_bytes())
    return digest.hexdigest()[:16]


def backend_info() -> dict[str, Any]:
    """Which code runs the kernels on the CPU, for `appo doctor`.

    backend "cpu" (native) | "torch"; library: path or None; reason: why the native library is not
    used, or None; stale: the checkout's C++ changed after the build; build: compiler and flags;
    torch, torch_threads.
    """
    import torch

    module, reason = load()
    info = build_info()
    return {
        "backend": "torch" if module is None else "cpu",
        "library": str(library_path()) if library_path().is_file() else None,
        "reason": reason,
        "stale": _stale(info),
        "build": info,
        "torch": torch.__version__,
        "torch_threads": torch.get_num_threads(),
    }
