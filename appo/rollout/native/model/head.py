"""The output head in C++ (csrc/decoder/head.cpp).

Its weight packed once, logits or sampled tokens from it.

Needs what the C++ layers need (layers.unavailable). A row's bits depend on that row, its draw and
the weights: not on the batch it stands in, not on the number of threads.
"""

from __future__ import annotations

import torch
from torch import Tensor

from appo._kernels.common import native
from appo.rollout.native.sampling.definition import Sampled, SamplingRows


class NativeHead:
    """A packed copy of a weight [vocab, hidden] of `dtype`, float32 or bfloat16.

    `packed_bytes` of memory.

    isa      "avx512_bf16", "avx512", "avx2"; "" is the best for the dtype
    threads  upper bound; None: torch's
    """

    def __init__(
        self,
        vocab: int,
        hidden: int,
        dtype: torch.dtype,
        isa: str = "",
        threads: int | None = None,
    ):
        self.vocab, self.threads = vocab, threads
        self._head = native.require("decoder_head")(vocab, hidden, dtype == torch.bfloat16, isa)
        self.packed_bytes: int = native.require("decoder_head_bytes")(self._head)
        self._logits, self._sample = (
            native.require("decoder_head_logits"),
            native.require("decoder_head_sample"),
        )

    def pack(self, weight: Tensor) -> None:
        """Copy weight[vocab, hidden]; to be called after every change of it."""
        native.require("decoder_head_pack")(self._head, weight, self.thread_count())

    def logits(self, hidden: Tensor) -> Tensor:
        """[R, V] float32 of hidden[R, d], which may be float32 beside bfloat16 weights.

        Nothing is rounded then.
        """
        out = torch.empty(len(hidden), self.vocab)
        self._logits(self._head, hidden, out, self.thread_count())
        return out

    def sample(self, hidden: Tensor, rows: SamplingRows) -> Sampled:
        """One token per row of hidden[R, d].

        Of `logits(hidden)` only ever a tile is in memory.
        """
        out = Sampled.empty(len(hidden))
        self._sample(
            self._head, hidden.contiguous(),
            rows.seeds, rows.positions, rows.inv_temp, rows.greedy,
            out.tokens, out.logp, out.entropy, self.thread_count(),
        )  # fmt: skip
        return out

    def thread_count(self) -> int:
        """Threads of the next call: those asked for, or as many as torch uses."""
        return torch.get_num_threads() if self.threads is None else self.threads
