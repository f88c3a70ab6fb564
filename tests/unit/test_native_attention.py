"""Native attention over segments: against float64 on random trees, and the same bits however the rows are grouped."""

import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from tiny_models import VOCAB, build, finish

from appo.kernels import native
from appo.rollout.engine import SamplingParams
from appo.rollout.native import NativeEngine, segments
from appo.rollout.native.batch import Batch, Unit
from appo.rollout.native.segments import Plan, attend_segments

CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(
    not segments.available(torch.float32, 64, CPU), reason="no native attention here"
)
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
ISA = native.function("linear_isa")() if native.function("linear_isa") else ""
LAYERS, LAYER = 2, 1  # attended on the second layer, so that a wrong layer stride shows
COUNTS = (0, 1, 63, 64, 65, 127, 128, 129, 300, 1000)


@dataclass
class Tree:
    """Rows 0 … M-1, depth first; row i reads the first count of each (segment, count) of paths[i], root first."""

    kv: list[torch.Tensor]  # [L, 2, Hkv, capacity, D], NaN beyond what somebody reads
    paths: list[list[tuple[int, int]]]
    q: torch.Tensor

    @property
    def kv_heads(self) -> int:
        return self.kv[0].shape[2]


def grow(
    seed: int, dtype: torch.dtype, dim: int, group: int, kv_heads: int = 2, depth: int = 4
) -> Tree:
    """A random tree: several children per node, each inheriting another count of it; rows at nodes of every depth."""
    rng = np.random.default_rng(seed)
    generator = torch.Generator().manual_seed(seed)
    capacities: list[int] = []
    read: list[int] = []
    paths: list[list[tuple[int, int]]] = []

    def node(path: list[tuple[int, int]], level: int) -> None:
        segment = len(capacities)
        capacities.append(int(rng.choice(COUNTS[1:])))
        read.append(0)

        def count() -> int:
            n = min(int(rng.choice(COUNTS)), capacities[segment])
            read[segment] = max(read[segment], n)
            return n

        if level == 0:
            first = count()
            paths.extend(
                [*path, (segment, n)] for n in range(first, min(first + 3, capacities[segment] + 1))
            )
            read[segment] = max(read[segment], paths[-1][-1][1])
            return
        paths.append([*path, (segment, count())])
        for _ in range(rng.integers(2, 4)):
            node([*path, (segment, count())], level - 1)

    node([], depth - 1)
    kv = []
    for capacity, n in zip(capacities, read, strict=True):
        whole = torch.full((LAYERS, 2, kv_heads, capacity + 5, dim), torch.nan)
        whole[:, :, :, :n] = torch.randn(LAYERS, 2, kv_heads, n, dim, generator=generator)
        kv.append(whole.to(dtype)[:, :, :, :capacity])  # poison lies behind the capacity too
    q = torch.randn(len(paths), kv_heads * group, dim, generator=generator)
    return Tree(kv, paths, 2 * q.to(dtype))


def grouped(tree: Tree, rows: range | None = None) -> segments.Frozen:
    """One read per segment, over the rows `rows` (numbered from 0 in the call)."""
    plan = Plan()
    numbers = [plan.segment(kv) for kv in tree.kv]
    chosen = [tree.paths[i] for i in rows or range(len(tree.paths))]
    for level in range(max(map(len, chosen))):
        for number in numbers:
            limits = [
                p[level][1] if level < len(p) and p[level][0] == number else 0 for p in chosen
            ]
            if any(limits):
                first = next(i for i, n in enumerate(limits) if n)
                plan.read(number, first, limits[first:])
    return plan.freeze()


def flat(tree: Tree) -> segments.Frozen:
    """Every row reads for itself."""
    plan = Plan()
    for row, path in enumerate(tree.paths):
        for segment, count in path:
            plan.read(plan.segment(tree.kv[segment]), row, [count])
    return plan.freeze()


def run(tree: Tree, plan: segments.Frozen, q: torch.Tensor | None = None, **how) -> torch.Tensor:
    q = tree.q if q is None else q
    none = torch.zeros(len(q), tree.kv_heads, q.shape[2], dtype=q.dtype)
    out = torch.full_like(q, torch.nan)
    attend_segments(q, none, none, plan, LAYER, out, **{"threads": 1, **how})
    return out


