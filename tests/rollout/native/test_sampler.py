"""Draws: the right distribution, exact logprobs and entropies, the same token from every
implementation, hostile logits.

All seeds are fixed: nothing here can flake. The noise itself is in test_noise.py, the Triton kernel
in test_gpu_sample.py.
"""

import math

import numpy as np
import pytest
import torch
from support.tiny_models import VOCAB, build

from appo._kernels.linear_logprob import backend_cpu as linear_cpu
from appo.errors import EngineError
from appo.rollout.engine import SamplingParams
from appo.rollout.native.model.head import NativeHead
from appo.rollout.native.model.model import Model
from appo.rollout.native.model.weights import read_config, read_tensors
from appo.rollout.native.sampling import definition, native_sample
from appo.rollout.native.sampling.definition import SamplingRows, race
from appo.rollout.native.sampling.noise import key
from appo.rollout.native.sampling.sampler import TokenSampler

torch.set_num_threads(1)
CPU = torch.device("cpu")
ISA = linear_cpu.isa()
needs_native = pytest.mark.skipif(ISA is None, reason="no native library or no AVX2")
bfloat = pytest.param(
    torch.bfloat16, marks=pytest.mark.skipif(ISA != "avx512_bf16", reason="needs AVX512-BF16")
)
BACKENDS = {
    "torch": definition.sample,
    "native": native_sample.sample,
    "native avx2": lambda logits, rows: native_sample.sample(logits, rows, isa="avx2"),
}
backends = pytest.mark.parametrize(
    "backend", [pytest.param(b, marks=() if b == "torch" else needs_native) for b in BACKENDS]
)


def how(n, seed=11, first=0, inv_temp=1.0, greedy=()):
    """Rows with one seed at positions first, first + 1, …"""
    mask = torch.zeros(n, dtype=torch.uint8)
    mask[list(greedy)] = 1
    by = torch.as_tensor(inv_temp, dtype=torch.float32).expand(n).contiguous()
    return SamplingRows(torch.full((n,), seed), torch.arange(first, first + n), by, mask)


def sampled(logits, params, n=1, seed=11):
    sampler = TokenSampler(logits.shape[-1], CPU)
    sampler.rows([params] * n)
    return sampler.sample_logits(logits.expand(n, -1), [seed] * n, range(n))


# -- the distribution ------------------------------------------------------------------------------


def distribution(kind, vocab):
    """Logits [1, V]."""
    generator = torch.Generator().manual_seed(vocab)
    noise = torch.randn(1, vocab, generator=generator)
    if kind == "peaked":  # the likeliest three hold nearly everything
        return 0.5 * noise - 12.0 + torch.tensor([12.0, 11.0, 10.0] + [0.0] * (vocab - 3))
    if kind == "heavy tail":  # p ~ 1 / rank
        return -torch.log(1.0 + torch.randperm(vocab, generator=generator).float())[None]
    return 0.3 * noise  # flat


def chi_square(counts, expected):
    return float(((counts - expected) ** 2 / expected).sum())


