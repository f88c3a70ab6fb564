"""Segment attention and KV writes in Triton, over the layouts of random trees, against float64; and the work list itself.

On a machine without a device the kernels run in Triton's interpreter, which has no bfloat16: float32 and float16 there.
"""

import math

import numpy as np
import pytest
import torch
from support.head_backends import ON_DEVICE, marks_of

from appo.rollout.native.attention.attention import segment_attention_torch
from appo.rollout.native.attention.pool import KVPool
from appo.rollout.native.tree.segment_tree import SegmentTree

triton = pytest.importorskip("triton")
pytestmark = marks_of("triton")

from appo._kernels.segment_attention.gpu import attend, kv_write  # noqa: E402
from appo._kernels.segment_attention.gpu import merge as attend_merge  # noqa: E402
from appo._kernels.segment_attention.gpu.segments import (  # noqa: E402
    Tables,
    heights,
    segment_attention,
    unavailable,
    workspace,
)
from appo._kernels.segment_attention.gpu.work import FIXED_SPLIT, Cut, work  # noqa: E402

torch.set_num_threads(1)
DEVICE = torch.device("cuda" if ON_DEVICE else "cpu")
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
DTYPES = [F32, F16, BF16] if ON_DEVICE else [F32, F16]
LAYERS, LAYER = 2, 1


def grow(seed, *, kv_heads=2, group=3, dim=16, dtype=F32, prompt=70, leaves=3, chunk=24):
    """(layout, pool, q, k, v): an open layout of decode rows, forks' first rows and chunks of tokens, several levels deep.

    The pool holds random KV where something was committed before and NaN everywhere else.
    """
    rng = np.random.default_rng(seed)
    generator = torch.Generator().manual_seed(seed)
    tree = SegmentTree()
    pool = KVPool(LAYERS, kv_heads, dim, dtype, DEVICE, layout="plain")
    pool.ensure(400)
    pool.arena.fill_(torch.nan)

    def random(*shape):
        return torch.randn(*shape, generator=generator).to(DEVICE, dtype)

    def run(seqs):
        layout = tree.plan(seqs, 10_000)
        for layer in range(LAYERS):
            pool.write(layer, *random(2, len(layout.ids), kv_heads, dim), layout.slots)
        tree.commit(layout)

    root = tree.add(range(prompt))
    run([root])
    level = [tree.fork(root, prompt - i % 3) for i in range(leaves)]
    for depth in range(2):
        for seq in level:
            tree.extend(seq, range(int(rng.integers(1, 20))))
        run(level)
        if depth < 1:
            level += [tree.fork(s, tree.length(s) - int(rng.integers(0, 5))) for s in level[::2]]
    for i, seq in enumerate(level):
        tree.extend(seq, range(1 if i % 3 else int(rng.integers(2, chunk))))
    layout = tree.plan([*level, tree.add(range(20))], 10_000)
    rows = len(layout.ids)
    # Strided, as the model hands them over.
    qkv = random(rows, (group + 2) * kv_heads, dim)
    q, k, v = qkv.split([group * kv_heads, kv_heads, kv_heads], dim=1)
    return layout, pool, q, k, v


def cut_of(q, pool, deterministic=False, processors=4):
    group = q.shape[1] // pool.kv_heads
    return Cut(group, pool.kv_heads, heights(q.dtype, DEVICE), processors, deterministic)


def work_of(layout, cut, rows=None, extra=None, reads=None, limits=None):
    reads = layout.reads if reads is None else reads
    limits = layout.limits if limits is None else limits
    rows = (0, len(layout.ids)) if rows is None else rows
    return work(layout.segments, reads, limits, rows, cut, extra)


