"""What the learner did not have to compute: rows that carry no loss, and tokens that rows share.

Two separate factors.
"""

from __future__ import annotations

from collections.abc import Sequence

from appo.packing.pack import PackedBatch
from appo.types import RolloutTree


def sharing_counts(
    trees: Sequence[RolloutTree], batches: Sequence[PackedBatch], token_budget: int
) -> dict[str, float]:
    """Counts of one mini-batch on one rank; they add up over mini-batches and ranks.

    Their ratios are the two factors: all / rows is what leaving out rows without loss saved, rows /
    unique what storing shared tokens once saved.

    pack/tokens_all      tokens of all leaves as independent sequences
    pack/tokens_rows     tokens of the trained rows as independent sequences
    pack/tokens_unique   tokens in the streams, padding left out
    pack/rows · pack/streams · pack/over_budget (rows longer than the token budget)
    """
    return {
        "pack/tokens_all": float(sum(t.total_tokens() for t in trees)),
        "pack/tokens_rows": float(sum(b.total_tokens for b in batches)),
        "pack/tokens_unique": float(sum(b.unique_tokens for b in batches)),
        "pack/rows": float(sum(len(b.rows) for b in batches)),
        "pack/streams": float(len(batches)),
        "pack/over_budget": float(sum(b.unique_tokens > token_budget for b in batches)),
    }
