"""`sample` over logits in memory in C++ (csrc/sampling/), and its noise.

Behind the output head: head.py.

Same tokens as definition.py; logp and entropy within float32 rounding. A row's bits depend on its
logits and its draw alone: not on the rows beside it, not on the number of threads.
"""

from __future__ import annotations

import torch
from torch import Tensor

from appo._kernels.common import native
from appo._kernels.linear_logprob import backend_cpu as linear_cpu
from appo.rollout.native.sampling.definition import Sampled, SamplingRows


def available() -> bool:
    """Whether this machine has the library and an instruction set it was written for."""
    return linear_cpu.isa() is not None


def sample(
    logits: Tensor, rows: SamplingRows, threads: int | None = None, isa: str = ""
) -> Sampled:
    """One token per row of logits[R, V] on the CPU. isa: "avx512", "avx2".

    "" is the best. threads: None: torch's.
    """
    out = Sampled.empty(len(logits))
    native.require("sample_logits")(
        logits.float().contiguous(),
        rows.seeds, rows.positions, rows.inv_temp, rows.greedy,
        out.tokens, out.logp, out.entropy,
        torch.get_num_threads() if threads is None else threads, isa,
    )  # fmt: skip
    return out


def noise_bits(seed: int, position: int, count: int, isa: str = "") -> Tensor:
    """upper · 2³² + lower of tokens 0 … count-1 (see noise.halves), as int64."""
    out = torch.empty(count, dtype=torch.int64)
    native.require("sample_bits")(seed, position, 0, out, isa)
    return out
