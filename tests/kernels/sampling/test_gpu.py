"""The Triton draw: bits of its noise, tokens and statistics against the definition, hostile rows, independence of the batch.

In the interpreter on machines without a GPU; that its noise has the right distribution is in tests/rollout/native/test_noise.py.
"""

import math

import pytest
import torch
from support.head_backends import device_of, marks_of

from appo.rollout.native.sampling import definition, gpu_sample
from appo.rollout.native.sampling.definition import SamplingRows, race
from appo.rollout.native.sampling.noise import halves, key

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from appo._kernels.sampling.gpu import sample as gpu  # noqa: E402

torch.set_num_threads(1)
pytestmark = marks_of("triton")
DEVICE = torch.device(device_of("triton"))
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * (DEVICE.type == "cuda")


def how(n, seed=11, first=0, inv_temp=1.0, greedy=()):
    mask = torch.zeros(n, dtype=torch.uint8)
    mask[list(greedy)] = 1
    by = torch.as_tensor(inv_temp, dtype=torch.float32).expand(n).contiguous()
    return SamplingRows(torch.full((n,), seed), torch.arange(first, first + n), by, mask)


def sample(logits, rows):
    columns = (rows.seeds, rows.positions, rows.inv_temp, rows.greedy)
    return gpu.sample(logits.to(DEVICE), *(x.to(DEVICE) for x in columns)).cpu()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rows", "vocab"), [(1, 1), (3, 7), (33, 100), (5, 4096), (4, 4097), (2, 13_001)]
)
@pytest.mark.parametrize("scale", [0.0, 1.0, 20.0])
def test_against_the_definition(dtype, rows, vocab, scale):
    torch.manual_seed(vocab)
    logits = (scale * torch.randn(rows, vocab) + 3.0).to(dtype)
    settings = how(rows, 2**62 + 5, 1000, torch.rand(rows) + 0.4, greedy=range(2, rows, 4))
    token, logp, entropy = sample(logits, settings)
    want = definition.sample(logits, settings)
    assert token.long().tolist() == want.tokens.tolist()
    exact = torch.log_softmax(logits.double() * settings.inv_temp.double()[:, None], -1)
    tolerance = dict(atol=2e-6 + 3e-7 * scale, rtol=0)
    torch.testing.assert_close(logp, exact.gather(1, want.tokens[:, None])[:, 0], **tolerance)
    torch.testing.assert_close(entropy, -(exact.exp() * exact).sum(-1), **tolerance)
    assert logp.max() <= 0.0 and entropy.min() >= 0.0


@triton.jit
def bits_kernel(seed_ptr, position_ptr, out_ptr, n, BLOCK: tl.constexpr):
    upper, lower = gpu.keys_of(tl.load(seed_ptr), tl.load(position_ptr))
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    high, low = gpu.mixed(upper, at.to(tl.uint32)), gpu.mixed(lower, at.to(tl.uint32))
    tl.store(out_ptr + at, (high.to(tl.int64) << 32) | low.to(tl.int64), mask=at < n)


@pytest.mark.parametrize("seed", [0, -1, 12345, 2**63 - 1, -(2**63)])
@pytest.mark.parametrize("position", [0, 1, 4096, 2**40])
def test_the_noise_has_the_same_bits(seed, position):
    n = 49_157
    out = torch.zeros(n, dtype=torch.int64, device=DEVICE)
    where = (torch.tensor([x], device=DEVICE) for x in (seed, position))
    bits_kernel[(triton.cdiv(n, 8192),)](*where, out, n, 8192)
    upper, lower = halves(key(seed, position), torch.arange(n))
    assert torch.equal(out.cpu(), (upper << 32) | lower)


def test_the_winner_is_that_of_the_whole_race():
    """Nothing that could win is ruled out, in rows that rise, fall and are flat, and at temperatures at both ends."""
    torch.manual_seed(0)
    n, vocab = 20, 9001
    x = torch.randn(n, vocab)
    x[:4] = torch.linspace(0, 90, vocab)
    x[4:8] = torch.linspace(90, 0, vocab)
    x[8:10] = 0.0
    x[10:12] *= 1e4
    x[12:14, 100:] = -math.inf
    inv_temp = torch.logspace(-3, 3, n)[torch.randperm(n)]
    token, _, _ = sample(x, how(n, seed=77, inv_temp=inv_temp))
    for t in range(n):
        want = race(key(77, t), torch.arange(vocab), x[t], float(inv_temp[t])).argmin()
        assert token[t] == want


def test_bits_do_not_depend_on_the_batch():
    torch.manual_seed(1)
    x = torch.randn(9, 9000)
    rows = how(9, 3, 7, torch.rand(9) + 0.5, greedy=[2])
    together = sample(x, rows)
    for i in (0, 2, 8):
        columns = (rows.seeds, rows.positions, rows.inv_temp, rows.greedy)
        alone = sample(x[i : i + 1], SamplingRows(*(c[i : i + 1] for c in columns)))
        assert torch.equal(alone[:, 0], together[:, i])
    strided = torch.randn(9, 2, 9000)
    strided[:, 1] = x
    assert torch.equal(sample(strided[:, 1], rows), together)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, in the interpreter
@pytest.mark.parametrize("at", [0, 4095, 4096, 5999])
@pytest.mark.parametrize("bad", [math.nan, math.inf, "-inf"])
def test_rows_that_cannot_be_drawn_are_marked_alone(bad, at):
    x = torch.randn(4, 6000, generator=torch.Generator().manual_seed(0))
    rows = how(4, greedy=[3])
    want = sample(x, rows)
    for row in (1, 3):  # 3 is greedy
        x[row] = -math.inf if bad == "-inf" else x[row]
        x[row, at] = -math.inf if bad == "-inf" else bad
    found = sample(x, rows)
    assert found[0, 1] == found[0, 3] == -1
    assert torch.equal(found[:, [0, 2]], want[:, [0, 2]])


def test_greedy_takes_the_lowest_id_of_equals():
    x = torch.full((3, 9000), -2.0)
    x[0, [17, 18, 8999]] = 5.0
    x[1, [4096, 8192]] = 5.0
    assert sample(x, how(3, greedy=range(3)))[0].tolist() == [17, 4096, 0]


def test_what_the_sampler_calls():
    x = torch.randn(5, 300, generator=torch.Generator().manual_seed(2))
    rows = how(5, greedy=[1])
    found, want = gpu_sample.sample(x.to(DEVICE), rows), definition.sample(x, rows)
    assert torch.equal(found.tokens, want.tokens)
    torch.testing.assert_close(found.logp, want.logp, atol=2e-6, rtol=0)
    torch.testing.assert_close(found.entropy, want.entropy, atol=2e-6, rtol=0)


def test_no_rows():
    assert sample(torch.zeros(0, 10), how(0)).shape == (3, 0)


def test_float64_is_refused():
    with pytest.raises(TypeError, match="float64"):
        sample(torch.zeros(1, 10, dtype=torch.float64), how(1))
