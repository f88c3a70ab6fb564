"""The Triton kernels behind "triton" and "cublas32": tiles, slots and strips of every kind, against the definition in float64.

On a CPU they run in Triton's interpreter, where bfloat16 is wrong: inputs are float32 tensors that hold bfloat16 values.
"""

import math
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton")

from appo._kernels.common.gpu import launch
from appo._kernels.common.gpu.config import (
    DLOGITS,
    PARTIAL,
    SMALL,
    STATS_BYTES,
    UNIT,
    Tile,
    cut,
    gradient_workspace_bytes,
    logit_block,
    logit_workspace_bytes,
    stats_workspace_bytes,
)
from appo._kernels.common.stats import LN2, Stats, column_stats, empty, finish, merge
from appo._kernels.linear_logprob import backend_cublas as linear_cublas
from appo._kernels.linear_logprob import backend_torch as linear_torch
from appo._kernels.linear_logprob import backend_triton as linear_triton
from appo._kernels.linear_logprob.blocks import LinearCall, Upstream
from appo._kernels.linear_logprob.gpu.merge import merge_slots_into
from appo.kernels import linear_logprob_entropy

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings(
    "ignore::RuntimeWarning"
)  # NumPy's, about the infinities that we want

interpreted = pytest.mark.skipif(not launch.interpreted(), reason="needs TRITON_INTERPRET=1")
BACKENDS = {"triton": linear_triton, "cublas32": linear_cublas}
each_backend = pytest.mark.parametrize("backend", BACKENDS.values(), ids=BACKENDS)
TILE = Tile(32, 128, 64, pieces=2, group=2)


def problem(n, hidden, vocab, seed=0, spread=3.0, **more):
    """A call with float32 tensors of bfloat16 values, temperatures 0.5 … 2 per token."""
    g = torch.Generator().manual_seed(seed)
    h = torch.randn(n, hidden, generator=g).bfloat16().float()
    w = (torch.randn(vocab, hidden, generator=g) * (spread / math.sqrt(hidden))).bfloat16().float()
    column = torch.randint(vocab, (n,), generator=g)
    column[0], column[-1] = 0, vocab - 1
    scale = torch.logspace(-0.3, 0.3, n)
    return LinearCall(h, w, column, more.pop("rows", None), scale, **more)


def take(call, index):
    """The call for some of the tokens."""
    return call._replace(h=call.h[index], column=call.column[index], scale=call.scale[index])


def double(call):
    return call._replace(h=call.h.double(), w=call.w.double(), scale=call.scale.double())


def oracle(call):
    return Stats(*linear_torch.partial_stats(double(call)))


def assert_accurate(stats, call, logp=1e-5, entropy=5e-5):
    got, want = finish(Stats(*stats)), finish(oracle(call))
    for x, y, bound in zip(got, want, (logp, entropy, logp)):
        assert x.dtype == torch.float32
        assert (x.double() - y).abs().max() <= bound
    assert bool((got[0] <= 0).all())
    assert bool((got[1] >= 0).all())


def upstream(call, logp=1.0, entropy=1.0, lse=1.0, seed=1):
    """What the public function hands to backward, in float64, for random gradients of the outputs times these factors."""
    g = torch.Generator().manual_seed(seed)
    n, device = call.scale.shape[0], call.scale.device
    d_logp, d_entropy, d_lse = (
        f * torch.randn(n, generator=g).to(device, torch.float64) for f in (logp, entropy, lse)
    )
    stats = oracle(call)
    plogp_factor = d_entropy * LN2 if entropy else None
    return Upstream(
        stats.m, stats.s.log2(), d_lse - d_logp - d_entropy * finish(stats)[1], plogp_factor, d_logp
    )


def single(up):
    return Upstream(*(None if x is None else x.float() for x in up))


def assert_gradients(got, call, up, bound=5e-6):
    want = linear_torch.gradients(double(call), up, True, True, True, torch.float64)
    for a, b in zip(got, want):
        assert a.dtype == torch.float32
        assert (a.double() - b).norm() <= bound * b.norm()


@interpreted
@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize(
    ("n", "hidden", "vocab"),
    [(1, 64, 17), (3, 72, 65), (31, 64, 1000), (33, 64, 1024), (65, 72, 1100), (64, 1, 2049)],
)
def test_statistics(n, hidden, vocab, deterministic):
    call = problem(n, hidden, vocab, deterministic=deterministic)
    assert_accurate(linear_triton.partial_stats(call), call)
    assert_accurate(linear_triton.partial_stats(call, TILE), call)


