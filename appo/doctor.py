"""`appo doctor`: what this machine can run, found out by trying it."""

from __future__ import annotations

import importlib.metadata as metadata
import platform
import shutil
from pathlib import Path
from typing import Any

PACKAGES = (
    "torch",
    "transformers",
    "deepspeed",
    "peft",
    "apache-tvm-ffi",
    "safetensors",
    "math-verify",
    "triton",
)
EXTRAS = {"vllm": "pip install 'appo[vllm]'", "flash-attn": "pip install 'appo[flash-attn]'"}


def run_doctor(console: Any) -> bool:
    """Print the card; → True when training can run here."""
    from appo import __version__
    from appo.run.plan import usable_cores
    from appo.tools.sandbox import probe

    warnings: list[str] = []
    rows = [
        ("appo", __version__),
        ("python", f"{platform.python_version()} on {platform.platform(terse=True)}"),
    ]
    rows += [("cores", f"{usable_cores()} usable ({_cpu()})"), ("memory", _memory())]
    rows += [
        (name, version or "missing")
        for name in PACKAGES
        if (version := _version(name)) is not None or name != "triton"
    ]
    rows += [
        (name, _version(name) or f"not installed ({fix}) — not needed on CPU")
        for name, fix in EXTRAS.items()
    ]
    rows += [("kernels", _native(warnings)), ("fused head", _head())]
    usable = []
    for level in ("strict", "landlock", "rlimit"):
        found = probe(level)
        usable += [level] if found.works and level != "rlimit" else []
        rows.append(
            (
                f"sandbox {level}",
                ("works" if found.works else "does not work") + f": {found.reason}",
            )
        )
    if not usable:
        warnings.append(
            "no sandbox level works: recipes with the python tool will not start. Install bubblewrap, or use a kernel "
            "with Landlock (>= 5.13)"
        )
    else:
        rows.append(("sandbox auto", f"{usable[0]}"))
    rows.append(("GPU", _gpu()))
    rows.append(("model cache", _cache()))
    console.card("appo doctor", [(k, v or "missing") for k, v in rows], warnings)
    return bool(usable)


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or "unknown CPU"
    facts = dict(line.split(":", 1) for line in lines if ":" in line)
    flags = next((v for k, v in facts.items() if k.strip() in ("flags", "Features")), "").split()
    name = next(
        (v.strip() for k, v in facts.items() if k.strip() == "model name"), platform.machine()
    )
    wide = [
        f for f in ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "bf16") if f in flags
    ]
    return f"{name}; {', '.join(wide)}"


def _memory() -> str:
    import psutil

    m = psutil.virtual_memory()
    return f"{m.total / 2**30:.1f} GiB, {m.available / 2**30:.1f} GiB free"


def _native(warnings: list[str]) -> str:
    from appo.kernels import backend_info

    info = backend_info()
    if info.get("backend") != "cpu":
        warnings.append(
            f"native kernels are off, the PyTorch definitions are used: {info.get('reason', 'unknown')}"
        )
    if info.get("stale"):
        warnings.append("the native library is older than csrc/: run pip install -e . again")
    build = info.get("build") or {}
    return f"{info.get('backend')} ({build.get('compiler', 'no native build')}, {build.get('target', 'PyTorch only')})"


def _head() -> str:
    """What backend="auto" of linear_logprob_entropy means here."""
    from appo._kernels.common import backends

    isa, triton = backends.native_isa(), backends.triton_version()
    on_cpu = f"CPU: cpu ({isa})" if isa else "CPU: torch (no native matrix kernels here)"
    on_gpu = f"triton {triton}" if triton else "torch (pip install 'appo[triton]' for the kernels)"
    return f"{on_cpu}; CUDA: {on_gpu}"


def _gpu() -> str:
    import torch

    if not torch.cuda.is_available():
        return "none visible to PyTorch; everything runs on the CPU"
    return ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))


def _cache() -> str:
    from appo.models.resolve import default_cache

    place = default_cache()
    models = (
        sorted(p.name for p in (place / "models").glob("[!.]*--*"))
        if (place / "models").is_dir()
        else []
    )
    free = shutil.disk_usage(place if place.exists() else place.home()).free / 2**30
    return f"{place} ({', '.join(models) or 'empty'}; {free:.0f} GiB free on that disk)"
