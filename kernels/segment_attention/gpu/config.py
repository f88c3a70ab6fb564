"""Heights of tiles, keys per step, warps and pipeline stages of segment attention.

Per architecture and head dimension.

Static like the tables of config.py, and for the same reason. A height is a number of (row, head of
the group) pairs.
"""

from __future__ import annotations

from dataclasses import dataclass

MAX_DIM = {2: 256, 4: 128}  # head dimension by bytes per number
HEIGHTS = {
    2: (64, 16),
    4: (16, 16),
}  # tall, low; float32 takes the registers of a tall tile three times over


@dataclass(frozen=True)
class Stream:
    """`keys` of a segment per step of a program's loop."""

    keys: int
    warps: int = 4
    stages: int = 3


# By the largest head dimension that an entry is for. "default" is every other GPU, sized for 99 KB
# of shared memory.
TALL = {
    "sm_90": {64: Stream(64, 8), 128: Stream(64, 8), 256: Stream(32, 8, 2)},
    "sm_100": {64: Stream(64, 8), 128: Stream(64, 8), 256: Stream(32, 8)},
    "gfx942": {64: Stream(32, stages=2), 128: Stream(64, 8, 2), 256: Stream(32, 8, 2)},
    "default": {64: Stream(32, 8), 128: Stream(64, 8), 256: Stream(16, 8, 2)},
}
LOW = {
    "gfx942": {64: Stream(32, stages=2), 256: Stream(16, stages=2)},
    "default": {64: Stream(32), 256: Stream(16)},
}
FLOAT32 = Stream(16, stages=2)
INTERPRET = Stream(64)


def stream(arch: str, itemsize: int, dim: int, pairs: int) -> Stream:
    """For a tile of `pairs` and a (padded) head dimension."""
    if arch == "interpret":
        return INTERPRET
    if itemsize == 4:
        return FLOAT32
    table = LOW if pairs == HEIGHTS[2][1] else TALL
    rows = table.get(arch, table["default"])
    return rows[min(limit for limit in rows if dim <= limit)]


def precision(arch: str, itemsize: int) -> str:
    """How float32 is multiplied.

    Exactly on AMD's float32 matrix units, as three products of TF32 halves on NVIDIA's tensor cores
    (what is dropped is below 2^-21 of a product); exact products there are scalar ones and spill.
    """
    return "tf32x3" if itemsize == 4 and arch.startswith("sm_") else "ieee"
