"""The native matrix kernels against float64 on the same inputs, for every instruction set that this machine has."""

import math
import re
from functools import partial
from pathlib import Path

import pytest
import torch

from appo._kernels.common import native
from appo._kernels.common.stats import EMPTY, LN2, Stats, finish
from appo._kernels.linear_logprob import backend_cpu as linear_cpu
from appo._kernels.linear_logprob import backend_torch as linear_torch
from appo._kernels.linear_logprob.blocks import LinearCall, Upstream

torch.set_num_threads(1)

BEST = linear_cpu.isa()
SETS = {None: [], "avx2": ["avx2"], "avx512": ["avx2", "avx512"]}.get(
    BEST, ["avx2", "avx512", "avx512_bf16"]
)
pytestmark = pytest.mark.skipif(BEST is None, reason="the native matrix kernels do not run here")

bf16, f16, f32 = torch.bfloat16, torch.float16, torch.float32
# Instruction sets and the dtypes of h and w. bf16 products need bf16 on both sides.
KINDS = [
    *((isa, (bf16, bf16)) for isa in SETS),
    *((isa, (f32, f32)) for isa in SETS if isa != "avx512_bf16"),
    *((isa, (f16, f16)) for isa in SETS if isa != "avx512_bf16"),
    *((isa, (bf16, f32)) for isa in SETS if isa == "avx2"),
]
each_kind = pytest.mark.parametrize(("isa", "dtypes"), KINDS)
each_set = pytest.mark.parametrize("isa", SETS)
SHAPES = [  # T, H, V
    (1, 1, 1),
    (1, 64, 17),
    (3, 63, 65),
    (127, 64, 255),
    (129, 72, 1000),
    (1000, 64, 1100),
    (129, 896, 513),
    (5, 66, 9001),
]


def problem(t, hidden, vocab, dtypes=(bf16, bf16), *, n=None, seed=0, spread=3.0, **kwargs):
    """A call with a temperature per target; targets include both ends and one outside this slice."""
    g = torch.Generator().manual_seed(seed)
    n = n or t
    h = torch.randn(t, hidden, generator=g).to(dtypes[0])
    w = (torch.randn(vocab, hidden, generator=g) * (spread / math.sqrt(hidden))).to(dtypes[1])
    column = torch.randint(vocab, (n,), generator=g)
    if n > 3:
        column[:3] = torch.tensor([0, vocab - 1, vocab])
    return LinearCall(h, w, column, None, torch.logspace(-0.7, 0.3, n), **kwargs)


def exact(call):
    """The same numbers in float64."""
    return call._replace(h=call.h.double(), w=call.w.double(), scale=call.scale.double())


def stats(call, **kwargs):
    return Stats(*linear_cpu.partial_stats(call, threads=1, **kwargs))


def upstream(call, merged, factors=(1.0, 0.3, -0.1), seed=1):
    """`Upstream` for random gradients of logp, entropy and lse, times `factors`, in the dtype of the statistics."""
    g = torch.Generator().manual_seed(seed)
    n, dtype = call.scale.shape[0], call.scale.dtype
    d_logp, d_entropy, d_lse = (f * torch.randn(n, generator=g).to(dtype) for f in factors)
    entropy = finish(merged)[1].to(dtype)
    plogp_factor = d_entropy * LN2 if factors[1] else None
    return Upstream(
        merged.m, torch.log2(merged.s), d_lse - d_logp - d_entropy * entropy, plogp_factor, d_logp
    )


def gradients(call, *, factors=(1.0, 0.3, -0.1), need=(True, True, True), threads=1, **kwargs):
    up = upstream(call, stats(call, **kwargs), factors)
    return linear_cpu.gradients(call, up, *need, call.h.dtype, threads=threads, **kwargs)


def exact_gradients(call, factors=(1.0, 0.3, -0.1)):
    call = exact(call)
    up = upstream(call, Stats(*linear_torch.partial_stats(call)), factors)
    return linear_torch.gradients(call, up, True, True, True, torch.float64)


