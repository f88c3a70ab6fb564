"""linear_logprob_entropy against fp64 softmax on the same inputs: values, all three gradients, hostile logits."""

import math

import pytest
import torch
from support.golden_vectors import vector

from appo.kernels import IGNORE, linear_logprob_entropy, logprob_entropy

torch.set_num_threads(1)


def oracle(logits, targets, inv_temp=1.0, softcap=None):
    """(logp, entropy, lse) in float64 from full logits; differentiable."""
    x = logits.double()
    if softcap is not None:
        x = softcap * torch.tanh(x / softcap)
    x = x * (inv_temp[:, None].double() if isinstance(inv_temp, torch.Tensor) else inv_temp)
    logp = torch.log_softmax(x, dim=1)
    entropy = -torch.special.xlogy(logp.exp(), logp.exp()).sum(dim=1)
    return logp.gather(1, targets[:, None])[:, 0], entropy, torch.logsumexp(x, dim=1)


def problem(t, hidden, vocab, dtype, seed=0, spread=3.0):
    g = torch.Generator().manual_seed(seed)
    h = torch.randn(t, hidden, generator=g, dtype=torch.float64)
    w = torch.randn(vocab, hidden, generator=g, dtype=torch.float64) * (spread / math.sqrt(hidden))
    return h.to(dtype), w.to(dtype), torch.randint(vocab, (t,), generator=g)


def assert_accurate(out, want, logp=1e-5, entropy=5e-5):
    assert (out.logp.double() - want[0]).abs().max() <= logp
    assert (out.entropy.double() - want[1]).abs().max() <= entropy
    assert (out.lse.double() - want[2]).abs().max() <= logp
    assert bool((out.logp <= 0).all()), "logp above 0"
    assert bool((out.entropy >= 0).all()), "negative entropy"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize(
    ("t", "hidden", "vocab"),
    [(1, 64, 17), (3, 72, 65), (129, 64, 1100), (128, 896, 2049), (5, 1, 1)],
)
def test_values(t, hidden, vocab, dtype):
    h, w, y = problem(t, hidden, vocab, dtype)
    out = linear_logprob_entropy(h, w, y)
    assert out.logp.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    tight = {"logp": 1e-12, "entropy": 1e-12} if dtype == torch.float64 else {}
    assert_accurate(out, oracle(h.double() @ w.double().T, y), **tight)


@pytest.mark.parametrize("shift", [-300.0, -150.0, 150.0, 300.0])
def test_shifted_logits(shift):
    """A constant added to every logit changes nothing but lse; entropy must not cancel."""
    h, w, y = problem(64, 64, 1000, torch.float32)
    h = torch.cat([h, torch.ones(64, 1)], dim=1)
    w = torch.cat([w, torch.full((1000, 1), shift)], dim=1)
    out = linear_logprob_entropy(h, w, y, block=(16, 300))
    # A float32 logit near 300 is rounded to 3e-5 before any statistic sees it.
    want = oracle(h.double() @ w.double().T, y)
    assert_accurate(out, want, logp=3e-4, entropy=5e-5)


@pytest.mark.parametrize("block", [None, (2, 7)])
def test_extreme_rows(block):
    """One-hot, uniform, all equal at ±1e4, and a target of probability zero."""
    vocab = 50
    rows = torch.zeros(5, vocab)
    rows[0, 3] = 1e4
    rows[2] = 1e4
    rows[3] = -1e4
    rows[4, 0] = 500.0
    y = torch.tensor([3, 7, 49, 0, 9])
    out = linear_logprob_entropy(rows, torch.eye(vocab), y, block=block)
    assert_accurate(out, oracle(rows, y), logp=1e-3, entropy=1e-5)
    assert out.logp[0] == 0.0
    assert out.entropy[0] == 0.0
    assert out.entropy[1].item() == pytest.approx(math.log(vocab), abs=1e-6)
    assert out.logp[4].item() == pytest.approx(-500.0)


