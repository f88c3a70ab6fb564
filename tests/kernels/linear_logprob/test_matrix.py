"""One matrix of shapes, temperatures and hostile logits for every backend, against float64 and against each other.

Bounds for bfloat16 inputs with |logit| ≤ 20: logp 1e-5, entropy 5e-5 (5e-5 and 3e-4 for logp at 50 and 500, where a
float32 logit itself is that coarse); gradients 3e-3 by norm (one rounding of G or of the result to 8 bits).
"""

import itertools

import pytest
import torch
from support.golden_vectors import vector
from support.head_backends import (
    assert_accurate,
    backend_params,
    device_of,
    dtype_of,
    marks_of,
    oracle,
    oracle_gradients,
    problem,
    relative,
    run,
    why_not,
)

from appo.kernels import IGNORE, linear_logprob_entropy

torch.set_num_threads(1)

BACKENDS = backend_params("torch", "cpu", "triton", "cublas32")
each_backend = pytest.mark.parametrize("backend", BACKENDS)
SHAPES = [  # T, H, V: one token, one column block, edges of every tile, prime sizes
    (1, 64, 17),
    (3, 72, 65),
    (127, 64, 64),
    (128, 72, 1000),
    (129, 64, 1024),
    (129, 896, 1100),
    (1000, 64, 1025),
    (5, 64, 32001),
]


@each_backend
@pytest.mark.parametrize(("t", "hidden", "vocab"), SHAPES)
def test_values(backend, t, hidden, vocab):
    h, w, y = problem(t, hidden, vocab)
    out, _ = run(backend, h, w, y)
    assert_accurate(out, oracle(h, w, y))


@each_backend
@pytest.mark.parametrize("output", ["logp", "entropy", "lse", "all"])
def test_gradients(backend, output):
    """Every output alone and all at once, a temperature per token, across tile borders in all three dimensions."""
    h, w, y = problem(131, 72, 1100)
    g = torch.Generator().manual_seed(1)
    keep = {"logp": (1, 0, 0), "entropy": (0, 1, 0), "lse": (0, 0, 1), "all": (1, 0.3, -0.1)}
    upstream = [f * torch.randn(131, generator=g) for f in keep[output]]
    inv_temp = torch.logspace(-0.5, 0.5, 131)
    want = oracle_gradients(h, w, y, upstream, inv_temp=inv_temp)
    _, got = run(backend, h, w, y, upstream=upstream, inv_temp=inv_temp)
    for a, b, bound in zip(got, want, (3e-3, 3e-3, 3e-3), strict=True):
        assert b.norm() > 1e-3
        assert relative(a, b) <= bound


@each_backend
@pytest.mark.parametrize("shift", [-300.0, -150.0, 150.0, 300.0])
def test_shifted_logits(backend, shift):
    """A constant added to every logit changes lse alone."""
    h, w, y = problem(33, 63, 1100)
    h = torch.cat([h, torch.ones(33, 1).bfloat16()], 1)
    w = torch.cat([w, torch.full((1100, 1), shift).bfloat16()], 1)
    out, _ = run(backend, h, w, y)
    assert_accurate(out, oracle(h, w, y), logp=3e-4, entropy=5e-5)


@each_backend
def test_temperatures(backend):
    """0.1 to 5 in one batch."""
    h, w, y = problem(64, 64, 1000, spread=1.0)
    inv_temp = 1 / torch.tensor([0.1, 0.5, 1.0, 5.0]).repeat(16)
    out, _ = run(backend, h, w, y, inv_temp=inv_temp)
    assert_accurate(out, oracle(h, w, y, inv_temp=inv_temp), logp=5e-5)


@each_backend
def test_peaked_and_uniform_rows(backend):
    """One-hot, uniform, all equal and far from zero, and a target of probability zero."""
    vocab = 1100
    h = torch.zeros(5, 64).bfloat16()
    w = torch.zeros(vocab, 64).bfloat16()
    w[:, 0], w[3, 1], w[0, 2] = 1.0, 1.0, 1.0
    h[0, 1] = 256.0  # one-hot at 3
    h[2, 0], h[3, 0] = 4096.0, -4096.0  # all equal
    h[4, 2] = 512.0  # one-hot at 0, asked about 9
    y = torch.tensor([3, 7, vocab - 1, 0, 9])
    out, _ = run(backend, h, w, y)
    assert_accurate(out, oracle(h, w, y), logp=1e-3, entropy=1e-5)
    assert out[0][0] == 0.0
    assert out[1][0] == 0.0
    assert out[0][4].item() == pytest.approx(-512.0)


