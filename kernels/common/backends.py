"""What this machine can run.

The instruction set of the native matrix kernels, and whether Triton fits the device.
"""

from __future__ import annotations

import functools
from importlib import metadata

import torch

from appo._kernels.common import native

TRITON_NEEDED = (3, 7)


def native_isa() -> str | None:
    """The instruction set of the native matrix kernels on this machine.

    None: they cannot run here.
    """
    run = native.function("native_isa")
    return (str(run()) or None) if run is not None else None


def triton_runs(device: torch.device) -> bool:
    """Whether "auto" takes Triton on a GPU.

    3.7 or newer, and a device that multiplies bfloat16 (sm_80, gfx90a or newer).
    """
    found = triton_version()
    if found is None or tuple(int(x) for x in found.split(".")[:2]) < TRITON_NEEDED:
        return False
    return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0)


@functools.cache
def triton_version() -> str | None:
    """Version of the installed Triton, or None."""
    try:
        return metadata.version("triton")
    except metadata.PackageNotFoundError:
        return None
