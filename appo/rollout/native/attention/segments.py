"""Attention over lists of KV segments in native code.

Each shared segment is read once for all rows below it.

A `Layout` (layout.py) says where each row's keys and values go and which rows read how much of
which segments; `segment_attention` runs it for one layer over the blocks of a packed pool. The
definition is attention.py.

The bits of a row depend on its query and on its own list of (segment, count) alone: not on the rows
beside it, on how they are grouped, or on the number of threads.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from appo._kernels.common import native
from appo.errors import EngineError
from appo.rollout.native.attention.pool import KVPool


class Reads(Protocol):
    """What attention needs of a Layout: int64 on the CPU, contiguous.

    slots     [M] block * 16 + position in it where a row's keys and values go, before anything is
              read; -1: nowhere
    segments  [S, 2] where its blocks start in `blocks` · positions
    blocks    [...] blocks of the pool
    reads     [R, 4] segment · first row · last row + 1 · where their limits start; a row's reads in
              path order
    limits    [...] how many positions a row reads (0: none)
    """

    slots: Tensor
    segments: Tensor
    blocks: Tensor
    reads: Tensor
    limits: Tensor


def segment_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: Reads,
    pool: KVPool,
    layer: int,
    out: Tensor,
    *,
    tile_rows: int = 0,
    isa: str = "",
    threads: int | None = None,
) -> None:
    """Write keys and values, then attend each row to its segments.

    k, v[M,Hkv,D] go into their slots; out[M,Hq,D] = attention of q[M,Hq,D].

    q, k, v, out  any stride between rows; float32 or bfloat16, as the pool; zeros in `out` for a
                  row without reads
    tile_rows     query rows (rows x query heads per key head) that share a pass over a chunk of
                  keys; 0: the default
    isa           "" picks the best; "avx512_bf16" | "avx512" | "avx2" insists
    threads       upper bound (default torch's); neither it nor tile_rows changes a bit
    Scores are scaled by 1/sqrt(D). Statistics and sums are float32; where bfloat16 is multiplied as
    such (avx512_bf16) the weights are rounded to it, and sum to 1 as rounded; elsewhere it is
    widened. NaN or infinite keys and values reach the rows that read them, no others.
    Raises EngineError for a pool that does not fit, ValueError for shapes and tables, TypeError for
    dtypes.
    """
    if pool.layout != "packed":
        raise EngineError(f"native attention needs a packed pool, this one is {pool.layout}")
    like = (pool.kv_heads, pool.head_dim, pool.dtype)
    if (*k.shape[1:], k.dtype) != like:
        raise EngineError(
            f"k has shape {tuple(k.shape)} and dtype {k.dtype}; the pool has (heads, head dimension, dtype) {like}"
        )
    limit = torch.get_num_threads() if threads is None else threads
    native.require("segment_attention")(
        q, k, v, layout.slots, layout.segments, layout.blocks, layout.reads, layout.limits, pool.addresses,
        pool.layers, layer, out, tile_rows, isa, limit,
    )  # fmt: skip
