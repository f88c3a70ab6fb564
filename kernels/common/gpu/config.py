"""Tile sizes per GPU architecture, and how a call is cut into launches.

Plain integers: needs neither a GPU nor Triton.

The tables are static on purpose: a run-time autotuner may choose differently from one run to the
next, and the last bits change with the tile. `bench/gpu/aot_report.py` compiles every entry and
refuses spills and too much shared memory.
"""

from __future__ import annotations

from dataclasses import dataclass

# columns per slot of statistics in deterministic mode: one canonical cut of the vocabulary
UNIT = 1024
# Bounds for the statistics of one launch. Longer batches are taken in blocks of tokens, which costs
# a second read of the head per block and is nothing beside the product.
STATS_BYTES = 80_000_000
STATS_TOKENS = 32_768
# The strip of gradients that backward holds, 256 MiB in 16 bits, and the float32 logits (32 MiB,
# they stay in L2) that a library product writes at once.
GRADIENT_TOKENS, GRADIENT_COLUMNS = 32_768, 4_096
LOGIT_TOKENS, LOGIT_BYTES = 2_048, 32 << 20


@dataclass(frozen=True)
class Tile:
    """A tile of `rows` tokens × `columns` of the vocabulary, summed over H in steps of `depth`.

    pieces   the epilogue takes the columns in this many pieces, so that fewer registers are alive
             at once
    group    token blocks that neighbouring programs share: their hidden states stay in L2 while the
             head streams by
    tma      read operands by tensor descriptor where their strides allow it
    """

    rows: int
    columns: int
    depth: int
    pieces: int = 1
    warps: int = 8
    stages: int = 3
    group: int = 16
    tma: bool = False


# What every other call gets: float32 (exact products, no tensor cores), odd strides, H that is no
# multiple of the depth.
SMALL = Tile(64, 64, 32, warps=4, stages=2)
# "default" is every other GPU, sized for the 99 KB of shared memory of sm_86, sm_89 and sm_120.
PARTIAL = {
    "sm_80": Tile(128, 128, 64),
    "sm_90": Tile(128, 256, 64, 4, stages=4, tma=True),
    "sm_100": Tile(128, 256, 64, 4, stages=4, tma=True),
    "gfx942": Tile(128, 128, 64, stages=2),
    "default": Tile(128, 128, 64),
}
DLOGITS = {
    "sm_80": Tile(128, 128, 64, group=8),
    "sm_90": Tile(128, 256, 64, 8, stages=4, group=8, tma=True),
    "sm_100": Tile(128, 256, 64, 4, stages=4, group=8, tma=True),
    "gfx942": Tile(128, 128, 64, stages=2, group=8),
    "default": Tile(128, 128, 64, group=8),
}
INTERPRET = Tile(64, 512, 1024)  # few, large blocks: each operation on one costs a millisecond


@dataclass(frozen=True)
class Row:
    """Block of a kernel that walks along rows of float32 logits."""

    rows: int
    columns: int
    warps: int = 4


ROW = Row(4, 1024)  # a warp per row
ROW_INTERPRET = Row(64, 1024)


def row(device_type: str) -> Row:
    """The block of a row kernel; on a CPU, where it is interpreted, it is larger."""
    return ROW_INTERPRET if device_type == "cpu" else ROW


def pick(table: dict[str, Tile], arch: str, regular: bool) -> Tile:
    """The tile for an architecture.

    `regular`: 16-bit operands whose layout and depth need no masks (see launch.regular).
    """
    if arch == "interpret":
        return INTERPRET
    return table.get(arch, table["default"]) if regular else SMALL


@dataclass(frozen=True)
class Walk:
    """Tree attention: a block of `rows` queries meets blocks of `keys` keys."""

    rows: int
    keys: int
    warps: int = 4
    stages: int = 2


