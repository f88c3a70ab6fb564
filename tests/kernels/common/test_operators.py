"""The operators behind linear_logprob_entropy: torch.compile, fake implementations, debug mode, empty and odd inputs."""

import pytest
import torch

from appo._kernels.linear_logprob.op import grads_op, stats_op
from appo.kernels import IGNORE, linear_logprob_entropy, logprob_entropy, watch

torch.set_num_threads(1)


def problem(t=20, hidden=16, vocab=50, dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    h, w = torch.randn(t, hidden, generator=g), torch.randn(vocab, hidden, generator=g)
    return h.to(dtype), w.to(dtype), torch.randint(vocab, (t,), generator=g)


def loss(h, w, y, inv_temp):
    out = linear_logprob_entropy(h * 1.0, w, y, inv_temp=inv_temp, softcap=30.0)
    return out.logp.sum() + 0.1 * out.entropy.sum() + 0.01 * out.lse.sum()


def gradients(f, *inputs):
    leaves = [x.detach().clone().requires_grad_(x.is_floating_point()) for x in inputs]
    f(*leaves).backward()
    return [x.grad for x in leaves if x.grad is not None]


def test_compile_without_a_graph_break():
    """One graph (fullgraph raises at a break), same gradients bit for bit: the operators are opaque to the compiler."""
    h, w, y = problem()
    y[3] = IGNORE
    inputs = (h, w, y, torch.full((20,), 0.8))
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for a, b in zip(gradients(loss, *inputs), gradients(compiled, *inputs), strict=True):
        assert torch.equal(a, b)


def test_operators_keep_their_promises():
    """torch's own checker: schema, fake tensors, no hidden mutation."""
    h, w, y = problem()
    scale = torch.ones(20)
    how = (None, None, 0, "torch", True, None)
    kept = torch.empty(0, dtype=torch.uint8)
    n = [torch.randn(20) for _ in range(5)]
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(stats_op, (h, w, y, scale, *how, 0, 50, 0), test_utils=tests)
    torch.library.opcheck(
        grads_op, (h, w, y, scale, *how, kept, *n, True, False, True, False), test_utils=tests
    )


@pytest.mark.parametrize("ignored", [0, 3, 20])
@pytest.mark.parametrize("needs", [(1, 1, 1), (1, 0, 0), (0, 1, 0), (0, 0, 1)])
@pytest.mark.parametrize("backend", ["torch", "auto"])
def test_shapes_dtypes_and_strides_are_what_the_fake_says(backend, needs, ignored):
    """A transposed head, ignored targets, any mix of wanted gradients, with and without a sum over ranks to come."""
    h, w, y = problem(dtype=torch.bfloat16)
    w = w.T.contiguous().T
    y[:ignored] = IGNORE
    how = (None, None, 0, backend, True, None)
    kept = torch.empty(0, dtype=torch.uint8)
    n = [torch.randn(20) for _ in range(5)]
    for wide in (False, True):
        flags = [*map(bool, needs), wide]
        args = (h, w, y, torch.ones(20), *how, kept, *n, *flags)
        torch.library.opcheck(grads_op, args, test_utils=("test_schema", "test_faketensor"))


def test_existing_logits_with_ignored_targets():
    out = logprob_entropy(torch.randn(2, 5), torch.tensor([IGNORE, 1]))
    assert [float(x[0]) for x in out] == [0.0, 0.0, 0.0]
    assert out.logp[1] < 0
    with pytest.raises(TypeError, match="targets must be integer"):
        logprob_entropy(torch.randn(2, 5), torch.tensor([True, False]))


def test_dtypes_of_nothing():
    """No token: still float32 (float64), and a part of the graph."""
    h, w, _ = problem(dtype=torch.bfloat16)
    inv_temp = torch.ones(0, requires_grad=True)
    out = linear_logprob_entropy(h[:0], w, torch.zeros(0, dtype=torch.int64), inv_temp=inv_temp)
    assert out.logp.dtype == torch.float32
    out.logp.sum().backward()
    assert inv_temp.grad.shape == (0,)


def test_second_derivatives_are_refused():
    """Gradients of gradients are not computed; asking for them is an error, not a zero."""
    h, w, y = problem()
    h.requires_grad_()
    out = linear_logprob_entropy(h, w, y)
    (first,) = torch.autograd.grad(out.logp.sum(), h, create_graph=True)
    with pytest.raises(RuntimeError):
        first.sum().backward()


@pytest.mark.parametrize("backend", ["torch", "auto"])
def test_nothing_to_do(backend):
    h, w, y = (x[:0] if i != 1 else x for i, x in enumerate(problem()))
    h.requires_grad_()
    out = linear_logprob_entropy(h, w, y, backend=backend)
    assert [x.shape for x in out] == [(0,)] * 3
    out.logp.sum().backward()
    assert h.grad.shape == (0, 16)
    h, w, y = problem()
    leaves = [x.requires_grad_() for x in (h, w)]
    out = linear_logprob_entropy(*leaves, torch.full_like(y, IGNORE), backend=backend)
    (out.logp.sum() + out.entropy.sum()).backward()
    assert not any(bool(x.any()) for x in (*out, h.grad, w.grad))


@pytest.mark.parametrize("backend", ["torch", "auto"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_rows_stay_alone_and_are_counted(backend, bad):
    """NaN or +inf in a row of h: NaN for that row, the others keep their bits, and a watch counts it."""
    h, w, y = problem(dtype=torch.bfloat16)
    clean = linear_logprob_entropy(h, w, y, backend=backend)
    h[7, 2] = bad
    with watch() as outer, watch() as inner:
        out = linear_logprob_entropy(h, w, y, backend=backend)
    others = torch.arange(20) != 7
    for a, b in zip(clean, out):
        assert torch.equal(a[others], b[others])
        assert b[7].isnan()
    assert inner.non_finite() == outer.non_finite() == 1
    linear_logprob_entropy(h, w, y, backend=backend)
    assert inner.non_finite() == 1, "a closed watch counts no more"


@pytest.mark.parametrize("backend", ["torch", "auto"])
def test_weights_changed_behind_the_version_counter(backend):
    """`.data` hides a change from torch's version counter; the next call must see it all the same."""
    h, w, y = problem(dtype=torch.bfloat16)
    weight = torch.nn.Parameter(w)
    before = linear_logprob_entropy(h, weight, y, backend=backend)
    version = weight._version
    weight.data.neg_()
    assert weight._version == version
    after = linear_logprob_entropy(h, weight, y, backend=backend)
    fresh = linear_logprob_entropy(h, w.clone(), y, backend=backend)
    assert torch.equal(after.logp, fresh.logp)
    assert not torch.equal(after.logp, before.logp)