def test_golden_entropy():
    v = vector("B1")
    for row, want in zip(v["inputs"]["logits"], v["expected"]["entropy"]):
        logits = torch.tensor([row], dtype=torch.float64)
        y = torch.zeros(1, dtype=torch.int64)
        assert logprob_entropy(logits, y).entropy.item() == pytest.approx(want, abs=v["tol"])
        fused = linear_logprob_entropy(logits, torch.eye(len(row), dtype=torch.float64), y)
        assert fused.entropy.item() == pytest.approx(want, abs=v["tol"])


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("rows", [None, [1, 1, 4, 0, 2]])
def test_gradcheck(softcap, rows):
    """h, w and a temperature per token, through logp, entropy and lse at once, across block borders."""
    h, w, _ = problem(5, 4, 7, torch.float64)
    inv_temp = torch.linspace(0.5, 2.0, 5, dtype=torch.float64)
    y = torch.tensor([0, 6, IGNORE, 3, 2])
    index = None if rows is None else torch.tensor(rows)

    def f(h, w, inv_temp):
        return tuple(
            linear_logprob_entropy(
                h, w, y, rows=index, inv_temp=inv_temp, softcap=softcap, block=(2, 3)
            )
        )

    assert torch.autograd.gradcheck(f, tuple(x.requires_grad_() for x in (h, w, inv_temp)))


