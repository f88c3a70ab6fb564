"""Native attention over segments: against float64 on random trees, and the same bits however the
rows are grouped.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from appo._kernels.common import native
from appo.errors import EngineError
from appo.rollout.native.attention.attention import segment_attention_torch
from appo.rollout.native.attention.pool import KVPool, available
from appo.rollout.native.attention.segments import segment_attention

pytestmark = pytest.mark.skipif(
    not available(torch.float32, 64, torch.device("cpu")), reason="no native attention"
)
F32, BF16 = torch.float32, torch.bfloat16
BEST = native.function("native_isa")() if native.function("native_isa") else ""
LAYERS, LAYER = 2, 1  # attended on the second layer, so that a wrong layer stride shows
COUNTS = (0, 1, 2, 15, 16, 17, 63, 64, 127, 128, 129, 300)
# Half a unit in the last place of the weights, the same of their sum, and of the result.
BOUNDS = {F32: 1e-5, BF16: 2**-8}

Path = list[tuple[int, int]]  # (segment, count), root first


@dataclass
class Tree:
    """Rows 0 … M-1, depth first; row i reads the first count of each (segment, count) of paths[i]."""

    pool: KVPool
    kv: list[
        torch.Tensor
    ]  # [L, 2, Hkv, positions, D] of each segment, what `pool` holds in `blocks`
    blocks: list[list[int]]
    paths: list[Path]
    q: torch.Tensor


def plant(kv: list[torch.Tensor], paths: list[Path], q: torch.Tensor, seed: int = 0) -> Tree:
    """A tree whose segments lie in shuffled blocks of a pool that is NaN everywhere else."""
    layers, _, kv_heads, _, dim = kv[0].shape
    pool = KVPool(layers, kv_heads, dim, q.dtype, layout="packed")
    counts = [-(-x.shape[3] // 16) for x in kv]
    order = iter(np.random.default_rng(seed).permutation(sum(counts) + 2).tolist())
    pool.ensure(sum(counts) + 2)
    pool.fill_nan(range(sum(counts) + 2))
    blocks = [[next(order) for _ in range(n)] for n in counts]
    for x, some in zip(kv, blocks, strict=True):
        slots = torch.tensor([b * 16 + i for b in some for i in range(16)])[: x.shape[3]]
        for layer in range(layers):
            pool.write(layer, *x[layer].transpose(1, 2), slots)
    return Tree(pool, kv, blocks, paths, q)


def grow(seed: int, dtype: torch.dtype, dim: int, group: int, depth: int = 4) -> Tree:
    """A random tree: several children per node, each inheriting another count of it; rows at nodes
    of every depth.
    """
    rng = np.random.default_rng(seed)
    generator = torch.Generator().manual_seed(seed)
    read: list[int] = []
    paths: list[Path] = []

    def node(path: Path, level: int) -> None:
        segment = len(read)
        read.append(0)

        def count() -> int:
            n = int(rng.choice(COUNTS))
            read[segment] = max(read[segment], n)
            return n

        if level == 0:
            first = count()
            paths.extend([*path, (segment, n)] for n in range(first, first + 3))
            read[segment] = max(read[segment], first + 2)
            return
        paths.append([*path, (segment, count())])
        for _ in range(rng.integers(2, 4)):
            node([*path, (segment, count())], level - 1)

    node([], depth - 1)
    kv_heads = 2
    kv = [torch.randn(LAYERS, 2, kv_heads, n, dim, generator=generator).to(dtype) for n in read]
    q = torch.randn(len(paths), kv_heads * group, dim, generator=generator)
    return plant(kv, paths, 2 * q.to(dtype), seed)


def tables(tree: Tree, rows: range | None = None, grouped: bool = True) -> SimpleNamespace:
    """One read per segment over the rows `rows` (numbered from 0 in the call), or (not grouped) one
    per row.
    """
    chosen = [tree.paths[i] for i in rows or range(len(tree.paths))]
    reads, limits = [], []
    for level in range(max(map(len, chosen))):
        for segment in range(len(tree.kv)):
            counts = [
                p[level][1] if level < len(p) and p[level][0] == segment else 0 for p in chosen
            ]
            readers = [i for i, n in enumerate(counts) if n]
            if grouped and readers:
                reads.append((segment, readers[0], readers[-1] + 1, len(limits)))
                limits += counts[readers[0] : readers[-1] + 1]
            for i in [] if grouped else readers:
                reads.append((segment, i, i + 1, len(limits)))
                limits.append(counts[i])
    starts = np.cumsum([0] + [len(b) for b in tree.blocks]).tolist()
    sizes = [(first, kv.shape[3]) for first, kv in zip(starts, tree.kv)]
    return SimpleNamespace(
        slots=torch.full((len(chosen),), -1),
        segments=torch.tensor(sizes).view(-1, 2),
        blocks=torch.tensor([*itertools.chain.from_iterable(tree.blocks)], dtype=torch.int64),
        reads=torch.tensor(reads, dtype=torch.int64).view(-1, 4),
        limits=torch.tensor(limits, dtype=torch.int64),
    )


def run(tree: Tree, layout=None, q: torch.Tensor | None = None, **how) -> torch.Tensor:
    q = tree.q if q is None else q
    none = torch.zeros(len(q), tree.pool.kv_heads, q.shape[2], dtype=q.dtype)
    out = torch.full_like(q, torch.nan)
    layout = layout or tables(tree)
    segment_attention(q, none, none, layout, tree.pool, LAYER, out, **{"threads": 1, **how})
    return out


def check(tree: Tree, out: torch.Tensor) -> None:
    """Against attention over the concatenated path in float64; the bound grows with Σ p |v|."""
    group = tree.q.shape[1] // tree.pool.kv_heads
    for row, path in enumerate(tree.paths):
        parts = [tree.kv[s][LAYER, :, :, :n].double() for s, n in path]
        k, v = torch.cat(parts, dim=2).repeat_interleave(group, dim=1)
        if not k.shape[1]:
            assert not out[row].any()
            continue
        scores = torch.einsum("hd,hnd->hn", tree.q[row].double(), k) / math.sqrt(k.shape[2])
        p = scores.softmax(-1)
        want, size = (torch.einsum("hn,hnd->hd", p, x) for x in (v, v.abs()))
        error = (out[row].double() - want).abs()
        bound = BOUNDS[out.dtype] * (size + want.abs())
        assert (error <= bound).all(), (row, path, error.max())


@pytest.mark.parametrize("group", [1, 3, 4, 8])
@pytest.mark.parametrize("dim", [2, 8, 32, 64, 80, 96, 128, 250, 256])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_random_trees_against_float64(dtype, dim, group):
    tree = grow(seed=dim + group, dtype=dtype, dim=dim, group=group, depth=3)
    assert max(map(len, tree.paths)) == 3 and len(tree.paths) > 8
    out = run(tree)
    check(tree, out)
    assert torch.equal(out, run(tree, tables(tree, grouped=False)))


def test_float32_takes_an_odd_head_dimension():
    tree = grow(seed=1, dtype=F32, dim=7, group=2)
    check(tree, run(tree))


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("layout", ["packed", "plain"])
def test_the_definition_agrees(dtype, layout):
    tree = grow(seed=2, dtype=dtype, dim=64, group=3, depth=3)
    pool = KVPool(LAYERS, 2, 64, dtype, layout=layout)
    pool.ensure(tree.pool.blocks)
    k, v = torch.randn(2, len(tree.q), 2, 64).to(dtype)
    plan = tables(tree)
    for kv, blocks in zip(tree.kv, tree.blocks, strict=True):
        slots = torch.tensor([b * 16 + i for b in blocks for i in range(16)])[: kv.shape[3]]
        pool.write(LAYER, *kv[LAYER].transpose(1, 2), slots)
    plan.slots[3] = tree.blocks[0][0] * 16  # the first key of the root is replaced
    out, ours = torch.empty(2, *tree.q.shape, dtype=dtype)
    segment_attention_torch(tree.q, k, v, plan, pool, LAYER, out)
    segment_attention(tree.q, k, v, plan, tree.pool, LAYER, ours)
    torch.testing.assert_close(ours, out, rtol=0, atol=2e-2 if dtype == BF16 else 1e-5)
    tree.kv[0][LAYER, 0, :, 0], tree.kv[0][LAYER, 1, :, 0] = k[3], v[3]
    check(tree, out)


@pytest.mark.parametrize("isa", ["avx2", "avx512"])
@pytest.mark.parametrize("dim,group", [(64, 3), (80, 1), (8, 4)])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_every_instruction_set(isa, dtype, dim, group):
    if isa == "avx512" and not BEST.startswith("avx512"):
        pytest.skip("this machine has no AVX-512")
    tree = grow(seed=7, dtype=dtype, dim=dim, group=group)
    out = run(tree, isa=isa)
    check(tree, out)
    assert torch.equal(out, run(tree, tables(tree, grouped=False), isa=isa))
    assert torch.equal(out, run(tree, isa=isa, threads=2))


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("dim,group", [(8, 2), (16, 3), (64, 3), (64, 1), (128, 8)])
def test_bits_do_not_depend_on_who_else_reads(dtype, dim, group):
    tree = grow(seed=11 * dim + group, dtype=dtype, dim=dim, group=group)
    plan = tables(tree)
    whole = run(tree, plan)
    assert torch.equal(whole, run(tree, tables(tree, grouped=False)))
    for tile_rows in (1, group, 2 * group + 1, 1000):
        assert torch.equal(whole, run(tree, plan, tile_rows=tile_rows))
    for rows in (range(0, 1), range(3, 4), range(2, len(whole)), range(1, len(whole) - 1, 2)):
        assert torch.equal(whole[rows], run(tree, tables(tree, rows), tree.q[rows].contiguous()))


def test_bits_do_not_depend_on_threads():
    tree = grow(seed=3, dtype=BF16, dim=128, group=8, depth=5)
    plan = tables(tree)
    assert 2 * int(plan.limits.sum()) * tree.q[0].numel() > 5e7  # enough for several threads
    first = run(tree, plan)
    for threads in (2, 3, 5):
        for tile_rows in (0, 8):
            assert torch.equal(first, run(tree, plan, threads=threads, tile_rows=tile_rows))


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("at", [65, 128, 143])
def test_what_a_row_does_not_read_cannot_reach_it(dtype, bad, at):
    """Causal rows over two chunks; one key and value in the middle is not a number: it reaches the
    rows from there on.
    """
    rows, group = 150, 3
    kv = torch.randn(LAYERS, 2, 1, rows, 64).to(dtype)
    q = torch.randn(rows, group, 64).to(dtype)
    paths = [[(0, i + 1)] for i in range(rows)]
    clean = run(plant([kv], paths, q))
    check(plant([kv], paths, q), clean)
    kv[LAYER, :, :, at] = bad
    out = run(plant([kv], paths, q))
    assert torch.equal(out[:at], clean[:at])
    assert out[at:].isnan().any(-1).all()


def test_large_scores_and_rows_without_keys():
    """Scores far apart from chunk to chunk: the largest wins; a row that reads nothing is zero."""
    kv = torch.zeros(LAYERS, 2, 1, 400, 16)
    kv[LAYER, 0, 0, :, 0] = torch.linspace(-1e4, 1e4, 400)
    kv[LAYER, 1, 0] = torch.randn(400, 16)
    q = torch.zeros(4, 1, 16)
    q[:, 0, 0] = torch.tensor([400.0, 1.0, -400.0, 1.0])
    out = run(plant([kv], [[(0, 400)], [(0, 0)], [(0, 400)], []], q))
    torch.testing.assert_close(out[0, 0], kv[LAYER, 1, 0, -1], rtol=1e-6, atol=0)
    torch.testing.assert_close(out[2, 0], kv[LAYER, 1, 0, 0], rtol=1e-6, atol=0)
    assert not out[1].any() and not out[3].any()


@pytest.mark.parametrize("isa", ["avx2", "avx512", "avx512_bf16"])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_scores_of_any_size_and_scores_that_are_no_numbers(dtype, isa):
    """The largest key weighs exactly 1 however large its score; keys that are all minus infinity
    are not no keys.
    """
    if isa not in ("avx2", BEST) and not (isa == "avx512" and BEST == "avx512_bf16"):
        pytest.skip(f"this machine has {BEST}")
    if isa == "avx512_bf16" and dtype != BF16:
        pytest.skip("of bfloat16 only")
    generator = torch.Generator().manual_seed(3)
    kv = 1e10 * torch.randn(LAYERS, 2, 1, 40, 64, generator=generator).to(dtype)
    q = 1e10 * torch.randn(5, 1, 64, generator=generator).to(dtype)
    tree = plant([kv], [[(0, n)] for n in (1, 2, 17, 33, 40)], q)
    check(tree, run(tree, isa=isa))
    kv = torch.randn(LAYERS, 2, 1, 40, 64, generator=generator).to(dtype)
    kv[:, 0, :, :20] = -torch.inf
    tree = plant([kv], [[(0, 20)], [(0, 0)], [(0, 40)]], torch.ones(3, 1, 64, dtype=dtype))
    none, nothing, some = run(tree, isa=isa).float()
    assert none.isnan().all()
    assert not nothing.any()
    values = kv[LAYER, 1, 0, 20:].double()
    weights = torch.softmax(kv[LAYER, 0, 0, 20:].double().sum(-1) / 8, 0)
    assert (some[0].double() - weights @ values).abs().max() < 4 * BOUNDS[dtype]


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("dim", [6, 64])
def test_rows_are_written_before_they_are_read(dtype, dim):
    """A chunk of 70 rows from position 9 on, in three calls or one; strided q, k, v and out as a
    step has them.
    """
    rows, heads, kv_heads = 70, 6, 2
    generator = torch.Generator().manual_seed(0)
    past = torch.randn(LAYERS, 2, kv_heads, 9, dim, generator=generator).to(dtype)
    x = torch.randn(LAYERS, rows, heads + 2 * kv_heads, dim, generator=generator).to(dtype)
    outs, pools = [], []
    for cuts in ((0, rows), (0, 1, 33, rows)):
        tree = plant([past], [], x)
        blocks = [*tree.blocks[0], 9, 7, 8, 5]
        tree.pool.ensure(10)
        tree.pool.fill_nan(blocks[1:])
        out = torch.full((rows, 2 * heads, dim), torch.nan, dtype=dtype)
        for a, b in itertools.pairwise(cuts):
            layout = SimpleNamespace(
                slots=torch.tensor([blocks[i // 16] * 16 + i % 16 for i in range(9 + a, 9 + b)]),
                segments=torch.tensor([[0, 9 + b]]),
                blocks=torch.tensor(blocks),
                reads=torch.tensor([[0, 0, b - a, 0]]),
                limits=torch.arange(10 + a, 10 + b),
            )
            layout.slots[0] = layout.slots[0] if a == 0 else -1  # it was written by the call before
            for layer in range(LAYERS):
                if a:
                    tree.pool.write(
                        layer,
                        *x[layer, a : a + 1, heads:].chunk(2, 1),
                        torch.tensor([blocks[(9 + a) // 16] * 16 + (9 + a) % 16]),
                    )
                q, k, v = x[layer, a:b].split((heads, kv_heads, kv_heads), dim=1)
                segment_attention(q, k, v, layout, tree.pool, layer, out[a:b, :heads])
        assert out[:, heads:].isnan().all()
        outs.append(out[:, :heads])
        pools.append(tree.pool.read(blocks, 79))
        assert torch.equal(pools[-1][:, :, :, :9], past)
        assert torch.equal(pools[-1][:, 0, :, 9:], x[:, :, heads:-kv_heads].transpose(1, 2))
        assert torch.equal(pools[-1][:, 1, :, 9:], x[:, :, -kv_heads:].transpose(1, 2))
    assert torch.equal(*outs) and not outs[0].isnan().any()


def test_misuse_is_an_error_that_says_what_was_expected():
    def call(heads=6, dim=64, **how) -> None:
        q, k = torch.zeros(3, heads, dim), torch.zeros(3, 2, dim)
        pool = KVPool(LAYERS, 2, how.pop("pool_dim", dim), F32, layout=how.pop("kind", "packed"))
        pool.ensure(1)
        last = pool.blocks - 1
        layout = dict(
            slots=[-1, 0, last * 16 + 15], segments=[[0, 10], [1, 32]], blocks=[0, last, 0],
            reads=[[0, 0, 3, 0], [1, 1, 2, 3]], limits=[10, 0, 3, 32],
        )  # fmt: skip
        layout = {name: torch.tensor(how.pop(name, table)) for name, table in layout.items()}
        args = how.pop("q", q), how.pop("k", k), how.pop("v", how.pop("k", k))
        out = how.pop("out", torch.zeros(3, heads, dim))
        segment_attention(*args, SimpleNamespace(**layout), pool, how.pop("layer", 0), out, **how)

    call()
    k, beyond = torch.zeros(3, 2, 64), 1 << 40
    for bad, message in (
        (dict(limits=[11, 0, 3, 32]), r"limits\[0\] is 11, expected 0 … 10, the positions of seg"),
        (dict(limits=[10, 0, -1, 32]), r"limits\[2\] is -1"),
        (dict(limits=[10, 0, 3]), r"reads\[1\] is \(1, 1, 2, 3\); .* 3 rows and 3 limits"),
        (dict(reads=[[0, 1, 4, 0]]), r"reads\[0\] is \(0, 1, 4, 0\); there are 2 segments, 3 rows"),
        (dict(reads=[[2, 0, 1, 0]]), r"reads\[0\] is \(2, 0, 1, 0\)"),
        (dict(reads=[[0, 0, 3]]), r"reads must be a contiguous \[n, 4\]"),
        (dict(segments=[[0, 10], [1, 33]]), r"segments\[1\] is \(1, 33\).* 3 blocks are listed"),
        (dict(segments=[[4, 0], [1, 32]]), r"segments\[0\] is \(4, 0\)"),
        (dict(blocks=[0, beyond, 0]), rf"blocks\[1\] is {beyond}, expected 0 … "),
        (dict(blocks=[0, 0, -1]), r"blocks\[2\] is -1, expected 0 … "),
        (dict(slots=[-2, 0, 0]), r"slots\[0\] is -2, expected -1 … "),
        (dict(slots=[0, 0, beyond]), rf"slots\[2\] is {beyond}, expected -1 … "),
        (dict(slots=[0, 0]), "slots has 2 items, expected 3"),
        (dict(v=k[:2]), r"v must be \[3, 2, 64\]"),
        (dict(out=k), r"out must be \[3, 6, 64\]"),
        (dict(k=k.mT.contiguous().mT), "k must have strides"),
        (dict(layer=2), "layer is 2, expected 0 … 1"),
        (dict(heads=5), "5 query heads cannot share 2"),
        (dict(dim=257), "head dimension is 257"),
        (dict(isa="avx1024"), "isa is 'avx1024'"),
        (dict(isa="avx512_bf16"), "isa is 'avx512_bf16'"),
        (dict(tile_rows=-1), "tile_rows is -1"),
    ):
        with pytest.raises(ValueError, match=message):
            call(**bad)
    for bad, message in (
        (dict(kind="plain"), "needs a packed pool, this one is plain"),
        (dict(k=k.repeat(1, 2, 1)), r"k has shape \(3, 4, 64\)"),
        (dict(k=k.bfloat16()), "dtype torch.bfloat16; the pool has"),
        (dict(pool_dim=62), r"the pool has .* \(2, 62, torch.float32\)"),
    ):
        with pytest.raises(EngineError, match=message):
            call(**bad)
    with pytest.raises(TypeError, match="k must have the dtype of q"):
        call(q=torch.zeros(3, 6, 64, dtype=BF16))
    with pytest.raises(TypeError, match="q must be float32 or bfloat16"):
        call(q=torch.zeros(3, 6, 64, dtype=torch.float64))
    with pytest.raises(TypeError, match="reads must be int64"):
        call(reads=[[0.0, 0.0, 3.0, 0.0]])