def assert_stats(call, got, logp=1e-5, entropy=5e-5):
    want = Stats(*linear_torch.partial_stats(exact(call)))
    for a, b, bound in zip(finish(got), finish(want), (logp, entropy, logp)):
        assert (a.double() - b).abs().max() <= bound
    assert (got.z.double() - want.z).abs().max() <= 2 * logp
    assert bool((finish(got)[1] >= 0).all()), "negative entropy"
    here = (call.column >= 0) & (call.column < call.w.shape[0])
    assert bool((finish(got)[0][here] <= 0).all()), "logp above 0"


def assert_gradients(call, got, want):
    """By norm; below 1 absolutely, because p_factor = d_lse - d_logp - d_entropy·H has cancelled before it is handed over."""
    bound = {f32: 2e-6, f16: 5e-4, bf16: 3e-3}
    for a, b, dtype in zip(got[:2], want[:2], (call.h.dtype, call.w.dtype)):
        assert a.dtype == dtype
        assert (a.double() - b).norm() <= bound[dtype] * b.norm().clamp(min=1.0)
    if got[2] is not None:
        assert (got[2].double() - want[2]).norm() <= 1e-5 * want[2].norm().clamp(min=1.0)


@each_kind
@pytest.mark.parametrize(("t", "hidden", "vocab"), SHAPES)
def test_values_and_gradients(isa, dtypes, t, hidden, vocab):
    call = problem(t, hidden, vocab, dtypes)
    assert_stats(call, stats(call, isa=isa))
    assert_gradients(call, gradients(call, isa=isa), exact_gradients(call))


@each_set
def test_shared_rows_and_softcap(isa):
    """Rows used several times, in any order, some never; logits that the cap bends."""
    call = problem(40, 64, 700, n=131, softcap=2.0)
    rows = torch.randint(39, (131,), generator=torch.Generator().manual_seed(2))
    call = call._replace(rows=rows)
    assert_stats(call, stats(call, isa=isa))
    got = gradients(call, isa=isa)
    assert_gradients(call, got, exact_gradients(call))
    assert torch.count_nonzero(got[0][39]) == 0
    assert int((got[0].abs().sum(1) > 0).sum()) == rows.unique().numel()


@each_set
def test_softcap_is_exact_near_zero_and_far_out(isa):
    x = torch.cat([torch.linspace(-1, 1, 501), torch.logspace(-6, 3, 200)])
    call = LinearCall(
        torch.ones(1, 1), x[:, None], torch.arange(1), None, torch.ones(1), softcap=1.0
    )
    for i in (0, 250, 500, 600, 700):
        z = stats(call._replace(column=torch.tensor([i])), isa=isa_for_float(isa)).z
        want = math.tanh(float(x[i])) / LN2
        assert z.item() == pytest.approx(want, rel=5e-7, abs=1e-12)


def isa_for_float(isa):
    return "avx512" if isa == "avx512_bf16" else isa


@pytest.mark.parametrize("dtype", [bf16, f32])
@pytest.mark.parametrize("factors", [(1, 0, 0), (0, 1, 0), (0, 0, 1)])
def test_each_upstream_alone(dtype, factors):
    call = problem(50, 96, 1200, (dtype, dtype))
    got, want = gradients(call, factors=factors), exact_gradients(call, factors)
    assert want[0].norm() > 0.1
    assert_gradients(call, got, want)


def test_only_what_is_needed():
    call = problem(30, 64, 600)
    everything = gradients(call)
    for i in range(3):
        need = [j == i for j in range(3)]
        got = gradients(call, need=need)
        assert [x is not None for x in got] == need
        assert torch.equal(got[i], everything[i])