@each_backend
def test_a_likely_target_keeps_its_gradient(backend):
    """p near 1: 1 - p must survive (a read-modify-write of G in bfloat16 loses all of it)."""
    h, w = torch.zeros(1, 64).bfloat16(), torch.zeros(40, 64).bfloat16()
    h[0, 0], w[0, 0] = 1.0, 8.0
    w[0, 1] = 1.0  # dh[1] is G of the target
    upstream = [torch.ones(1), torch.zeros(1), torch.zeros(1)]
    _, (dh, _) = run(backend, h, w, torch.tensor([0]), upstream=upstream)
    p = torch.softmax((h @ w.T).double(), 1)[0, 0]
    assert dh[0, 1].item() == pytest.approx(float(1 - p), rel=1e-2)


@each_backend
def test_softcap(backend):
    h, w, y = problem(40, 64, 700, spread=8.0)
    upstream = [torch.ones(40), 0.3 * torch.ones(40), 0.1 * torch.ones(40)]
    want = oracle_gradients(h, w, y, upstream, softcap=10.0)
    out, got = run(backend, h, w, y, upstream=upstream, softcap=10.0)
    assert_accurate(out, oracle(h, w, y, softcap=10.0))
    for a, b in zip(got, want, strict=True):
        assert relative(a, b) <= 3e-3


@each_backend
def test_rows(backend):
    """Rows of h chosen, permuted and repeated; a row that nobody asks for gets gradient 0."""
    h, w, _ = problem(37, 64, 300)
    rows = torch.tensor([5, 5, 36, 0, 7, 5, 20])
    y = torch.tensor([0, 299, 5, 5, 8, 0, 100])
    upstream = [torch.ones(7), 0.3 * torch.ones(7), torch.zeros(7)]
    want = oracle_gradients(h, w, y, upstream, rows=rows)
    out, got = run(backend, h, w, y, upstream=upstream, rows=rows)
    assert_accurate(out, oracle(h, w, y, rows=rows))
    for a, b in zip(got, want, strict=True):
        assert relative(a, b) <= 3e-3
    unused = torch.ones(37, dtype=torch.bool)
    unused[rows] = False
    assert not bool(got[0][unused].any())


@each_backend
def test_ignored_targets(backend):
    """0 in all outputs, no gradient, and the others as if it were not there."""
    h, w, y = problem(20, 64, 300)
    full, _ = run(backend, h, w, y)
    y[[3, 19]] = IGNORE
    upstream = [torch.ones(20), torch.ones(20), torch.ones(20)]
    out, got = run(backend, h, w, y, upstream=upstream, inv_temp=torch.ones(20))
    for a, b in zip(out, full):
        assert a[[3, 19]].tolist() == [0.0, 0.0]
        torch.testing.assert_close(a[4:19], b[4:19], rtol=1e-6, atol=2e-6)
    assert not bool(got[0][[3, 19]].any())
    assert got[2][[3, 19]].tolist() == [0.0, 0.0]


@each_backend
def test_strided_inputs(backend):
    """A slice of a wider tensor, every second row, a transposed head: any strides."""
    h, w, y = problem(64, 96, 400)
    want, _ = run(backend, h[::2, 16:80].contiguous(), w[:, 16:80].contiguous(), y[::2])
    device, dtype = device_of(backend), dtype_of(backend)
    wide_h, tall_w = h.to(device, dtype), w.to(device, dtype).T.contiguous().T
    out = linear_logprob_entropy(
        wide_h[::2, 16:80], tall_w[:, 16:80], y.to(device)[::2], backend=backend
    )
    for a, b in zip(out, want):
        torch.testing.assert_close(a.cpu(), b, rtol=1e-6, atol=2e-6)


@each_backend
def test_infinite_and_nan_logits(backend):
    """NaN or +inf: NaN for that row alone."""
    h, w, y = problem(9, 64, 300)
    want, _ = run(backend, h, w, y)
    h[2, 5], h[6, 0] = float("nan"), float("inf")
    out, _ = run(backend, h, w, y)
    good = torch.tensor([0, 1, 3, 4, 5, 7, 8])
    for a, b in zip(out, want):
        assert a[[2, 6]].isnan().all()
        assert torch.equal(a[good], b[good])


@each_backend
def test_minus_infinity_is_outside_the_support(backend):
    """A -inf logit has probability 0 and no gradient; with two columns left the result is theirs."""
    h, w = torch.zeros(2, 64).bfloat16(), torch.zeros(3, 64).bfloat16()
    h[:, 0] = 1.0
    h[1, 1] = 1.0
    w[0, 1], w[1, 0] = 2.0, float("-inf")
    out, _ = run(backend, h, w, torch.tensor([0, 2]))
    assert_accurate(out, oracle(h, w[[0, 2]], torch.tensor([0, 1])), 1e-6, 1e-6)