@interpreted
@pytest.mark.parametrize(
    "tile",
    [
        Tile(32, 256, 64, pieces=1),
        Tile(32, 256, 64, pieces=4, group=1),
        Tile(32, 256, 64, pieces=8, group=3, tma=True),
        Tile(16, 1024, 32, pieces=2, group=64),  # more than there are blocks
    ],
    ids=str,
)
@pytest.mark.parametrize("rows", [False, True])
def test_tiles(tile, rows):
    """Every way to walk the same tiles: pieces of the epilogue, rasters, descriptors, gathered rows."""
    index = torch.randint(70, (70,), generator=torch.Generator().manual_seed(3)) if rows else None
    call = problem(70, 72, 1100, rows=index, softcap=20.0 if rows else None)
    assert_accurate(linear_triton.partial_stats(call, tile), call)
    up = upstream(call)
    got = linear_triton.gradients(call, single(up), True, True, True, torch.float32, tile)
    assert_gradients(got, call, up)


@interpreted
def test_wide_slots_do_not_change_the_result():
    """Statistics of a few wide slots, of one slot per tile, and of canonical units agree to rounding."""
    call = problem(40, 64, 2049)
    want = finish(Stats(*linear_triton.partial_stats(call)))
    for deterministic, tile in [(False, TILE), (False, Tile(64, 1024, 64)), (True, TILE)]:
        some = call._replace(deterministic=deterministic)
        got = finish(Stats(*linear_triton.partial_stats(some, tile)))
        for a, b in zip(got, want):
            torch.testing.assert_close(a, b, rtol=0, atol=4e-6)


@interpreted
def test_bits_do_not_depend_on_the_batch():
    """A token alone, in a part of the batch, permuted, repeated by rows, and in blocks of tokens."""
    call = problem(70, 64, 2049, softcap=30.0)
    tile = Tile(32, 512, 64, group=2)
    full = linear_triton.partial_stats(call, tile)

    def of(index):
        return linear_triton.partial_stats(take(call, index), tile)

    order = torch.randperm(70, generator=torch.Generator().manual_seed(2))
    for index in (order, torch.arange(69, 70), torch.arange(5, 38), torch.tensor([3, 3, 3])):
        assert torch.equal(of(index), full[:, index])
    repeated = call._replace(column=call.column[order], scale=call.scale[order], rows=order)
    assert torch.equal(linear_triton.partial_stats(repeated, tile), full[:, order])


@interpreted
def test_blocks_of_tokens(monkeypatch):
    """A workspace too small for the batch: same bits, in several launches."""
    call = problem(70, 64, 1100)
    full = linear_triton.partial_stats(call, TILE)
    monkeypatch.setattr("appo._kernels.common.gpu.config.STATS_BYTES", 16 * 2 * 32)
    assert cut(70, 1100, TILE, True, 4).tokens == 32
    assert torch.equal(linear_triton.partial_stats(call, TILE), full)


@interpreted
@pytest.mark.parametrize("block", [None, (1000, 1000), (7, 300), (70, 64)])
def test_blocks_of_logits(block):
    call = problem(70, 72, 1100, rows=torch.arange(69, -1, -1), softcap=25.0)
    assert_accurate(linear_cublas.partial_stats(call, block), call)


@interpreted
@each_backend
@pytest.mark.parametrize("output", ["logp", "entropy", "lse", "all"])
def test_gradients(backend, output):
    """Every output alone and all at once; without an entropy gradient the kernel has no `plogp_factor` at all."""
    call = problem(65, 72, 1100, softcap=20.0 if output == "all" else None)
    factors = {name: float(output in (name, "all")) for name in ("logp", "entropy", "lse")}
    up = upstream(call, **factors)
    got = backend.gradients(call, single(up), True, True, True, torch.float32)
    assert_gradients(got, call, up)


@interpreted
@each_backend
def test_gradients_in_strips(backend, monkeypatch):
    """Several strips in both directions, rows that repeat and rows that nobody asks for."""
    monkeypatch.setattr("appo._kernels.common.gpu.config.LOGIT_TOKENS", 20)
    rows = torch.randint(50, (70,), generator=torch.Generator().manual_seed(3))
    call = problem(70, 64, 1100, rows=rows)
    up = upstream(call)
    got = backend.gradients(call, single(up), True, True, True, torch.float32, block=(32, 700))
    assert_gradients(got, call, up)
    unused = torch.ones(70, dtype=torch.bool).index_fill(0, rows, False)
    assert not bool(got[0][unused].any())