@each_set
@pytest.mark.parametrize("layout", ["transposed", "every other column", "slice of rows"])
def test_strides(isa, layout):
    plain = problem(50, 65, 300)
    make = {
        "transposed": lambda x: x.T.contiguous().T,
        "every other column": lambda x: torch.stack([x, torch.full_like(x, 7)], 2)[:, :, 0],
        "slice of rows": lambda x: torch.cat([x, x], 1)[:, : x.shape[1]],
    }[layout]
    call = plain._replace(h=make(plain.h), w=make(plain.w))
    assert call.h.stride() != plain.h.stride()
    assert all(torch.equal(a, b) for a, b in zip(stats(call, isa=isa), stats(plain, isa=isa)))
    both = zip(gradients(call, isa=isa), gradients(plain, isa=isa))
    assert all(torch.equal(a, b) for a, b in both)


@each_set
@pytest.mark.parametrize("shape", [(300, 72, 2100), (7, 1024, 5000)])
def test_same_bits_for_any_number_of_threads(isa, shape):
    call = problem(*shape)
    results = []
    for threads in (1, 2, 3):
        out = linear_cpu.partial_stats(call, isa=isa, threads=threads)
        results.append([out, *gradients(call, isa=isa, threads=threads)])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


@each_set
def test_a_token_does_not_depend_on_its_batch(isa):
    call = problem(200, 72, 1300)
    everything, grads = stats(call, isa=isa), gradients(call, isa=isa)
    for at in ([0], [57], [199, 3], list(range(100, 200))):
        at = torch.tensor(at)
        some = call._replace(h=call.h[at], column=call.column[at], scale=call.scale[at])
        up = upstream(call, everything)
        up = Upstream(*(x[at] for x in up))
        got = linear_cpu.gradients(some, up, True, False, True, bf16, isa=isa, threads=1)
        assert all(torch.equal(a, b[at]) for a, b in zip(stats(some, isa=isa), everything))
        assert torch.equal(got[0], grads[0][at])
        assert torch.equal(got[2], grads[2][at])
        again = call._replace(rows=at, column=call.column[at], scale=call.scale[at])
        assert all(torch.equal(a, b[at]) for a, b in zip(stats(again, isa=isa), everything))


@each_set
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_one_bad_row_stays_alone(isa, value):
    """NaN and +inf make their own row NaN; a logit of -inf leaves the support without a trace."""
    clean = problem(50, 64, 1000)
    h, w = clean.h.clone(), clean.w.clone()
    h[:, 0], w[:, 0] = 0, 0
    w[123, 0] = 1.0
    clean = clean._replace(h=h.clone(), w=w, column=torch.arange(50))
    h[17, 0] = value
    call = clean._replace(h=h)
    got, want = finish(stats(call, isa=isa)), finish(stats(clean, isa=isa))
    others = torch.arange(50) != 17
    # 0 · inf is NaN in every other product of the row, so -inf is tested through the weights below.
    assert all(bool(x[17].isnan()) for x in got)
    assert all(torch.equal(a[others], b[others]) for a, b in zip(got, want))


@each_set
def test_minus_infinity_is_outside_the_support(isa):
    clean = problem(20, 64, 600)
    h, w = clean.h.clone(), clean.w.clone()
    h[:, 0] = 1.0
    w[:, 0] = 0.0
    gone = torch.tensor([0, 5, 17, 300, 599])
    kept = torch.tensor([i for i in range(600) if i not in gone.tolist()])
    w[gone] = 0.0
    w[gone, 0] = -1e38
    column = kept[torch.arange(20)]
    call = clean._replace(h=h, w=w, column=column, scale=torch.full((20,), 10.0))
    rest = call._replace(w=w[kept], column=torch.arange(20))
    assert_stats(rest, stats(rest, isa=isa), 1e-4, 1e-4)
    for a, b in zip(finish(stats(call, isa=isa)), finish(stats(rest, isa=isa))):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-5)
    up = upstream(call, stats(call, isa=isa))
    assert up.m.min() > EMPTY
    _, dw, d_scale = linear_cpu.gradients(call, up, False, True, True, bf16, isa=isa, threads=1)
    assert torch.count_nonzero(dw[gone]) == 0
    assert bool(dw.isfinite().all() and d_scale.isfinite().all())
    nothing = call._replace(w=w[gone])
    assert bool((stats(nothing, isa=isa).m == EMPTY).all())
    assert bool((stats(nothing, isa=isa).s == len(gone)).all())