def exact(tree: Tree, row: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(output, Σ p |v|) of a row [Hq, D] in float64: attention over the concatenated path."""
    group = tree.q.shape[1] // tree.kv_heads
    parts = [tree.kv[s][LAYER, :, :, :n].double() for s, n in tree.paths[row]]
    k, v = torch.cat(parts, dim=2).repeat_interleave(group, dim=1)
    if not k.shape[1]:
        return (torch.zeros_like(tree.q[row], dtype=torch.float64),) * 2
    scores = torch.einsum("hd,hnd->hn", tree.q[row].double(), k) / math.sqrt(tree.q.shape[2])
    p = scores.softmax(-1)
    return torch.einsum("hn,hnd->hd", p, v), torch.einsum("hn,hnd->hd", p, v.abs())


def check(tree: Tree, out: torch.Tensor, per_unit: float) -> None:
    for row in range(len(tree.paths)):
        want, size = exact(tree, row)
        error = (out[row].double() - want).abs()
        assert (error <= per_unit * (size + want.abs())).all(), (row, tree.paths[row], error.max())


# Half a unit in the last place of the weights, the same of their sum, and of the result.
BOUNDS = {F32: 1e-5, BF16: 2**-8, F16: 2**-10}


@pytest.mark.parametrize("group", [1, 3, 8])
@pytest.mark.parametrize("dim", [7, 16, 64, 80, 128])
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
def test_random_trees_against_float64(dtype, dim, group):
    tree = grow(seed=dim + group, dtype=dtype, dim=dim, group=group)
    assert max(map(len, tree.paths)) >= 3 and len(tree.paths) > 8
    check(tree, run(tree, grouped(tree)), BOUNDS[dtype])


@pytest.mark.parametrize("isa", ["avx2", "avx512"])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_every_instruction_set(isa, dtype):
    if isa == "avx512" and not ISA.startswith("avx512"):
        pytest.skip("this machine has no AVX-512")
    tree = grow(seed=7, dtype=dtype, dim=64, group=3)
    check(tree, run(tree, grouped(tree), isa=isa), BOUNDS[dtype])
    assert torch.equal(run(tree, grouped(tree), isa=isa), run(tree, flat(tree), isa=isa))


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("dim,group", [(8, 2), (16, 3), (64, 3), (64, 1), (128, 8)])
def test_bits_do_not_depend_on_who_else_reads(dtype, dim, group):
    tree = grow(seed=11 * dim + group, dtype=dtype, dim=dim, group=group)
    plan = grouped(tree)
    whole = run(tree, plan)
    assert torch.equal(whole, run(tree, flat(tree)))
    for tile_rows in (1, group, 2 * group + 1, 1000):
        assert torch.equal(whole, run(tree, plan, tile_rows=tile_rows))
    for rows in (range(0, 1), range(3, 4), range(2, len(whole)), range(1, len(whole) - 1, 2)):
        assert torch.equal(whole[rows], run(tree, grouped(tree, rows), tree.q[rows].contiguous()))


def test_bits_do_not_depend_on_threads():
    tree = grow(seed=3, dtype=BF16, dim=128, group=8, depth=5)
    plan = grouped(tree)
    work = 2 * int(plan.limits.sum()) * tree.q[0].numel()
    assert work > 5e7  # enough for several threads to be started
    first = run(tree, plan)
    for threads in (2, 3, 5):
        for tile_rows in (0, 8):
            assert torch.equal(first, run(tree, plan, threads=threads, tile_rows=tile_rows))


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_a_row_does_not_read_cannot_reach_it(dtype, bad):
    """Causal rows over two blocks; one key and value in the middle is not a number: it reaches the rows from there on."""
    rows, at = 150, 65  # row 64 reads the first half of the word that the bad value completes
    kv = torch.randn(LAYERS, 2, 1, rows, 64).to(dtype)
    q = torch.randn(rows, 3, 64).to(dtype)
    plan = Plan()
    plan.read(plan.segment(kv), 0, range(1, rows + 1))
    tree = Tree([kv], [[(0, i + 1)] for i in range(rows)], q)
    clean = run(tree, plan.freeze())
    check(tree, clean, BOUNDS[dtype])
    kv[LAYER, :, :, at] = bad
    out = run(tree, plan.freeze())
    assert torch.equal(out[:at], clean[:at])
    assert out[at:].isnan().any(-1).all()


def test_large_scores_and_rows_without_keys():
    """Scores far apart from block to block: the largest wins; a row that reads nothing is zero."""
    kv = torch.zeros(LAYERS, 2, 1, 400, 16)
    kv[LAYER, 0, 0, :, 0] = torch.linspace(-1e4, 1e4, 400)
    kv[LAYER, 1, 0] = torch.randn(400, 16)
    q = torch.zeros(3, 1, 16)
    q[:2, 0, 0] = torch.tensor([400.0, -400.0])
    plan = Plan()
    plan.read(plan.segment(kv), 0, [400, 400])
    out = run(Tree([kv], [], q), plan.freeze())
    torch.testing.assert_close(out[0, 0], kv[LAYER, 1, 0, -1], rtol=1e-6, atol=0)
    torch.testing.assert_close(out[1, 0], kv[LAYER, 1, 0, 0], rtol=1e-6, atol=0)
    assert not out[2].any()


def test_rows_are_written_before_they_are_read_and_plans_advance():
    """Two steps by `advance` give the bits of two plans made afresh; strided q, k, v as the model hands them over."""
    rows, kv_heads, dim = 5, 2, 64
    generator = torch.Generator().manual_seed(0)
    shared = torch.randn(LAYERS, 2, kv_heads, 40, dim, generator=generator)
    outs, stores = [], []
    steps = [torch.randn(rows, 10 * dim, generator=generator) for _ in range(2)]

    def plan_of(slab: torch.Tensor, start: int) -> segments.Frozen:
        plan = Plan()
        plan.read(plan.segment(shared), 0, [40, 39, 38, 37, 36])
        growing = []
        for row in range(rows):
            own = plan.segment(slab[:, :, row])
            growing.append(plan.read(own, row, [start + row + 1]))
            plan.write(row, own, start + row)
        return plan.freeze(growing)

    for afresh in (False, True):
        slab = torch.full((LAYERS, 2, rows, kv_heads, 60, dim), torch.nan)
        slab[:, :, :, :, :5] = 0.5
        out = torch.empty(2, rows, 6, dim)
        plan = plan_of(slab, 0)
        for step, x in enumerate(steps):
            if step:
                plan = plan_of(slab, 1) if afresh else plan
                if not afresh:
                    plan.advance()
            qk, v = x[:, : 8 * dim].view(rows, 8, dim), x[:, 8 * dim :].view(rows, 2, dim)
            for layer in range(LAYERS):
                attend_segments(qk[:, :6], qk[:, 6:], v, plan, layer, out[step])
        outs.append(out)
        stores.append(slab)
    assert torch.equal(*outs) and not outs[0].isnan().any()
    torch.testing.assert_close(*stores, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(stores[0][0, 0, 3, :, 4], steps[1].view(rows, 10, dim)[3, 6:8])


def test_misuse_is_an_error_that_says_what_was_expected():
    def call(heads=6, dim=64, limits=(10, 0, 3), row=0, write=None, layer=0, **how) -> None:
        q, k = torch.zeros(3, heads, dim), torch.zeros(3, 2, dim)
        v, out = how.pop("v", k), torch.zeros(3, heads, dim)
        plan = Plan()
        plan.read(plan.segment(torch.zeros(LAYERS, 2, 2, 10, dim)), row, limits)
        if write:
            plan.write(*write)
        attend_segments(how.pop("q", q), how.pop("k", k), v, plan.freeze(), layer, out, **how)

    call()
    k = torch.zeros(3, 2, 64)
    for bad, message in (
        (dict(limits=(11,)), r"limits\[0\] is 11, expected 0 … 10"),
        (dict(limits=(-1,)), r"limits\[0\] is -1"),
        (dict(row=1), r"reads\[0\] is \(0, 1, 4, 0\); there are 1 segments, 3 rows"),
        (dict(write=(0, 0, 10)), r"writes\[0\] is \(0, 0, 10\)"),
        (dict(write=(3, 0, 0)), r"writes\[0\] is \(3, 0, 0\); there are 3 rows"),
        (dict(v=k[:2]), r"v must be \[3, 2, 64\]"),
        (dict(k=k.mT.contiguous().mT), "k must have strides"),
        (dict(k=k.repeat(1, 2, 1)), r"k of shape \(3, 4, 64\)"),
        (dict(k=k.bfloat16()), "torch.bfloat16; the segments have 2 layers"),
        (dict(layer=2), "layer 2 and k"),
        (dict(heads=5), "5 query heads cannot share 2"),
        (dict(dim=257), "head dimension is 257"),
        (dict(isa="avx1024"), "isa is 'avx1024'"),
        (dict(isa="avx512_bf16"), "isa is 'avx512_bf16'"),
        (dict(tile_rows=-1), "tile_rows is -1"),
    ):
        with pytest.raises(ValueError, match=message):
            call(**bad)
    with pytest.raises(TypeError, match="k must have the dtype of q"):
        call(q=torch.zeros(3, 6, 64, dtype=BF16))
    with pytest.raises(TypeError, match="q must be float32"):
        call(q=torch.zeros(3, 6, 64, dtype=torch.float64))
    plan = Plan()
    with pytest.raises(ValueError, match="at least one segment"):
        plan.freeze()
    plan.segment(torch.zeros(LAYERS, 2, 2, 10, 64))
    with pytest.raises(ValueError, match="those before it have"):
        plan.segment(torch.zeros(LAYERS, 2, 1, 10, 64))
    with pytest.raises(ValueError, match=r"expected \[L, 2, Hkv, positions, D\]"):
        plan.segment(torch.zeros(LAYERS, 2, 2, 10, 64).mT)


@pytest.mark.parametrize("dtype,tolerance", [("float32", 2e-5), ("bfloat16", 0.15)])
def test_the_engine_agrees_with_its_pytorch_path(dtype, tolerance, tmp_path):
    """Forks of forks, tool results, a chunked prompt; decoded natively and in PyTorch, both scored by the other."""
    build("qwen3", tmp_path)
    prompt = np.random.default_rng(1).integers(0, VOCAB, 90).tolist()
    for first in (True, False):
        engine = NativeEngine(
            tmp_path, dtype=dtype, max_batch=6, prefill_chunk=32, share_prompts=False
        )
        engine.store.native = first
        root = engine.add_prompt(prompt)
        seqs = [root]
        for generation in range(3):
            seqs += [engine.fork(seq, engine.length(seq) - 2 * generation) for seq in seqs[-2:]]
            engine.append(seqs[-1], [3, 4, 5])
            for seq in seqs:
                engine.submit(seq, SamplingParams(8), seed=seq)
            events = finish(engine)
        engine.store.native = not first
        for seq in seqs:
            scored = engine.score([engine.add_prompt(engine.tokens(seq))])[0]
            n = len(events[seq].logprobs)
            np.testing.assert_allclose(scored.logprobs[-n:], events[seq].logprobs, atol=tolerance)


def test_attention_does_not_depend_on_the_prefill_chunk(tmp_path):
    build("llama", tmp_path)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 8, 8, generator=generator)
    outs = []
    for chunk in (200, 64, 7):
        engine = NativeEngine(tmp_path, dtype="float32")
        node = engine.tree.get(engine.add_prompt([1] * 200))
        engine.store.room(node, 200)
        parts = []
        for start in range(0, 200, chunk):
            stop = min(start + chunk, 200)
            batch = Batch([Unit(node, start, stop - start)], engine.store, 4)
            q, k, v = x[start:stop].split((4, 2, 2), dim=1)
            parts.append(batch.attention(0, q, k, v).clone())
            engine.store.written(node, stop, 0)
        outs.append(torch.cat(parts))
    assert torch.equal(outs[0], outs[1]) and torch.equal(outs[0], outs[2])