# (longest head, bytes per number) → tile; the first that fits is taken. "default" is every other
# GPU.
WalkTable = dict[str, dict[tuple[int, int], Walk]]
TREE_FORWARD: WalkTable = {
    "gfx942": {(64, 2): Walk(128, 64), (128, 2): Walk(128, 32), (128, 4): Walk(32, 32)},
    "default": {
        (64, 2): Walk(128, 64, 4, 3),
        (128, 2): Walk(128, 64, 8),
        (128, 4): Walk(64, 32, 8),
    },
}
TREE_QUERY_GRADS: WalkTable = {
    "sm_100": {(64, 2): Walk(64, 64), (128, 2): Walk(64, 32), (128, 4): Walk(32, 32)},
    "gfx942": {(64, 2): Walk(64, 64), (128, 2): Walk(64, 32), (128, 4): Walk(32, 32)},
    "default": {(64, 2): Walk(64, 64), (128, 2): Walk(64, 64, 8), (128, 4): Walk(32, 16)},
}
_WIDE_KEYS = {(64, 2): Walk(64, 64, 8), (128, 2): Walk(64, 64, 8), (128, 4): Walk(32, 32)}
TREE_KEY_GRADS: WalkTable = {
    "sm_90": _WIDE_KEYS,
    "sm_100": _WIDE_KEYS,
    "gfx942": {(64, 2): Walk(64, 64), (128, 2): Walk(32, 64), (128, 4): Walk(32, 32)},
    "default": {(64, 2): Walk(32, 64), (128, 2): Walk(64, 64, 8), (128, 4): Walk(32, 32)},
}
WALK_INTERPRET = Walk(64, 64)


def walk(table: WalkTable, arch: str, dim: int, itemsize: int) -> Walk:
    """The tile for heads of `dim` numbers of `itemsize` bytes."""
    if arch == "interpret":
        return WALK_INTERPRET
    fits = table.get(arch, table["default"]).items()
    return next(w for (longest, size), w in fits if dim <= longest and itemsize <= size)


def ceil_div(a: int, b: int) -> int:
    """a / b rounded up, for b > 0."""
    return -(-a // b)


@dataclass(frozen=True)
class Cut:
    """Slots of statistics per token, tiles of columns in each of them, and tokens per launch."""

    slots: int
    tiles_per_slot: int
    tokens: int

    @property
    def workspace_bytes(self) -> int:
        """stats[slots, 4, tokens] float32: 16 · slots bytes per token."""
        return 16 * self.slots * self.tokens


def cut(n: int, v: int, tile: Tile, deterministic: bool, processors: int) -> Cut:
    """How N tokens × V columns are cut.

    deterministic: a slot is UNIT columns whatever N is, so the bits of a token do not depend on the
    batch around it. Otherwise a few wide slots: enough for four programs per processor (a single
    token still uses all of them), and for one group of token blocks to fill the GPU.
    """
    tiles = ceil_div(v, tile.columns)
    if deterministic:
        assert UNIT % tile.columns == 0, tile
        per_slot = UNIT // tile.columns
        slots, max_tokens = ceil_div(v, UNIT), STATS_TOKENS
    else:
        blocks = ceil_div(n, tile.rows)
        wanted = max(ceil_div(4 * processors, blocks), ceil_div(processors, tile.group))
        per_slot = max(1, tiles // wanted)
        slots, max_tokens = ceil_div(tiles, per_slot), n
    fit = max(1, STATS_BYTES // (16 * slots * tile.rows)) * tile.rows
    return Cut(slots, per_slot, min(n, max_tokens, fit))


def stats_workspace_bytes(
    n: int, v: int, arch: str, *, deterministic: bool = True, processors: int = 132
) -> int:
    """What the forward pass of backend "triton" allocates beside its result.

    For regular 16-bit inputs.
    """
    return cut(n, v, pick(PARTIAL, arch, True), deterministic, processors).workspace_bytes


def logit_block(n: int, v: int) -> tuple[int, int]:
    """(tokens, columns) of a block of float32 logits of at most LOGIT_BYTES.

    Few tokens get wide blocks.
    """
    tokens = min(n, LOGIT_TOKENS)
    return tokens, min(v, LOGIT_BYTES // (4 * tokens))


def logit_workspace_bytes(n: int, v: int) -> int:
    """What backend "cublas32" allocates at once for float32 logits."""
    tokens, columns = logit_block(n, v)
    return 4 * tokens * columns


def gradient_block(n: int, v: int) -> tuple[int, int]:
    """(tokens, columns) of the strip of gradients.

    dW is summed over N / tokens blocks, dh over V / columns.
    """
    return min(n, GRADIENT_TOKENS), min(v, GRADIENT_COLUMNS)


def gradient_workspace_bytes(
    n: int, v: int, hidden: int, *, itemsize: int = 2, need_h: bool = True, need_w: bool = True
) -> int:
    """What backward allocates beside its results and gathered rows.

    The strip, dh[N, H] float32, a float32 block of dW.
    """
    tokens, columns = gradient_block(n, v)
    return tokens * columns * itemsize + 4 * hidden * (n * need_h + columns * need_w)
