"""Randomness derives from (run seed, step, prompt id, path in the tree).

Never from rank, time or arrival order.
"""

from __future__ import annotations

import hashlib


def derive_seed(*parts: int | str) -> int:
    """63-bit seed of a tuple of ints and strings.

    Each part is length-prefixed, so no two tuples collide by joining.

    >>> derive_seed(0, 3, "arith-17", 2, 0)      # run seed, step, prompt id, root 2, branch 0
    """
    h = hashlib.blake2b(digest_size=8)
    for part in parts:
        raw = str(part).encode()
        h.update(f"{type(part).__name__}:{len(raw)}:".encode() + raw)
    return int.from_bytes(h.digest(), "little") >> 1
