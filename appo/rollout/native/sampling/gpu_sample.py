"""`sample` over logits on a GPU in Triton (kernels/sampling/gpu/sample.py).

Same noise and tokens as definition.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from appo._kernels.common import backends
from appo.rollout.native.sampling.definition import Sampled, SamplingRows


def available(device: torch.device) -> bool:
    """Whether the Triton sampler runs on this device."""
    return device.type == "cuda" and backends.triton_runs(device)


def sample(logits: Tensor, rows: SamplingRows) -> Sampled:
    """One token per row of logits[R, V]; waits for the device once, for the results."""
    from appo._kernels.sampling.gpu.sample import sample as launch  # needs Triton

    columns = (rows.seeds, rows.positions, rows.inv_temp, rows.greedy)
    found = launch(logits, *(x.to(logits.device, non_blocking=True) for x in columns)).cpu()
    return Sampled(found[0].long(), found[1].float(), found[2].float())