@pytest.mark.parametrize(("vocab", "n"), [(7, 10_000), (1000, 10_000), (49_152, 4_000)])
@pytest.mark.parametrize("kind", ["peaked", "flat", "heavy tail"])
@backends
def test_tokens_follow_the_distribution(backend, kind, vocab, n):
    if backend == "torch":
        n //= 10
    logits = distribution(kind, vocab)
    step = max(1, 2_000_000 // vocab)
    tokens = torch.cat(
        [
            BACKENDS[backend](logits.expand(min(step, n - a), -1), how(min(step, n - a), 5, a)).tokens
            for a in range(0, n, step)
        ]
    )  # fmt: skip
    p = torch.softmax(logits[0].double(), -1)
    # At most 40 cells of equal mass along the ids, and as many of ids that have nothing to do with
    # each other.
    for cells in ((p.cumsum(0) * 39.999).long(), torch.arange(vocab) * 7919 % 39):
        mass = torch.zeros(40, dtype=torch.float64).index_add_(0, cells, p)
        used = mass * n > 3
        rare = 1 - mass[used].sum()
        expected = torch.cat((mass[used], rare[None])) * n + 1e-9
        counts = torch.bincount(cells[tokens], minlength=40).double()
        counts = torch.cat((counts[used], n - counts[used].sum()[None]))
        dof = max(int(used.sum()) - 1, 1)
        assert chi_square(counts, expected) < dof + 5 * math.sqrt(2 * dof) + 5


@pytest.mark.parametrize("which", ["next position", "next seed", "both"])
def test_neighbouring_draws_are_independent(which):
    p = torch.tensor([0.3, 0.25, 0.2, 0.1, 0.08, 0.05, 0.02], dtype=torch.float64)
    n, sample = 20_000, BACKENDS["native" if ISA else "torch"]
    logits = p.log().float().expand(n, -1)
    first = sample(logits, how(n, seed=100)).tokens
    second = sample(
        logits, how(n, 100 + (which != "next position"), int(which != "next seed"))
    ).tokens
    table = torch.bincount(first * 7 + second, minlength=49).view(7, 7).double()
    dof = 36  # margins are taken from the table
    expected = table.sum(1, keepdim=True) * table.sum(0, keepdim=True) / n
    assert chi_square(table, expected) < dof + 5 * math.sqrt(2 * dof)


@pytest.mark.parametrize("cut", [dict(), dict(top_k=5), dict(top_p=0.7), dict(top_k=9, top_p=0.8)])
def test_draws_follow_the_distribution_they_report(cut):
    torch.manual_seed(2)
    logits = 1.5 * torch.randn(1, 20)
    n = 2000
    tokens, logp, entropy = sampled(logits, SamplingParams(1, temperature=0.9, **cut), n)
    reported = {t: math.exp(l) for t, l in zip(tokens, logp)}
    p = torch.softmax(logits[0].double() / 0.9, -1)
    keep = torch.ones(20, dtype=torch.bool)
    order = p.argsort(descending=True)
    if "top_k" in cut:
        keep[order[cut["top_k"] :]] = False
    q = torch.where(keep, p, 0.0)
    if "top_p" in cut:
        q = q / q.sum()
        q[order[(q[order].cumsum(0) - q[order]) >= cut["top_p"]]] = 0.0
    q = q / q.sum()
    assert all(abs(reported[t] - q[t].item()) < 1e-6 for t in reported)
    assert abs(entropy[0] + (p * p.log()).sum().item()) < 1e-6  # of the full vocabulary
    counts = torch.bincount(torch.tensor(tokens), minlength=20).double()
    assert counts[q == 0].sum() == 0
    dof = max(int((q > 0).sum()) - 1, 1)
    assert chi_square(counts[q > 0], n * q[q > 0]) < dof + 5 * math.sqrt(2 * dof) + 5


@pytest.mark.parametrize("top_k", [0, 1, 3, 700, 5000])
@pytest.mark.parametrize("top_p", [1.0, 0.999, 0.9, 0.3, 1e-9])
@pytest.mark.parametrize("scale", [0.0, 0.1, 1.0, 30.0])
def test_what_is_kept_against_a_full_sort(top_k, top_p, scale):
    """Ties at the border go to the lowest ids; flat rows need more than the first look at the
    largest.
    """
    x = (scale * torch.randn(3000, generator=torch.Generator().manual_seed(3))).bfloat16().float()
    order = torch.argsort(x, descending=True, stable=True)
    weight = ((x[order].double() - x.max().double()) * 0.7).exp()
    if 0 < top_k < 3000:
        weight[top_k:] = 0.0
    if top_p < 1.0:
        weight[weight.cumsum(0) - weight >= top_p * weight.sum()] = 0.0
    want = order[weight > 0.0].sort().values
    found = definition.kept(x, 0.7, top_k, top_p)
    if scale == 30.0 and top_p == 1.0:
        want = torch.arange(3000) if not 0 < top_k < 3000 else order[:top_k].sort().values
    assert abs(len(found) - len(want)) <= (scale == 0.0)  # p · total may round either way
    assert torch.equal(found[: len(want)], want[: len(found)])


# -- logp and entropy ------------------------------------------------------------------------------


@backends
@pytest.mark.parametrize("vocab", [1, 2, 7, 256, 257, 8191, 49_157])
@pytest.mark.parametrize("scale", [0.0, 1.0, 300.0])
def test_statistics_against_float64(backend, vocab, scale):
    torch.manual_seed(vocab)
    logits = scale * torch.randn(9, vocab) + 100.0
    inv_temp = torch.tensor(1 / 1.3)
    sampled = BACKENDS[backend](logits, how(9, inv_temp=inv_temp))
    exact = torch.log_softmax(logits.double() * inv_temp.double(), -1)
    entropy = -(exact.exp() * exact).sum(-1)
    tolerance = 2e-6 + 3e-7 * scale
    np.testing.assert_allclose(
        sampled.logp, exact.gather(1, sampled.tokens[:, None])[:, 0], atol=tolerance
    )
    np.testing.assert_allclose(sampled.entropy, entropy, atol=tolerance)
    assert sampled.logp.max() <= 0.0 and sampled.entropy.min() >= 0.0
    assert not sampled.entropy.signbit().any()


# -- one token, whoever draws it -------------------------------------------------------------------


@backends
@pytest.mark.parametrize("vocab", [1, 5, 64, 300, 10_007])
def test_the_winner_is_that_of_the_whole_race(backend, vocab):
    """Nothing that could win is ruled out, in rows that rise, fall, are flat, and with temperatures
    at both ends.
    """
    torch.manual_seed(vocab)
    x = torch.randn(40, vocab)
    x[:8] = torch.linspace(0, 90, vocab)  # the best so far is beaten over and over
    x[8:16] = torch.linspace(90, 0, vocab)
    x[16:20] = 0.0
    x[20:24] *= 1e4
    x[24:28, (vocab + 1) // 2 :] = -math.inf
    inv_temp = torch.logspace(-3, 3, 40)[torch.randperm(40)]
    rows = how(40, seed=77, inv_temp=inv_temp)
    ids = torch.arange(vocab)
    values = [race(key(77, t), ids, x[t], float(inv_temp[t])) for t in range(40)]
    want = torch.stack([v.argmin() for v in values])
    assert torch.equal(BACKENDS[backend](x, rows).tokens, want)


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, bfloat])
@pytest.mark.parametrize("rows", [1, 2, 7, 33, 97])
@pytest.mark.parametrize("vocab", [50, 257, 8200])
def test_fused_is_the_draw_from_the_logits(dtype, rows, vocab):
    torch.manual_seed(rows)
    head = NativeHead(vocab, 40, dtype)
    head.pack((0.5 * torch.randn(vocab, 40)).to(dtype))
    hidden = torch.randn(rows, 40)
    settings = how(rows, 9, 3, torch.rand(rows) + 0.4, greedy=range(0, rows, 5))
    for h in (hidden, hidden.to(dtype)):
        logits = head.logits(h)
        fused, apart = head.sample(h, settings), native_sample.sample(logits, settings)
        for name in ("tokens", "logp", "entropy"):
            assert torch.equal(getattr(fused, name), getattr(apart, name)), name
        plain = definition.sample(logits, settings)
        assert torch.equal(fused.tokens, plain.tokens)
        torch.testing.assert_close(fused.logp, plain.logp, atol=3e-6, rtol=0)
        torch.testing.assert_close(fused.entropy, plain.entropy, atol=3e-6, rtol=0)


