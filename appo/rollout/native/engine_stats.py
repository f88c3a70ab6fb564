"""What an engine holds now, as numbers: the part of its `stats` that no counter keeps."""

from __future__ import annotations

from appo.rollout.native.attention.pool import KVPool
from appo.rollout.native.model.layers import NativeLayers
from appo.rollout.native.scheduler import Scheduler
from appo.rollout.native.tree.native_tree import Tree


def engine_stats(
    tree: Tree, scheduler: Scheduler, pool: KVPool, layers: NativeLayers | None
) -> dict[str, float]:
    """Sequences, KV and memory; the names are explained at `RolloutEngine.stats`."""
    return {
        "preemptions": scheduler.preemptions,
        "evicted_tokens": scheduler.evicted_tokens,
        "live_sequences": tree.live_sequences,
        "live_nodes": tree.live_nodes,
        "running": len(scheduler.active),
        "waiting": len(scheduler.waiting),
        "kv_tokens": tree.tokens_held,
        "kv_bytes": pool.bytes,
        "kv_used_bytes": tree.used * pool.block_bytes,
        "blocks_used": tree.used,
        "blocks_free": tree.free,
        "blocks_peak": tree.peak,
        "block_bytes": pool.block_bytes,
        "packed_bytes": 0 if layers is None else layers.packed_bytes,
        "pack_seconds": 0.0 if layers is None else layers.pack_seconds,
    }