@interpreted
@each_backend
def test_only_what_was_asked(backend):
    call = problem(5, 16, 40)
    up = single(upstream(call))
    for need in [(True, False, False), (False, True, False), (False, False, True)]:
        got = backend.gradients(call, up, *need, torch.float32)
        assert [x is not None for x in got] == list(need)


@interpreted
@each_backend
@pytest.mark.parametrize("column", [-1, -5000, 40, 41, 511, 1023, 2**40])
def test_target_in_another_slice(backend, column):
    """Also one that would lie in the part of the last tile beyond the vocabulary."""
    call = problem(3, 16, 40)
    call = call._replace(column=torch.tensor([column, 2, column]))
    stats = backend.partial_stats(call)
    assert stats[3, 0] == 0.0
    assert stats[3, 2] == 0.0
    torch.testing.assert_close(stats.double(), torch.stack(oracle(call)), rtol=1e-5, atol=1e-5)
    up = upstream(call)
    got = backend.gradients(call, single(up), True, True, True, torch.float32)
    assert_gradients(got, call, up)


def overflowing(at, vocab=1100):
    """A call whose logits are ± infinity or NaN (product of two numbers near 1e30) at {(row, column): sign}; 0 is NaN."""
    call = problem(6, 16, vocab)
    h, w = call.h.clone(), call.w.clone()
    h[:, 8:] = 0.0
    for k, ((row, column), sign) in enumerate(at.items(), 8):
        w[:, k] = 0.0
        h[row, k] = 1e30
        w[column, k] = sign * 1e30 if sign else float("nan")
    return call._replace(h=h, w=w)


@interpreted
@each_backend
def test_minus_infinity_is_outside_the_support(backend):
    """Next to the target, in another tile, and as the target itself, which gets a hugely negative logp."""
    call = overflowing({(0, 7): -1, (2, 1050): -1, (4, 9): -1})
    call.column[4] = 9
    got, want = (
        torch.stack(finish(Stats(*x))) for x in (backend.partial_stats(call), oracle(call))
    )
    assert got[0, 4] < -1e29
    torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=5e-5)
    up = upstream(call, lse=0.0)
    dh, _, d_scale = backend.gradients(call, single(up), True, False, True, torch.float32)
    exact = linear_torch.gradients(double(call), up, True, False, True, torch.float64)
    others = [0, 1, 2, 3, 5]
    torch.testing.assert_close(dh[others, :8].double(), exact[0][others, :8], rtol=0, atol=1e-5)
    torch.testing.assert_close(d_scale.double(), exact[2], rtol=1e-5, atol=1e-5)


@interpreted
@each_backend
def test_nothing_but_minus_infinity(backend):
    """A row without any support is uniform over the columns that exist; those past the last one stay out."""
    call = problem(3, 16, 40)
    call.h[1], call.h[:, 8], call.w[:, 8] = 0.0, torch.tensor([0.0, 1e30, 0.0]), -1e30
    logp, entropy, _ = finish(Stats(*backend.partial_stats(call)))
    assert logp[1].item() == pytest.approx(-math.log(40), abs=1e-5)
    assert entropy[1].item() == pytest.approx(math.log(40), abs=1e-5)
    assert_accurate(backend.partial_stats(call)[:, [0, 2]], take(call, [0, 2]))


@interpreted
@each_backend
def test_infinity_and_nan_spoil_their_row_alone(backend):
    call = overflowing({(0, 7): 1, (3, 1050): 1})
    calm = overflowing({(0, 7): -1, (3, 1050): -1})
    got, want = (torch.stack(finish(Stats(*backend.partial_stats(x)))) for x in (call, calm))
    others = [1, 2, 4, 5]
    assert bool(got[:, [0, 3]].isnan().all())
    assert torch.equal(got[:, others], want[:, others])
    h = call.h.clone()
    h[1, 3], h[2, 0] = float("nan"), float("inf")
    got = torch.stack(finish(Stats(*backend.partial_stats(call._replace(h=h)))))
    assert bool(got[:, :4].isnan().all())
    assert torch.equal(got[:, 4:], want[:, 4:])