def row_of(rows, i):
    return SamplingRows(
        *(x[i : i + 1] for x in (rows.seeds, rows.positions, rows.inv_temp, rows.greedy))
    )


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, bfloat])
def test_bits_do_not_depend_on_the_batch_or_the_threads(dtype):
    torch.manual_seed(1)
    vocab, n = 30_011, 50
    weight = (0.3 * torch.randn(vocab, 32)).to(dtype)
    hidden = torch.randn(n, 32)
    settings = how(n, 4, 0, torch.rand(n) + 0.4, greedy=[3, 40])
    found = []
    for threads in (1, 2, 5):
        head = NativeHead(vocab, 32, dtype, threads=threads)
        head.pack(weight)
        found.append(head.sample(hidden, settings))
        found.append(native_sample.sample(head.logits(hidden), settings, threads=threads))
    for i in (0, 3, 17, 49):
        alone = head.sample(hidden[i : i + 1], row_of(settings, i))
        for other in found:
            for name in ("tokens", "logp", "entropy"):
                assert torch.equal(getattr(other, name)[i : i + 1], getattr(alone, name)), name


# -- greedy, hostile -------------------------------------------------------------------------------


@backends
def test_greedy_takes_the_lowest_id_of_equals(backend):
    x = torch.full((4, 3000), -2.0)
    x[0, [17, 18, 2999]] = 5.0
    x[1, 2999] = 5.0
    x[2, 0] = -1.0
    x[3] = torch.randn(3000)
    sampled = BACKENDS[backend](x, how(4, greedy=range(4)))
    assert sampled.tokens.tolist() == [17, 2999, 0, int(x[3].argmax())]
    exact = torch.log_softmax(x.double(), -1).gather(1, sampled.tokens[:, None])[:, 0]
    np.testing.assert_allclose(sampled.logp, exact, atol=1e-6)