@pytest.mark.parametrize("output", ["logp", "entropy", "lse"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradient_of_each_output(output, dtype):
    """Every output alone has a real gradient, as good as float64 rounded to the dtype of the weights."""
    h, w, y = problem(70, 64, 600, dtype)
    upstream = torch.randn(70, generator=torch.Generator().manual_seed(1))
    leaves = [x.clone().requires_grad_() for x in (h, w)]
    exact = [x.double().requires_grad_() for x in (h, w)]
    out = linear_logprob_entropy(*leaves, y, inv_temp=1.25, block=(32, 128))
    getattr(out, output).backward(upstream)
    want = dict(zip(("logp", "entropy", "lse"), oracle(exact[0] @ exact[1].T, y, 1.25)))
    want[output].backward(upstream.double())
    for got, ref in zip(leaves, exact):
        assert got.grad.dtype == dtype
        assert ref.grad.norm() > 0.1
        error = (got.grad.double() - ref.grad).norm() / ref.grad.norm()
        assert error < (2e-6 if dtype == torch.float32 else 3e-3)


def test_target_gradient_of_a_likely_token():
    """p near 1: the target term p - 1 must survive (a bf16 read-modify-write loses all of it)."""
    logits = torch.tensor([[8.0, 0.0, 0.0, 0.0]], requires_grad=True)
    linear_logprob_entropy(logits, torch.eye(4), torch.tensor([0])).logp.sum().backward()
    p = torch.softmax(logits.detach().double(), 1)[0, 0]
    assert logits.grad[0, 0].item() == pytest.approx((1 - p).item(), rel=1e-3)


def test_block_size_does_not_matter():
    h, w, y = problem(65, 48, 333, torch.float32)
    grads, values = [], []
    for block in [None, (1, 1000), (64, 17), (1000, 1), (7, 333)]:
        leaves = [x.clone().requires_grad_() for x in (h, w)]
        out = linear_logprob_entropy(*leaves, y, block=block)
        (out.logp.sum() + 0.1 * out.entropy.sum()).backward()
        values.append(torch.stack(out).detach())
        grads.append([x.grad for x in leaves])
    for value, grad in zip(values[1:], grads[1:]):
        torch.testing.assert_close(value, values[0], rtol=2e-6, atol=4e-6)
        torch.testing.assert_close(grad, grads[0], rtol=1e-5, atol=1e-5)


def test_same_bits_on_every_run():
    h, w, y = problem(40, 32, 500, torch.bfloat16)

    def once():
        leaves = [x.clone().requires_grad_() for x in (h, w)]
        out = linear_logprob_entropy(*leaves, y)
        (out.logp - out.entropy).sum().backward()
        return [*out, *(x.grad for x in leaves)]

    assert all(torch.equal(a, b) for a, b in zip(once(), once()))


def test_rows_and_ignored_targets():
    h, w, y = problem(20, 16, 40, torch.float32)
    rows = torch.tensor([3, 3, 19, 0])
    y = torch.tensor([5, 6, IGNORE, 7], dtype=torch.int32)
    h.requires_grad_()
    out = linear_logprob_entropy(h, w, y, rows=rows)
    kept = linear_logprob_entropy(h.detach()[[3, 3, 0]], w, y[[0, 1, 3]])
    for got, want in zip(out, kept):
        torch.testing.assert_close(got[[0, 1, 3]], want)
        assert got[2] == 0.0
    (out.logp + out.entropy + out.lse).sum().backward()
    assert set(h.grad.abs().sum(1).nonzero()[:, 0].tolist()) == {0, 3}


@pytest.mark.parametrize("all_ignored", [False, True])
def test_nothing_to_do(all_ignored):
    h, w, y = problem(4 if all_ignored else 0, 8, 11, torch.float32)
    h.requires_grad_()
    w.requires_grad_()
    out = linear_logprob_entropy(h, w, torch.full_like(y, IGNORE))
    assert out.logp.shape == y.shape
    (out.logp + out.entropy).sum().backward()
    assert torch.count_nonzero(h.grad) == 0
    assert torch.count_nonzero(w.grad) == 0


def test_frozen_head_and_autocast():
    """A frozen head gets no gradient, and autocast must not round the logits behind our back."""
    h, w, y = problem(30, 64, 200, torch.float32)
    want = oracle(h.double() @ w.double().T, y)
    h.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = linear_logprob_entropy(h, w, y)
        out.logp.sum().backward()
    assert_accurate(out, want)
    assert w.grad is None
    exact = h.detach().double().requires_grad_()
    oracle(exact @ w.double().T, y)[0].sum().backward()
    torch.testing.assert_close(h.grad.double(), exact.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_existing_logits_agree(dtype):
    h, w, y = problem(33, 32, 150, torch.float32)
    logits = (h @ w.T).to(dtype)
    inv_temp = torch.linspace(0.2, 5, 33)
    before = logits.clone()
    assert_accurate(
        logprob_entropy(logits, y, inv_temp=inv_temp), oracle(logits, y, inv_temp), 5e-5, 5e-5
    )
    assert torch.equal(before, logits)


def test_logits_outside_the_support():
    """-inf logits (a sampler's top-k) leave the distribution of the others, without NaN."""
    logits = torch.tensor([[1.0, -math.inf, 2.0, -math.inf]])
    out = logprob_entropy(logits, torch.tensor([2]))
    want = oracle(torch.tensor([[1.0, 2.0]]), torch.tensor([1]))
    assert_accurate(out, want, 1e-6, 1e-6)
    assert -1e30 < logprob_entropy(logits, torch.tensor([1])).logp.item() < -1e29


def test_wrong_arguments():
    h, w, y = problem(3, 4, 5, torch.float32)
    with pytest.raises(ValueError, match=r"targets\[1\] is 5.* 0 … 4; use -100"):
        linear_logprob_entropy(h, w, torch.tensor([0, 5, 0]))
    with pytest.raises(ValueError, match=r"targets\[2\] is -1"):
        linear_logprob_entropy(h, w, torch.tensor([0, 0, -1]))
    with pytest.raises(ValueError, match="2 targets for 3 rows"):
        linear_logprob_entropy(h, w, y[:2])
    with pytest.raises(ValueError, match="inv_temp must be > 0"):
        linear_logprob_entropy(h, w, y, inv_temp=0.0)
    with pytest.raises(ValueError, match=r"inv_temp has shape \(2,\)"):
        linear_logprob_entropy(h, w, y, inv_temp=torch.ones(2))
    with pytest.raises(ValueError, match=r"w is \(5, 3\)"):
        linear_logprob_entropy(h, w[:, :3], y)
    with pytest.raises(TypeError, match="targets must be integer"):
        linear_logprob_entropy(h, w, y.float())
    with pytest.raises(ValueError, match="backend is 'cuda', expected one of 'auto', 'torch'"):
        linear_logprob_entropy(h, w, y, backend="cuda")
    with pytest.raises(ValueError, match=r"rows\[1\] is 3, but h has rows 0 … 2"):
        linear_logprob_entropy(h, w, y, rows=torch.tensor([0, 3, 1]))
    with pytest.raises(TypeError, match="rows must be integer"):
        linear_logprob_entropy(h, w, y, rows=torch.zeros(3))
    with pytest.raises(ValueError, match="the vocabulary or the hidden size is empty"):
        linear_logprob_entropy(h, w[:0], y)
    with pytest.raises(ValueError, match="targets is on meta, h on cpu"):
        linear_logprob_entropy(h, w, y.to("meta"))
    for cap in (0, 1e-46, math.inf, math.nan):
        with pytest.raises(ValueError, match="softcap is"):
            linear_logprob_entropy(h, w, y, softcap=cap)
    with pytest.raises(ValueError, match="inv_temp must be > 0 and finite"):
        linear_logprob_entropy(h, w, y, inv_temp=math.inf)
    with pytest.raises(TypeError, match="rows must be integer"):
        linear_logprob_entropy(h, w, y, rows=torch.ones(3, dtype=torch.bool))
