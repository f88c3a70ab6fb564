"""A head split over ranks by vocabulary: four numbers per token travel, never logits.

Every rank sums up its own columns; one all-gather of [4, N] and the same `merge` in rank order give
bit-equal results on all ranks. Backward needs one all-reduce of the gradient of h.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from appo._kernels.common.stats import Stats, merge


def merge_ranks(stats: Stats, group: Any) -> Stats:
    """Merge each rank's statistics of its own columns, in rank order.

    16 bytes per token and rank (float32).
    """
    mine = torch.stack(stats)  # [4, N]
    parts = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, mine, group=group)
    total = Stats(*parts[0])
    for part in parts[1:]:
        total = merge(total, Stats(*part))
    return total


def sum_ranks(x: Tensor, group: Any) -> Tensor:
    """All-reduce (sum) in place; returns x."""
    dist.all_reduce(x, group=group)
    return x


def check_shards(start: int, size: int, device: torch.device, group: Any) -> tuple[int, int]:
    """(first, one past the last) id of the whole vocabulary.

    ValueError unless the slices tile it in rank order.
    """
    mine = torch.tensor([start, size], device=device)
    parts = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, mine, group=group)
    slices = torch.stack(parts).tolist()  # the one wait for the device
    expected = 0
    for rank, (first, length) in enumerate(slices):
        if first != expected:
            raise ValueError(
                f"vocab_start of rank {rank} is {first}, expected {expected}: {slices}"
            )
        expected = first + length
    return 0, expected