@backends
def test_excluded_columns_are_never_drawn(backend):
    x = torch.full((400, 1000), -math.inf)
    x[:, 600:603] = torch.tensor([0.0, -1.0, -1e30])
    sampled = BACKENDS[backend](x, how(400))
    assert set(sampled.tokens.tolist()) == {600, 601}
    p = torch.softmax(torch.tensor([0.0, -1.0]).double(), -1)
    np.testing.assert_allclose(sampled.entropy, float(-(p * p.log()).sum()), atol=1e-6)


@backends
@pytest.mark.parametrize("bad", [math.nan, math.inf, "-inf"])
@pytest.mark.parametrize("at", [0, 256, 999])
@pytest.mark.parametrize("greedy", [False, True])
def test_rows_that_cannot_be_drawn_are_marked_alone(backend, bad, at, greedy):
    x = torch.randn(3, 1000, generator=torch.Generator().manual_seed(0))
    settings = how(3, greedy=[1] if greedy else [])
    want = BACKENDS[backend](x, settings)
    x[1, at] = bad if isinstance(bad, float) else 0.0
    if bad == "-inf":
        x[1] = -math.inf
    sampled = BACKENDS[backend](x, settings)
    assert sampled.tokens[1] == -1
    for i in (0, 2):
        assert sampled.tokens[i] == want.tokens[i] and sampled.entropy[i] == want.entropy[i]


def test_the_error_names_the_sequence():
    sampler = TokenSampler(50, CPU)
    x = torch.randn(3, 50)
    x[1, 7] = math.nan
    params = [SamplingParams(1), SamplingParams(1, top_k=3), SamplingParams(1)]
    sampler.rows(params, seqs=[4, 19, 8])
    with pytest.raises(EngineError, match="sequence 19: its logits at position 101 hold NaN"):
        sampler.sample_logits(x, [0, 0, 0], [100, 101, 102])
    sampler.rows(params)
    with pytest.raises(EngineError, match="row 1"):
        sampler.sample_logits(x, [0, 0, 0], [100, 101, 102])


@needs_native
def test_the_native_draw_refuses_what_it_cannot_read():
    x, rows = torch.zeros(2, 5), how(2)
    with pytest.raises(ValueError, match="inv_temp"):
        native_sample.sample(x, how(2, inv_temp=0.0))
    with pytest.raises(ValueError, match="seeds has 3 items, expected 2"):
        native_sample.sample(x, how(3))
    with pytest.raises(ValueError, match="no columns"):
        native_sample.sample(torch.zeros(2, 0), rows)
    with pytest.raises(ValueError, match="isa is 'sse'"):
        native_sample.sample(x, rows, isa="sse")


# -- the sampler behind a model --------------------------------------------------------------------


@needs_native
@pytest.mark.parametrize("name", ["llama", "qwen2"])  # a head of its own, a tied one
def test_both_runners_draw_the_same_tokens(name, tmp_path):
    """float32: the logits differ by rounding, which moves a race once in 100,000 draws."""
    build(name, tmp_path)
    hidden = torch.randn(13, 32, generator=torch.Generator().manual_seed(8))
    params = [SamplingParams(1, temperature=t) for t in (0.0, 0.5, 1.0, 2.0)] * 2
    params += [SamplingParams(1, top_k=5), SamplingParams(1, top_p=0.5, temperature=1.5)] * 2
    params.append(SamplingParams(1, top_k=VOCAB + 3, top_p=1.0))
    seeds = [-1, 2**63, 2**64 + 5, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9]
    found = []
    for runner in ("native", "torch"):
        model = Model(read_config(tmp_path), torch.float32, CPU, 64, runner=runner)
        model.load(read_tensors(tmp_path))
        sampler = TokenSampler(VOCAB, CPU, model)
        sampler.rows(params)
        found.append(sampler.sample(hidden, seeds, range(13)))
        logits = model.logits(hidden)
        assert sampler.sample_logits(logits, seeds, range(13)) == found[-1]
        padded = torch.cat((hidden, hidden[:3]))  # deterministic mode pads rows
        assert sampler.sample(padded, seeds, range(13))[0] == found[-1][0]
    assert found[0][0] == found[1][0]
    np.testing.assert_allclose(found[0][1], found[1][1], atol=1e-4)
    np.testing.assert_allclose(found[0][2], found[1][2], atol=1e-4)
    exact = torch.log_softmax(logits[2].double(), -1)
    assert abs(found[0][1][2] - exact[found[0][0][2]].item()) < 1e-5