def run_work(what, layout, q, pool, fill=None):
    """out[M, Hq, D] of a work list whose row 0 is row 0 of q."""

    parts = (what.tall, what.low, layout.blocks, what.limits, what.starts, what.entries)
    tables = Tables(*(table.to(DEVICE) for table in parts))
    o, lse = workspace(what.partials, q.shape[1], q.shape[2], DEVICE)
    o.fill_(torch.nan), lse.fill_(torch.nan)
    if fill:
        fill(o, lse)
    out = torch.full((len(what.starts) - 1, *q.shape[1:]), torch.nan, dtype=q.dtype, device=DEVICE)
    segment_attention(q, pool.arena[LAYER, 0], pool.arena[LAYER, 1], tables, o, lse, out)
    return out


def write(layout, pool, k, v):
    kv_write.kv_write(k, v, layout.slots.to(DEVICE), pool.arena[LAYER, 0], pool.arena[LAYER, 1])


def run(layout, pool, q, k, v, cut, rows=None):
    write(layout, pool, k, v)
    a, b = rows or (0, len(q))
    return run_work(work_of(layout, cut, (a, b)), layout, q[a:b], pool)


def oracle(layout, pool, q, row):
    """[Hq, D] in float64 from the arena: one softmax over all that the row reads."""
    keys, values = [], []
    for segment, a, b, start in layout.reads.tolist():
        if a <= row < b:
            first, n = int(layout.segments[segment, 0]), int(layout.limits[start + row - a])
            blocks = layout.blocks[first : first + -(-n // 16)].to(DEVICE)
            k, v = pool.arena[LAYER, :, blocks].flatten(1, 2)[:, :n].double().cpu()
            keys.append(k), values.append(v)
    k, v = torch.cat(keys), torch.cat(values)  # [S, Hkv, D]
    x = q[row].double().cpu().unflatten(0, (k.shape[1], -1))  # [Hkv, G, D]
    weights = torch.einsum("hgd,shd->hgs", x, k).div(math.sqrt(q.shape[2])).softmax(-1)
    return torch.einsum("hgs,shd->hgd", weights, v).flatten(0, 1)


BOUNDS = {F32: 1e-5, F16: 2**-10, BF16: 2**-7}


def check(out, layout, pool, q, rows=None):
    for row in range(len(q)) if rows is None else rows:
        want = oracle(layout, pool, q, row)
        error = (out[row].double().cpu() - want).abs().max() / want.abs().max()
        assert error <= BOUNDS[q.dtype], (row, error)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize(
    ("dim", "kv_heads", "group"), [(7, 1, 4), (16, 2, 3), (64, 3, 1), (96, 1, 3), (128, 1, 8)]
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_random_trees_against_float64(dtype, dim, kv_heads, group, deterministic):
    layout, pool, q, k, v = grow(dim + group, kv_heads=kv_heads, group=group, dim=dim, dtype=dtype)
    cut = cut_of(q, pool, deterministic)
    what = work_of(layout, cut)
    assert len(what.tall) and bool(len(what.low)) != deterministic
    check(run(layout, pool, q, k, v, cut), layout, pool, q)


@pytest.mark.parametrize(("dim", "group"), [(256, 2), (16, 70)])
def test_wide_heads_and_groups_of_more_heads_than_a_tile(dim, group):
    layout, pool, q, k, v = grow(3, kv_heads=1, group=group, dim=dim, dtype=F16, leaves=2)
    check(run(layout, pool, q, k, v, cut_of(q, pool)), layout, pool, q)


def test_long_segments_are_split_and_merged():
    layout, pool, q, k, v = grow(5, prompt=1400, leaves=3, kv_heads=1)
    for deterministic in (False, True):
        cut = cut_of(q, pool, deterministic, processors=132)
        what = work_of(layout, cut)
        assert what.split == (FIXED_SPLIT if deterministic else 256)
        assert (what.tall[:, 1] > 0).sum() >= 2  # splits that do not start at 0
        check(run(layout, pool, q, k, v, cut), layout, pool, q, range(0, len(q), 3))


def test_agrees_with_the_definition():
    layout, pool, q, k, v = grow(8)
    out = run(layout, pool, q, k, v, cut_of(q, pool))
    want = torch.empty_like(out)
    segment_attention_torch(q, k, v, layout, pool, LAYER, want)
    torch.testing.assert_close(out, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_do_not_depend_on_who_else_reads(dtype):
    """Deterministic mode: rows in one piece, in pieces, alone, and with every read cut into reads of one row each."""
    layout, pool, q, k, v = grow(
        11, dtype=dtype, dim=32, prompt=FIXED_SPLIT + 70, kv_heads=1, chunk=9
    )
    cut = cut_of(q, pool, deterministic=True)
    whole = run(layout, pool, q, k, v, cut)
    pieces = [(0, 7), (7, 8), (8, 20), (20, len(q))]
    assert torch.equal(whole, torch.cat([run(layout, pool, q, k, v, cut, p) for p in pieces]))
    single = [
        (s, row, row + 1, start + row - a)
        for s, a, b, start in layout.reads.tolist()
        for row in range(a, b)
    ]
    flat = work_of(layout, cut, reads=torch.tensor(single))
    assert len(flat.tall) > len(work_of(layout, cut).tall)
    assert torch.equal(whole, run_work(flat, layout, q, pool))


def test_rows_and_reads_without_keys():
    """Rows that no read names, limits of 0 in the middle of a read, and a layout without any: zeros."""
    layout, pool, q, k, v = grow(13)
    write(layout, pool, k, v)
    reads, limits = layout.reads[:1].clone(), layout.limits.clone()
    first, last, start = reads[0, 1:].tolist()
    limits[start + 1 : start + 4] = 0
    for deterministic in (False, True):
        cut = cut_of(q, pool, deterministic)
        out = run_work(work_of(layout, cut, reads=reads, limits=limits), layout, q, pool)
        empty = [r for r in range(len(q)) if not first <= r < last or 1 <= r - first < 4]
        assert (out[empty] == 0).all()
        rest = sorted(set(range(len(q))) - set(empty))
        assert len(rest) > 3 and (out[rest] != 0).any(-1).all() and out[rest].isfinite().all()
        none = run_work(work_of(layout, cut, reads=reads[:0]), layout, q, pool)
        assert (none == 0).all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_a_row_does_not_read_cannot_reach_it(bad):
    """A chunk of 90 tokens, causal; one key and value is no number: it reaches the rows from there on, no others."""
    tree = SegmentTree()
    pool = KVPool(LAYERS, 1, 16, F32, DEVICE, layout="plain")
    pool.ensure(20)
    pool.arena.fill_(torch.nan)
    seq = tree.add(range(90))
    layout = tree.plan([seq], 1000)
    q, k, v = torch.randn(3, 90, 1, 16).to(DEVICE)
    clean = run(layout, pool, q, k, v, cut_of(q, pool))
    check(clean, layout, pool, q)
    for where in ("key", "value"):
        spoilt = [k.clone(), v.clone()]
        spoilt[where == "value"][70] = bad
        out = run(layout, pool, q, *spoilt, cut_of(q, pool))
        assert torch.equal(out[:70], clean[:70])
        assert not out[70:].isfinite().all(-1).any()


def test_large_scores():
    """Scores far apart from split to split: the largest wins, nothing overflows."""
    layout, pool, q, k, v = grow(5, prompt=1400, leaves=3, kv_heads=1)
    write(layout, pool, k, v)
    pool.arena[LAYER, 0, :, :, :, 0] = torch.linspace(-3e3, 3e3, 400 * 16).view(400, 16, 1).to(DEVICE)  # fmt: skip
    q[..., 0] = 300.0
    out = run_work(work_of(layout, cut_of(q, pool)), layout, q, pool)
    assert out.isfinite().all()
    check(out, layout, pool, q, range(0, len(q), 5))


def test_partials_from_elsewhere_are_merged():
    """The causal part of a chunk computed apart, as flash-attn would; the kernels do the prefix."""
    layout, pool, q, k, v = grow(17, chunk=60)
    want = run(layout, pool, q, k, v, cut_of(q, pool))
    _node, (row, start, count) = max(layout.rows_of.items(), key=lambda item: item[1][2])
    own = [i for i, (_, a, b, _) in enumerate(layout.reads.tolist()) if a <= row < b][-1]
    assert count > 8
    limits = layout.limits.clone()
    at = int(layout.reads[own, 3]) + row - int(layout.reads[own, 1])
    assert limits[at : at + count].tolist() == list(range(start + 1, start + count + 1))
    limits[at : at + count] = start

    def fill(o, lse):
        heads = q.shape[1] // k.shape[1]
        x = q[row : row + count].transpose(0, 1).float()
        keys, values = (
            t[row : row + count].repeat_interleave(heads, 1).transpose(0, 1).float() for t in (k, v)
        )
        scores = x @ keys.mT / math.sqrt(q.shape[2])
        causal = torch.ones(count, count, dtype=torch.bool, device=DEVICE).tril()
        scores = scores.masked_fill(~causal, -torch.inf)
        o[-count:] = (scores.softmax(-1) @ values).transpose(0, 1)
        lse[-count:] = scores.logsumexp(-1).T / math.log(2)

    extra = torch.arange(row, row + count)
    what = work_of(layout, cut_of(q, pool), extra=extra, limits=limits)
    torch.testing.assert_close(run_work(what, layout, q, pool, fill), want, rtol=1e-5, atol=1e-6)


def test_kv_is_written_where_the_slots_say():
    pool = KVPool(LAYERS, 3, 10, F16, DEVICE, layout="plain")
    pool.ensure(5)
    pool.arena.fill_(7.0)
    k, v = torch.randn(6, 8, 10).to(DEVICE, F16)[:, :6].split(3, dim=1)
    slots = torch.tensor([0, -1, 79, 17, -1, 16], device=DEVICE)
    want = pool.arena.clone()
    for row, slot in enumerate(slots.tolist()):
        if slot >= 0:
            want[LAYER, 0, slot // 16, slot % 16] = k[row]
            want[LAYER, 1, slot // 16, slot % 16] = v[row]
    kv_write.kv_write(k, v, slots, pool.arena[LAYER, 0], pool.arena[LAYER, 1])
    assert torch.equal(pool.arena, want)
    kv_write.kv_write(k[:0], v[:0], slots[:0], pool.arena[0, 0], pool.arena[0, 1])
    assert torch.equal(pool.arena, want)


def test_what_the_kernels_do_not_take():
    layout, pool, q, k, v = grow(1, dim=16)
    assert unavailable(F32, 128, DEVICE) is None and unavailable(F16, 256, DEVICE) is None
    assert "at most 128" in unavailable(F32, 256, DEVICE)
    assert "float64" in unavailable(torch.float64, 64, DEVICE)
    with pytest.raises(TypeError, match="float64"):
        run(layout, pool, q.double(), k, v, cut_of(q, pool))
    if not ON_DEVICE:
        with pytest.raises(TypeError, match="bfloat16 wrongly"):
            kv_write.kv_write(k.to(BF16), v, layout.slots, pool.arena[0, 0], pool.arena[0, 1])


# -- the work list ---------------------------------------------------------------------------------


def siblings(count, shared, own=5):
    """The layout of `count` decoding siblings below a prompt of `shared` tokens."""
    tree = SegmentTree()
    prompt = tree.add(range(shared))
    tree.commit(tree.plan([prompt], 10_000))
    leaves = [tree.fork(prompt, shared) for _ in range(count)]
    for _ in range(own):
        tree.commit(tree.plan(leaves, 0))
        for leaf in leaves:
            tree.extend(leaf, [1])
    return tree.plan(leaves, 0)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("group", [1, 3, 4])
def test_bytes_of_a_shared_prefix_do_not_depend_on_the_siblings(group, deterministic):
    """Once for as many siblings as a tile holds; then once per tile. What siblings read of their own comes on top."""
    shared, own, processors = 3000, 5, 132
    cut = Cut(group, 8, (64, 16), processors, deterministic)

    def keys(count):
        return work_of(siblings(count, shared, own), cut).keys_read()

    rows = 64 // group
    for count in (1, 2, rows // 2, rows):
        # The root keeps all but the prompt's last token, which each fork runs again.
        assert keys(count) == shared - 1 + count * (own + 1)
    assert keys(rows + 1) == 2 * (shared - 1) + (rows + 1) * (own + 1)
    one, many = (
        attend.traffic(work_of(siblings(n, shared, own), cut), 8 * group, 8, 64) for n in (1, rows)
    )
    ratio = many[0] / one[0]
    assert ratio < 2.5 < rows / 4 * 2  # the rest: q, partials and own keys of each sibling


@pytest.mark.parametrize("seed", range(12))
def test_every_key_is_counted_once_in_path_order(seed):
    """Random reads, ragged limits with zeros, a range of rows: a row's entries are its keys, root first, split by split."""
    rng = np.random.default_rng(seed)
    rows = int(rng.integers(1, 60))
    reads, limits, segments, first = [], [], [], 0
    for s in range(int(rng.integers(0, 9))):
        a = int(rng.integers(0, rows))
        b = int(rng.integers(a, rows + 1))
        some = rng.integers(0, 1500, b - a) * rng.integers(0, 2, b - a)
        reads.append((s, a, b, len(limits)))
        limits += some.tolist()
        segments.append((first, 1500))
        first += 94
    reads = torch.tensor(reads, dtype=torch.int64).view(-1, 4)
    segments = torch.tensor(segments, dtype=torch.int64).view(-1, 2)
    limits = torch.tensor(limits, dtype=torch.int64)
    low = int(rng.integers(0, rows))
    high = int(rng.integers(low + 1, rows + 1))
    cut = Cut(int(rng.choice([1, 3, 20, 70])), 2, (64, 16), 4, bool(seed % 2))
    extra = torch.tensor([0, high - low - 1])
    got = work(segments, reads, limits, (low, high), cut, extra)
    assert len(got.starts) == high - low + 1 and got.starts[-1] == len(got.entries)

    owner = {}  # partial → (segment, start, end, row)
    for item in torch.cat([got.tall, got.low]).tolist():
        begin, start, full, end, row, count, limit0, partial = item
        assert count > 0 and start <= full <= end <= start + got.split and start % 256 == 0
        own = got.limits[limit0 : limit0 + count]
        assert own.max() >= end and (own[own > start] >= full).all()
        for i in range(count):
            assert partial + i not in owner
            owner[partial + i] = (begin // 94, start, min(end, int(own[i])), row + i)
    assert sorted(owner) == list(range(got.partials - len(extra)))
    for row in range(high - low):
        want = []
        for s, a, b, at in reads.tolist():
            n = int(limits[at + row + low - a]) if a <= row + low < b else 0
            want += [(s, i, min(i + got.split, n), row) for i in range(0, n, got.split)]
        mine = got.entries[got.starts[row] : got.starts[row + 1]].tolist()
        tail = [got.partials - 2 + i for i in range(2) if extra[i] == row]
        assert mine[len(mine) - len(tail) :] == tail
        assert [owner[p] for p in mine[: len(mine) - len(tail)]] == want


def test_few_rows_are_split_further_to_fill_the_device():
    layout = siblings(4, 4000)
    few, many = (work_of(layout, Cut(3, 3, (64, 16), p, False)) for p in (1, 132))
    assert few.split == 2048 and many.split == 256
    assert few.keys_read() == many.keys_read()


def test_formulas():
    layout = siblings(4, 100, own=1)
    what = work_of(layout, Cut(3, 2, (64, 16), 1, False))
    keys, partials = 99 + 4 * 2, 8
    assert what.partials == partials
    moved, flop = attend.traffic(what, 6, 2, 64)
    assert moved == 2 * keys * 2 * 64 * 2 + partials * 6 * (64 * 6 + 4)
    assert flop == 4 * (99 * 4 + 4 * 2) * 6 * 64
    assert attend_merge.traffic(4, 8, 6, 64) == (8 * (4 * 6 * 65 + 8) + 4 * (768 + 16), 4 * 8 * 384)
    assert kv_write.traffic(10, 2, 64) == (4 * 10 * 128 * 2 + 80, 0)