@interpreted
@each_backend
def test_shifted_peaked_and_uniform_rows(backend):
    """Logits far from zero, one-hot and all equal: nothing cancels, logp ≤ 0 and entropy ≥ 0 exactly."""
    for shift in (-300.0, 300.0):
        call = problem(20, 63, 1100)
        h = torch.cat([call.h, torch.ones(20, 1)], 1)
        w = torch.cat([call.w, torch.full((1100, 1), shift)], 1)
        call = call._replace(h=h, w=w, scale=torch.ones(20))
        assert_accurate(backend.partial_stats(call), call, logp=3e-4)
    h = torch.tensor([[1e4, 0.0], [0.0, 0.0], [0.0, 1e4], [0.0, -1e4]])
    w = torch.zeros(1100, 2)
    w[3, 0], w[:, 1] = 1.0, 1.0
    call = LinearCall(h, w, torch.tensor([3, 5, 1099, 0]), None, torch.ones(4))
    assert_accurate(backend.partial_stats(call), call, logp=2e-3, entropy=1e-5)
    logp, entropy, _ = finish(Stats(*backend.partial_stats(call)))
    assert (logp[0], entropy[0]) == (0.0, 0.0)


@interpreted
@each_backend
def test_layouts_and_dtypes(backend):
    """A transposed head, a view of a longer row, float16, and two dtypes at once."""
    call = problem(33, 64, 300)
    want = finish(Stats(*backend.partial_stats(call)))
    wide = torch.zeros(33, 80)
    wide[:, 3:67] = call.h
    views = [
        call._replace(w=call.w.T.contiguous().T),
        call._replace(h=wide[:, 3:67]),
        call._replace(column=call.column.repeat_interleave(2)[::2]),
    ]
    for view in views:
        for a, b in zip(finish(Stats(*backend.partial_stats(view))), want):
            torch.testing.assert_close(a, b, rtol=0, atol=4e-6)
    for h, w in [(torch.float16, torch.float16), (torch.float32, torch.float16)]:
        some = call._replace(h=call.h.to(h), w=call.w.to(w))
        assert_accurate(backend.partial_stats(some), some)
        up = upstream(some)
        dh, dw, _ = backend.gradients(some, single(up), True, True, True, torch.float32)
        exact = linear_torch.gradients(double(some), up, True, True, True, torch.float64)
        assert dw.dtype == w
        assert (dh.double() - exact[0]).norm() < 1e-5 * exact[0].norm()
        assert (dw.double() - exact[1]).norm() < 5e-4 * exact[1].norm()


@interpreted
@each_backend
def test_public_function_and_autocast(backend):
    """Through autograd, against the definition; autocast rounds nothing behind our back."""
    name = next(k for k, v in BACKENDS.items() if v is backend)
    call = problem(20, 32, 300)
    results = []
    for which in (name, "torch"):
        leaves = [x.clone().requires_grad_() for x in (call.h, call.w, call.scale)]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = linear_logprob_entropy(
                *leaves[:2], call.column, inv_temp=leaves[2], backend=which
            )
            (out.logp.sum() + 0.3 * out.entropy.sum() - 0.1 * out.lse.sum()).backward()
        results.append([*out, *(x.grad for x in leaves)])
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-5)