@each_backend
def test_batch_invariance_and_repeatability(backend):
    """The bits of a token do not depend on who else is in the batch, nor on the run."""
    if backend == "cublas32":
        pytest.skip("the vendor's matrix product may choose another kernel for another batch")
    if backend == "torch":
        pytest.skip("torch's matrix product may choose another kernel for another batch")
    h, w, y = problem(70, 64, 1100)
    out, _ = run(backend, h, w, y)
    again, _ = run(backend, h, w, y)
    alone, _ = run(backend, h[41:42], w, y[41:42])
    order = torch.randperm(70, generator=torch.Generator().manual_seed(3))
    mixed, _ = run(backend, h[order], w, y[order])
    for a, b, c, d in zip(out, again, alone, mixed):
        assert torch.equal(a, b)
        assert torch.equal(a[41:42], c)
        assert torch.equal(a[order], d)


@each_backend
def test_permuted_vocabulary(backend):
    """Another order of the columns is another order of a sum, no more."""
    h, w, y = problem(32, 64, 1100)
    order = torch.randperm(1100, generator=torch.Generator().manual_seed(5))
    place = torch.empty_like(order)
    place[order] = torch.arange(1100)
    out, _ = run(backend, h, w, y)
    moved, _ = run(backend, h, w[order], place[y])
    for a, b in zip(out, moved):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=4e-6)


@each_backend
def test_golden_entropy(backend):
    """Vector B1 through an identity head, to the accuracy of float32."""
    v = vector("B1")
    for row, want in zip(v["inputs"]["logits"], v["expected"]["entropy"]):
        logits = torch.tensor([row]).bfloat16()
        exact = torch.distributions.Categorical(logits=logits.double()).entropy()
        out, _ = run(backend, logits, torch.eye(len(row)).bfloat16(), torch.tensor([0]))
        assert out[1].item() == pytest.approx(exact.item(), abs=1e-6)
        assert exact.item() == pytest.approx(want, abs=2e-2)  # logits rounded to 8 bits


PAIRS = [
    pytest.param(pair, marks=[m for name in pair for m in marks_of(name)])
    for pair in itertools.combinations(("torch", "cpu", "triton", "cublas32"), 2)
]


@pytest.mark.parametrize("pair", PAIRS)
def test_backends_agree(pair):
    """Pairwise, closer than each is asked to be to float64: outputs 4e-6, gradients one bfloat16 rounding."""
    h, w, y = problem(130, 72, 1100)
    upstream = [torch.ones(130), 0.3 * torch.ones(130), 0.1 * torch.ones(130)]
    (a, da), (b, db) = (run(name, h, w, y, upstream=upstream) for name in pair)
    for x, z in zip(a, b):
        torch.testing.assert_close(x, z, rtol=1e-6, atol=6e-6)
    for x, z in zip(da, db):
        assert relative(x.double(), z.double()) <= 4e-3


def test_what_forward_keeps_changes_no_result_and_little_in_the_gradients():
    """Kept probabilities are rounded to 11 bits, gradients to 8: the same accuracy, and exactly the same outputs."""
    if reason := why_not("cpu"):
        pytest.skip(reason)
    h, w, y = problem(131, 72, 3000)
    upstream = [torch.ones(131), 0.3 * torch.ones(131), 0.1 * torch.ones(131)]
    want = oracle_gradients(h, w, y, upstream)
    outputs = []
    for size in (0, 400_000, 1 << 20):  # nothing, the leading columns, everything
        out, grads = run("cpu", h, w, y, upstream=upstream, saved_bytes=size)
        outputs.append(out)
        for a, b in zip(grads, want):
            assert relative(a, b) <= 3e-3
    for out in outputs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(out, outputs[0]))


@pytest.mark.parametrize("saved_bytes", [0, 1 << 20])
def test_the_tail_of_a_confident_token_keeps_its_gradient(saved_bytes):
    """20,000 columns of p = 1e-8 beside one of p near 1: what forward keeps must reach that far down."""
    if reason := why_not("cpu"):
        pytest.skip(reason)
    vocab = 20_000
    h, w = torch.zeros(1, 64).bfloat16(), torch.zeros(vocab, 64).bfloat16()
    h[0, 0], w[0, 0] = 1.0, 18.0
    upstream = [torch.ones(1), torch.zeros(1), torch.zeros(1)]
    _, want = oracle_gradients(h, w, torch.tensor([0]), upstream)
    _, (_, dw) = run("cpu", h, w, torch.tensor([0]), upstream=upstream, saved_bytes=saved_bytes)
    assert relative(dw[1:], want[1:]) <= 4e-3