def test_target_of_a_likely_token():
    """p near 1: the gradient of the target is p - 1, not the rounding of p."""
    for dtype in (bf16, f32):
        call = LinearCall(
            torch.tensor([[8.0, 0.0]], dtype=dtype),
            torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, -1.0]], dtype=dtype),
            torch.tensor([0]),
            None,
            torch.ones(1),
        )
        s = stats(call)
        up = Upstream(s.m, torch.log2(s.s), -torch.ones(1), None, torch.ones(1))
        dh, _, _ = linear_cpu.gradients(call, up, True, False, False, f32)
        p = 1 / (1 + 2 * math.exp(-8))
        assert dh[0, 0].item() == pytest.approx(1 - p, rel=4e-3 if dtype == bf16 else 1e-4)


@pytest.mark.parametrize("shift", [-300.0, 300.0])
def test_shifted_logits(shift):
    """A constant added to every logit changes nothing but lse."""
    plain = problem(30, 64, 1000, (f32, f32))
    h = torch.cat([plain.h, torch.ones(30, 1)], 1)
    w = torch.cat([plain.w, torch.full((1000, 1), shift)], 1)
    call = plain._replace(h=h, w=w, scale=torch.ones(30))
    assert_stats(call, stats(call), logp=3e-4, entropy=3e-4)


@each_set
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0, 1.1])
def test_kept_probabilities(isa, share):
    """Whatever fits in `prob_cache`, the statistics do not change, and gradients stay within their bounds for 16-bit inputs."""
    call = problem(40, 72, 2600, n=131)
    call = call._replace(rows=torch.randint(39, (131,), generator=torch.Generator().manual_seed(2)))
    prob_cache = torch.full(
        (int(share * linear_cpu.cache_bytes(131, 2600)),), 255, dtype=torch.uint8
    )
    merged = stats(call, isa=isa, prob_cache=prob_cache)
    assert all(torch.equal(a, b) for a, b in zip(merged, stats(call, isa=isa)))
    up = upstream(call, merged)
    run = partial(
        linear_cpu.gradients, call, up, True, True, True, f32, isa=isa, prob_cache=prob_cache
    )
    got, recomputed = run(threads=1), gradients(call, isa=isa)
    want = exact_gradients(call)
    assert all(torch.equal(a, b) for a, b in zip(got, run(threads=3)))
    for a, b, bound in zip(got, want, (2e-3, 3e-3, 1e-4)):
        assert (a.double() - b).norm() <= bound * b.norm()
    assert torch.equal(got[1], recomputed[1]) == (share == 0.0)


def test_kept_target_of_a_likely_token():
    """Of the target the exact p counts: p - 1 must not be the rounding of p to 11 bits."""
    h, w = (
        torch.tensor([[9.0, 0.0]]).bfloat16(),
        torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, -1.0]]),
    )
    call = LinearCall(h, w.bfloat16(), torch.tensor([0]), None, torch.ones(1))
    prob_cache = torch.empty(linear_cpu.cache_bytes(1, 3), dtype=torch.uint8)
    s = stats(call, prob_cache=prob_cache)
    up = Upstream(s.m, torch.log2(s.s), -torch.ones(1), None, torch.ones(1))
    dh, _, _ = linear_cpu.gradients(call, up, True, False, False, f32, prob_cache=prob_cache)
    p = 1 / (1 + 2 * math.exp(-9))
    assert dh[0, 0].item() == pytest.approx(1 - p, rel=4e-3)


