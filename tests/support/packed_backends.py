"""Which backends of the kernels over packed tokens run on this machine, and on which device."""

from __future__ import annotations

import pytest
import torch
from support.head_backends import device_of, why_not

from appo._kernels.common import native


def packed_backends(*names):
    """Backends as pytest parameters.

    One that cannot run here is skipped with the reason, one on a device is marked `gpu`.
    """
    return [pytest.param(name, marks=_marks(name)) for name in names or ("torch", "cpu", "triton")]


def _marks(name):
    reason = why_not(name) if name != "cpu" else (native.load()[1] or "")
    marks = [pytest.mark.skipif(bool(reason), reason=reason)]
    return [*marks, pytest.mark.gpu] if device_of(name) == "cuda" else marks


def on(name, *tensors):
    """The tensors on the device of a backend."""
    return [t if t is None else t.to(device_of(name)) for t in tensors]


def packed_offsets(lengths):
    return torch.tensor([0, *lengths], dtype=torch.int64).cumsum(0)


def random_tree(nodes, generator):
    """parents[nodes]: -1 or an earlier node."""
    draw = [int(torch.randint(-1, max(n, 1), (1,), generator=generator)) for n in range(nodes)]
    return torch.tensor([min(p, n - 1) for n, p in enumerate(draw)], dtype=torch.int64)