@interpreted
@pytest.mark.parametrize("slots", [1, 2, 7, 16, 17, 40])
def test_merge_of_slots(slots):
    """merge.py against the PyTorch merge; a slot without any column has weight 0 wherever it stands."""
    g = torch.Generator().manual_seed(slots)
    parts = [
        column_stats(torch.randn(70, 5, generator=g) * 9, torch.full((70,), i))
        for i in range(slots)
    ]
    parts[slots // 2] = empty(70, parts[0].m)
    want = parts[0]
    for part in parts[1:]:
        want = merge(want, part)
    out = torch.empty(4, 70)
    merge_slots_into(out, torch.stack([torch.stack(part) for part in parts]).contiguous())
    torch.testing.assert_close(out, torch.stack(want), rtol=2e-6, atol=2e-6)


@interpreted
@each_backend
def test_what_cannot_run_says_so(backend):
    call = problem(3, 16, 40)
    with pytest.raises(TypeError, match="interpreter computes bfloat16 wrongly"):
        backend.partial_stats(call._replace(h=call.h.bfloat16()))
    with pytest.raises(TypeError, match="float64"):
        backend.partial_stats(double(call))


def test_without_device_and_interpreter():
    """A CPU tensor outside the interpreter is an error that names both ways out."""
    code = """
import os, torch
os.environ.pop("TRITON_INTERPRET", None)
from appo.kernels import linear_logprob_entropy
for name in ("triton", "cublas32"):
    try:
        linear_logprob_entropy(torch.ones(2, 16), torch.ones(3, 16), torch.tensor([0, 1]), backend=name)
    except ValueError as error:
        print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    for name in BACKENDS:
        assert f"backend='{name}' needs a CUDA tensor" in done.stdout, done.stderr
    assert done.stdout.count("TRITON_INTERPRET=1") == 2


def test_without_triton():
    code = """
import sys
sys.modules["triton"] = None
for name in ("triton", "cublas"):
    try:
        __import__(f"appo._kernels.linear_logprob.backend_{name}")
    except ImportError as error:
        print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.count("pip install 'triton>=3.7'") == 2, done.stderr


@pytest.mark.parametrize("tile", [*PARTIAL.values(), *DLOGITS.values(), SMALL], ids=str)
@pytest.mark.parametrize("n", [1, 129, 32_768, 1_000_000])
@pytest.mark.parametrize("vocab", [1, 1024, 1025, 151_936, 262_144])
def test_cuts_cover_the_vocabulary(tile, n, vocab):
    """Every tile is in exactly one slot, every slot has one, and the statistics fit their bound."""
    assert UNIT % tile.columns == 0
    tiles = -(-vocab // tile.columns)
    for deterministic in (True, False):
        some = cut(n, vocab, tile, deterministic, 132)
        assert (some.slots - 1) * some.tiles_per_slot < tiles <= some.slots * some.tiles_per_slot
        assert 1 <= some.tokens <= n
        assert some.workspace_bytes <= max(STATS_BYTES, 16 * some.slots * tile.rows)
        if deterministic:
            assert some.slots == -(-vocab // UNIT)


def test_one_token_uses_the_whole_gpu():
    assert cut(1, 151_936, PARTIAL["sm_90"], False, 132).slots >= 4 * 132
    assert cut(1, 151_936, PARTIAL["sm_90"], True, 132).slots == 149
    assert cut(1_000_000, 151_936, PARTIAL["sm_90"], False, 132).slots < 16


def test_workspaces_are_bounded():
    """The figures of the documentation: 78 MB of statistics, 32 MiB of logits, a strip of 256 MiB."""
    for n in (1, 1000, 32_768, 1_000_000):
        assert stats_workspace_bytes(n, 151_936, "sm_90") <= 149 * 16 * 32_768 < STATS_BYTES
        assert stats_workspace_bytes(n, 151_936, "sm_90", deterministic=False) <= STATS_BYTES
        assert logit_workspace_bytes(n, 151_936) <= 32 << 20
        tokens, columns = logit_block(n, 151_936)
        assert tokens >= 1 <= columns
        frozen = gradient_workspace_bytes(n, 151_936, 4096, need_w=False)
        assert frozen <= (256 << 20) + 16_384 * n


@interpreted
@each_backend
def test_memory_is_what_the_formulas_say(backend):
    """Nothing of the size [N, V] is allocated: the largest tensor of forward and backward is counted."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        bytes = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for x in out if isinstance(out, tuple) else (out,):
                if isinstance(x, torch.Tensor):
                    self.bytes = max(self.bytes, x.untyped_storage().nbytes())
            return out

    n, hidden, vocab = 64, 16, 9000
    call = problem(n, hidden, vocab, deterministic=True)
    up = single(upstream(call))
    given = 4 * vocab * hidden
    with Largest() as seen:
        backend.partial_stats(call)
    own = stats_workspace_bytes(n, vocab, "interpret")
    assert seen.bytes <= max(
        given, own if backend is linear_triton else logit_workspace_bytes(n, vocab)
    )
    with Largest() as seen:
        backend.gradients(call, up, True, True, True, torch.float32)
    strip = gradient_workspace_bytes(n, vocab, hidden, itemsize=4)
    assert seen.bytes <= max(given, strip)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@each_backend
@pytest.mark.parametrize(
    ("n", "hidden", "vocab"), [(1, 4096, 151_936), (4100, 896, 151_936), (40_000, 1024, 32_001)]
)
def test_on_a_device(backend, n, hidden, vocab):
    """bfloat16 at real sizes: accuracy on some rows, bits of a part of the batch, one run like the next."""
    call = problem(n, hidden, vocab)
    call = call._replace(
        h=call.h.bfloat16().cuda(), w=call.w.bfloat16().cuda(),
        column=call.column.cuda(), scale=call.scale.cuda(),
    )  # fmt: skip
    some = torch.arange(0, n, max(1, n // 61), device="cuda")
    part = take(call, some)
    full = backend.partial_stats(call)
    assert_accurate(full[:, some], part)
    assert torch.equal(backend.partial_stats(call), full)
    if backend is linear_triton:
        assert torch.equal(backend.partial_stats(part), full[:, some])

    up = upstream(part)
    want = linear_torch.gradients(double(part), up, True, True, True, torch.float64)
    got = backend.gradients(part, single(up), True, True, True, torch.float32)
    for a, b in zip(got, want):
        assert (a.double() - b).norm() <= 4e-3 * b.norm()
