"""Segmented reverse discounted scan against the T × T decay matrix.

Time and memory for packed root rollouts.

    OMP_NUM_THREADS=1 python bench/kernels/future_value.py [--quick] [--json FILE]

The matrix form is the usual way to write the sum: build γ^(k-i) for all pairs, multiply. Two peers:
a matrix per row (memory for one row at a time), and the best case for it, one matrix built once and
reused for every row of equal length.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from appo.kernels import backend_info, future_value, half_life_to_gamma

sys.path.append(str(Path(__file__).resolve().parents[2]))  # the checkout, for `bench`

from bench.common import Case, arguments, medians, peak_bytes, report


def decay_matrix(length: int, gamma: float) -> torch.Tensor:
    position = torch.arange(length)
    distance = position[None, :] - position[:, None]  # [T, T] k - i
    return torch.where(distance >= 0, gamma ** distance.clamp(min=0), 0.0)


def matrix_per_row(x: torch.Tensor, mask: torch.Tensor, gamma: float) -> torch.Tensor:
    return torch.stack([decay_matrix(x.shape[1], gamma) @ row for row in x * mask])


def matrix_once(x: torch.Tensor, mask: torch.Tensor, gamma: float) -> torch.Tensor:
    return (x * mask) @ decay_matrix(x.shape[1], gamma).T


def main() -> None:
    args = arguments(__doc__ or "")
    length, rows = (512, 8) if args.quick else (6144, 64)
    gamma = half_life_to_gamma(32)
    generator = torch.Generator().manual_seed(0)
    x = 0.05 * torch.randn(rows, length, generator=generator)
    mask = torch.rand(rows, length, generator=generator) > 0.2
    offsets = torch.arange(0, rows * length + 1, length)
    flat = (x.reshape(-1), mask.reshape(-1), offsets, gamma)

    backends = ["cpu", "torch"] if backend_info()["backend"] == "cpu" else ["torch"]
    exact = future_value(flat[0].double(), *flat[1:], backend="torch")
    cases = []
    for backend in backends:

        def ours(backend: str = backend) -> torch.Tensor:
            return future_value(*flat, backend=backend)

        fast = {
            "ours": ours,
            "matrix, built once": lambda: matrix_once(x, mask, gamma),
        }
        # The matrix per row takes seconds per call: timed over a few rows and scaled to all of
        # them.
        few = min(rows, 4)
        slow = {"few": lambda few=few: matrix_per_row(x[:few], mask[:few], gamma)}
        seconds = medians(fast, repeats=5)
        per_row = medians(slow, repeats=3)["few"] * rows / few
        peers = {
            "matrix per row": per_row * 1e3,
            "matrix, built once": seconds["matrix, built once"] * 1e3,
        }
        error = float((ours().double() - exact).abs().max())
        size = f"{rows} × {length:,} tokens"
        cases.append(Case(f"{backend}: time, {size}", "ms", seconds["ours"] * 1e3, peers, error))
        memory = {
            "matrix per row": peak_bytes(lambda: matrix_per_row(x[:2], mask[:2], gamma)) / 2**20,
            "matrix, built once": peak_bytes(lambda: matrix_once(x, mask, gamma)) / 2**20,
        }
        cases.append(Case(f"{backend}: peak memory", "MiB", peak_bytes(ours) / 2**20, memory))
    report("Future value: O(T) scan against the T × T matrix", cases, args)


if __name__ == "__main__":
    main()