@pytest.mark.parametrize(("dtype", "softcap"), [(f32, None), (bf16, 2.0)])
def test_nothing_is_kept_where_it_does_not_serve(dtype, softcap):
    """Float32 inputs, for which 11 bits are too few, and capped logits, whose slope needs the logit itself."""
    call = problem(20, 64, 600, (dtype, dtype), softcap=softcap)
    prob_cache = torch.full((linear_cpu.cache_bytes(20, 600),), 255, dtype=torch.uint8)
    up = upstream(call, stats(call, prob_cache=prob_cache))
    got = linear_cpu.gradients(call, up, True, True, True, dtype, prob_cache=prob_cache, threads=1)
    assert bool((prob_cache == 255).all())
    assert all(torch.equal(a, b) for a, b in zip(got, gradients(call)))


def test_changed_weights_are_noticed():
    """Nothing is kept between calls, so an update behind autograd's back counts."""
    call = problem(10, 64, 300)
    before = stats(call)
    call.w.data.mul_(0.5)
    after = stats(call)
    assert not torch.equal(before.s, after.s)
    assert_stats(call, after)


@pytest.mark.parametrize("dtype", [bf16, f32])
def test_large_dh_is_summed_in_halves(monkeypatch, dtype):
    """Above a size a bf16 dh is summed in two halves: the same bits as with a float32 sum."""
    call = problem(70, 72, 2600, (dtype, dtype))._replace(rows=torch.arange(69, -1, -1))
    want = gradients(call)
    monkeypatch.setattr(linear_cpu, "_WIDE_SUMS", 0)
    assert all(torch.equal(a, b) for a, b in zip(gradients(call), want))


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
def test_memory():
    """Resident memory at its peak, results left out, against what the docstrings promise."""
    call = problem(20_000, 64, 2000)
    n, stats_bytes = 20_000, 20_000 * (256 + 16) + (4 << 20)
    merged = stats(call)
    up = upstream(call, merged)
    run = partial(linear_cpu.gradients, call, up, True, True, True, bf16, threads=1)
    assert extra_bytes(lambda: stats(call)) < stats_bytes
    results = 2 * call.h.numel() + 2 * call.w.numel() + 4 * n
    assert extra_bytes(run) < results + 4 * call.h.numel() + 12 * n + (20 << 20)
    assert 4 * n * 2000 > 2 * (results + (20 << 20))  # far below a logit matrix


def extra_bytes(run):
    def resident(field):
        line = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
        return int(line[1]) * 1024

    Path("/proc/self/clear_refs").write_text("5")  # the peak restarts from here
    before = resident("VmRSS")
    out = run()
    extra = resident("VmHWM") - before
    del out
    return extra


def test_what_it_runs():
    call = problem(2, 8, 9)
    assert linear_cpu.supports(call)
    assert not linear_cpu.supports(exact(call))
    with pytest.raises(TypeError, match="h must be float32, bfloat16 or float16"):
        linear_cpu.partial_stats(exact(call)._replace(scale=call.scale))
    with pytest.raises(ValueError, match="isa is 'sse', expected avx512_bf16, avx512 or avx2"):
        linear_cpu.partial_stats(call, isa="sse")
    with pytest.raises(ValueError, match="needs bfloat16 h and w"):
        linear_cpu.partial_stats(problem(2, 8, 9, (f32, bf16)), isa="avx512_bf16")
    with pytest.raises(ValueError, match=r"rows\[1\] is 5, expected 0 … 1"):
        linear_cpu.partial_stats(call._replace(rows=torch.tensor([0, 5])))
    with pytest.raises(ValueError, match=r"h is \[2, 8\] and w is \[9, 7\]"):
        linear_cpu.partial_stats(call._replace(w=call.w[:, :7]))


def test_without_the_library(monkeypatch):
    monkeypatch.setattr(native, "load", lambda: (None, "not built"))
    assert linear_cpu.isa() is None
    with pytest.raises(RuntimeError, match="backend='cpu' needs the native library. not built"):
        linear_cpu.partial_stats(problem(2, 8, 9))
