"""policy_loss: the formula written out as oracle, golden vectors, hostile values, all backends."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.golden_vectors import vector
from support.packed_backends import on, packed_backends, packed_offsets

from appo._kernels.common import native
from appo.kernels import PolicyLoss, half_life_to_gamma, policy_loss

torch.set_num_threads(1)
HAS_NATIVE = native.load()[0] is not None
each_backend = pytest.mark.parametrize("backend", packed_backends())


def run(backend, logp, old_logp, advantage, mask, offsets, weight=None, **rules):
    """(PolicyLoss, gradient of logp), on the CPU."""
    inputs = on(backend, logp.detach(), old_logp, advantage, mask, offsets, weight)
    inputs[0].requires_grad_()
    out = policy_loss(*inputs, **rules, backend=backend)
    (gradient,) = torch.autograd.grad(out.loss, inputs[0])
    return PolicyLoss(*(t.detach().cpu() for t in out)), gradient.cpu()


def written_out(logp, old_logp, advantage, mask, offsets, weight, *, gamma=None, future_clip=(1.0, 1.2),
                future_weight=0.0, clip_low=0.2, clip_high=0.28, dual_clip=None):  # fmt: skip
    """(loss, gradient): the formula of the docstring row by row, with a T × T matrix of γ^(k-t),
    and autograd.
    """
    leaf = logp.detach().clone().requires_grad_()
    total = torch.zeros((), dtype=torch.float64)
    cuts = offsets.tolist()
    for row, (lo, hi) in enumerate(itertools.pairwise(cuts)):
        m = mask[lo:hi].bool()
        d = torch.where(m, leaf[lo:hi] - old_logp[lo:hi], 0.0)
        a = advantage[lo:hi]
        if gamma is not None:
            k = torch.arange(hi - lo)
            power = (k[None, :] - k[:, None]).double()
            ahead = torch.where(power >= 0, gamma ** power.clamp(min=0), 0.0) @ d.detach()
            a = a * (1 + future_weight * ahead.clamp(-20, 20).exp().clamp(*future_clip))
        r = d.clamp(-20, 20).exp()
        u = torch.maximum(-a * r, -a * r.clamp(1 - clip_low, 1 + clip_high))
        if dual_clip is not None:
            u = torch.where(a < 0, torch.minimum(u, -a * dual_clip), u)
        total = total + (1.0 if weight is None else weight[row]) * u[m].sum()
    total = total + 0.0 * leaf.sum()  # a gradient also where there is no row
    return total.detach(), torch.autograd.grad(total, leaf)[0]


def problem(lengths, seed=0, dtype=torch.float64, spread=0.5):
    g = torch.Generator().manual_seed(seed)
    n = sum(lengths)
    logp = -torch.rand(n, generator=g, dtype=dtype) * 3
    old_logp = logp + spread * torch.randn(n, generator=g, dtype=dtype)
    advantage = torch.randn(n, generator=g, dtype=dtype)
    mask = torch.rand(n, generator=g) > 0.2
    weight = torch.rand(len(lengths), generator=g, dtype=torch.float64)
    return logp, old_logp, advantage, mask, packed_offsets(lengths), weight


RULES = {
    "ppo": {},
    "dual": dict(clip_high=0.2, dual_clip=1.4),
    "appo": dict(gamma=0.9, future_weight=0.5),
    "both": dict(gamma=1.0, future_weight=1.0, future_clip=(0.5, 1.5), dual_clip=1.4),
    "no decay": dict(gamma=0.0, future_weight=0.5),
}


@each_backend
@pytest.mark.parametrize("rules", RULES.values(), ids=RULES)
@pytest.mark.parametrize("lengths", [[], [0], [1], [3, 0, 130, 64]])
def test_equals_the_formula_written_out(lengths, rules, backend):
    inputs = problem(lengths)
    out, gradient = run(backend, *inputs, **rules)
    loss, want = written_out(*inputs, **rules)
    torch.testing.assert_close(out.loss, loss, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(gradient, want, rtol=1e-12, atol=1e-13)
    assert out.loss.dtype == torch.float64 and gradient.dtype == inputs[0].dtype


@each_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision_inputs_are_rounded_once(dtype, backend):
    logp, old_logp, advantage, mask, offsets, weight = problem([40, 70], seed=1)
    narrow = [x.to(dtype) for x in (logp, old_logp, advantage)]
    out, gradient = run(backend, *narrow, mask, offsets, weight, **RULES["both"])
    wide = [x.double() for x in narrow]
    want, exact = run("torch", *wide, mask, offsets, weight, **RULES["both"])
    torch.testing.assert_close(out.loss, want.loss, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(out.future, want.future.to(dtype))
    torch.testing.assert_close(gradient, exact.to(dtype))


def golden(name):
    v = vector(name)
    keys = ("log_prob", "old_log_prob", "advantages")
    vectors = [torch.tensor(v["inputs"][k], dtype=torch.float64) for k in keys]
    mask = torch.tensor(v["inputs"]["mask"], dtype=torch.bool)
    offsets = torch.arange(0, mask.numel() + 1, mask.shape[1])
    return v, [x.flatten() for x in vectors], mask, offsets


def close(v, got, want):
    want = torch.tensor(want, dtype=torch.float64)
    torch.testing.assert_close(got.view(want.shape), want, rtol=0, atol=v["tol"])


def row_weight(mode, mask, rollouts=None):
    """The denominators of the three means as a factor per row; mask[R, T]."""
    tokens, trained = mask.sum(1).double(), mask.any(1).sum()
    if mode == "token-mean":
        return torch.full_like(tokens, 1.0) / tokens.sum()
    return 1.0 / tokens.clamp(min=1.0) / (trained if rollouts is None else rollouts)


@each_backend
@pytest.mark.parametrize("name", ["G1", "G2", "G7", "G13"])
def test_golden_clipped_losses(name, backend):
    v, vectors, mask, offsets = golden(name)
    p = v["params"]
    rules = {k: p[k] for k in ("clip_low", "clip_high", "dual_clip")}
    out, gradient = run(backend, *vectors, mask.flatten(), offsets, row_weight(p["agg"], mask), **rules)  # fmt: skip
    close(v, out.loss, v["expected"]["loss"])
    close(v, gradient, v["expected"]["grad_wrt_log_prob"])


@each_backend
@pytest.mark.parametrize(("name", "rollouts"), [("G17", 2), ("G18", 8)])
def test_golden_appo_objective(name, rollouts, backend):
    v, vectors, mask, offsets = golden(name)
    p = v["params"]
    rules = dict(gamma=half_life_to_gamma(p["tau"]), future_clip=tuple(p["f_clip"]))
    rules |= dict(future_weight=p["b"], clip_low=p["clip_low"], clip_high=p["clip_high"])
    weight = row_weight("rollout-mean", mask, rollouts)
    out, gradient = run(backend, *vectors, mask.flatten(), offsets, weight, **rules)
    close(v, out.loss, v["expected"]["loss"])
    close(v, gradient, v["expected"]["grad_wrt_log_prob"])
    future = torch.tensor(v["expected"]["A_fut"], dtype=torch.float64)
    close(v, out.future.view(mask.shape)[mask], future[mask].tolist())


@each_backend
@pytest.mark.parametrize("name", ["F1", "F2"])
def test_golden_on_policy_gradient_is_1_plus_b_times_the_plain_one(name, backend):
    v, vectors, mask, offsets = golden(name)
    p = v["params"]
    weight = row_weight("token-mean", mask)
    rules = dict(gamma=half_life_to_gamma(p["tau"]), future_weight=p["b"], dual_clip=p["c"])
    out, gradient = run(backend, *vectors, mask.flatten(), offsets, weight, **rules)
    # The vectors' advantages were divided by a deviation + 1e-6; the factor is exact.
    _, plain = run(backend, *vectors, mask.flatten(), offsets, weight, dual_clip=p["c"])
    torch.testing.assert_close(gradient, v["expected"]["factor"] * plain, rtol=1e-12, atol=0)
    torch.testing.assert_close(
        gradient, torch.tensor(v["expected"]["grad"], dtype=torch.float64).flatten(), rtol=0, atol=1e-6
    )  # fmt: skip
    assert (out.future == 1).all()


@each_backend
def test_golden_rows_without_trained_tokens_and_scaling(backend):
    """F5: a row outside the mask enters nothing. F6: A (1 + b f), here through r = 1, where the
    loss is -A.
    """
    v = vector("F5")
    mask = torch.tensor(v["inputs"]["mask"], dtype=torch.bool)
    losses_ = torch.tensor(v["inputs"]["per_token_loss"], dtype=torch.float64)
    zero, offsets = torch.zeros(8, dtype=torch.float64), torch.tensor([0, 4, 8])
    for mode in ("token-mean", "seq-mean-token-mean"):
        weight = row_weight(mode, mask)
        out, gradient = run(backend, zero, zero, -losses_.flatten(), mask.flatten(), offsets, weight)  # fmt: skip
        close(v, out.loss, v["expected"][mode])
        assert out.tokens == 4 and not gradient[4:].any()
    v = vector("F6")
    i = {k: torch.tensor(x, dtype=torch.float64) for k, x in v["inputs"].items()}
    ahead = i["A_fut"].log()  # γ = 0: the future factor of a token is its own ratio
    zero, offsets = torch.zeros(4, dtype=torch.float64), torch.tensor([0, 4])
    rules = dict(gamma=0.0, future_weight=float(i["b"]), future_clip=(0.8, 1.2), clip_low=1.0, clip_high=9.0)  # fmt: skip
    _, gradient = run(backend, ahead, zero, i["A_base"], torch.ones(4), offsets, **rules)
    close(v, -gradient / i["A_fut"], v["expected"]["A"])


@each_backend
def test_future_term_reads_raw_positions_through_a_tool_result(backend):
    d = torch.tensor([0.1, 0.2, 9.0, 0.3], dtype=torch.float64)
    zero, mask = torch.zeros(4, dtype=torch.float64), torch.tensor([1, 1, 0, 1])
    rules = dict(gamma=0.5, future_clip=(0.0, 10.0), future_weight=1.0)
    out, _ = run(backend, d, zero, zero, mask, torch.tensor([0, 4]), **rules)
    want = torch.tensor([0.1 + 0.1 + 0.0375, 0.2 + 0.075, 0.15, 0.3], dtype=torch.float64)
    torch.testing.assert_close(out.future.log(), want, rtol=0, atol=1e-12)


@each_backend
def test_metrics(backend):
    logp, old_logp, advantage, mask, offsets, _ = problem([50, 60], seed=2)
    out, _ = run(backend, logp, old_logp, advantage, mask, offsets, **RULES["appo"])
    d, a = (logp - old_logp)[mask], advantage[mask]
    ratio = d.exp()
    clipped = ((a > 0) & (ratio > 1.28)) | ((a < 0) & (ratio < 0.8))
    want = [mask.sum(), clipped.sum(), (ratio - 1 - d).sum(), d.abs().sum(), (1 + 0.5 * out.future[mask]).sum()]  # fmt: skip
    got = [out.tokens, out.clipped, out.kl, out.log_ratio_abs, out.scale]
    torch.testing.assert_close(torch.stack(got), torch.stack([w.double() for w in want]))
    assert out.clipped > 0
    plain, _ = run(backend, logp, old_logp, advantage, mask, offsets)
    assert plain.scale == plain.tokens and plain.future.shape == (0,)


@each_backend
def test_hostile_values_behind_the_mask_change_nothing(backend):
    inputs = problem([30, 40], seed=3)
    want, exact = run(backend, *inputs, **RULES["both"])
    logp, old_logp, advantage, mask, offsets, weight = inputs
    for x, bad in ((logp, math.nan), (old_logp, -math.inf), (advantage, math.nan)):
        x[~mask] = bad
    out, gradient = run(backend, logp, old_logp, advantage, mask, offsets, weight, **RULES["both"])
    assert torch.equal(gradient, exact)
    for a, b in zip(out, want):
        assert torch.equal(a, b)


@each_backend
def test_nan_shows_in_the_loss_and_in_its_own_gradient(backend):
    logp, old_logp, advantage, _, offsets, weight = problem([4, 4], seed=4)
    logp[1] = math.nan
    out, gradient = run(backend, logp, old_logp, advantage, torch.ones(8), offsets, weight)
    assert out.loss.isnan()
    assert gradient.isnan().tolist() == [i == 1 for i in range(8)]
    rules = dict(gamma=0.5, future_weight=1.0)
    _, gradient = run(backend, logp, old_logp, advantage, torch.ones(8), offsets, weight, **rules)
    assert gradient[:2].isnan().all() and gradient[4:].isfinite().all()


@each_backend
def test_log_ratios_beyond_the_clamp_have_no_gradient(backend):
    d = torch.tensor([25.0, -25.0, 20.0, 3.0], dtype=torch.float64)
    zero, ones = torch.zeros_like(d), torch.ones(4)
    advantage = torch.tensor([-1.0, 1.0, -1.0, -1.0], dtype=torch.float64)
    inputs = (d, zero, advantage, ones.bool(), torch.tensor([0, 4]))
    out, gradient = run(backend, *inputs)
    loss, want = written_out(*inputs, None)
    torch.testing.assert_close((out.loss, gradient), (loss, want), rtol=1e-12, atol=0)
    assert (gradient == 0).tolist() == [True, True, False, False]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_native_equals_the_definition(data):
    if not HAS_NATIVE:
        pytest.skip("native library not built")
    lengths = data.draw(st.lists(st.integers(0, 300), max_size=4))
    inputs = problem(lengths, data.draw(st.integers(0, 2**31)), spread=data.draw(st.floats(0, 30)))
    rules = dict(
        gamma=data.draw(st.floats(0, 1)),
        future_weight=data.draw(st.floats(0, 3)),
        clip_low=data.draw(st.floats(0, 1)),
        clip_high=data.draw(st.floats(0, 5)),
        dual_clip=data.draw(st.one_of(st.none(), st.floats(1.01, 5))),
    )
    out, gradient = run("cpu", *inputs, **rules)
    want, exact = run("torch", *inputs, **rules)
    torch.testing.assert_close(gradient, exact, rtol=1e-10, atol=1e-12)
    for a, b in zip(out, want):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.skipif(not HAS_NATIVE, reason="native library not built")
def test_same_bits_for_any_thread_count_and_beside_other_rows():
    lengths = torch.randint(0, 9000, (60,), generator=torch.Generator().manual_seed(0)).tolist()
    inputs = problem(lengths, dtype=torch.float32)
    results = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        try:
            results.append(run("cpu", *inputs, **RULES["appo"]))
        finally:
            torch.set_num_threads(1)
    (a, grad_a), (b, grad_b) = results
    assert torch.equal(grad_a, grad_b) and all(torch.equal(x, y) for x, y in zip(a, b))
    cut = lengths[0] + lengths[1]
    alone = [x[:cut] for x in inputs[:4]]
    _, gradient = run("cpu", *alone, inputs[4][:3], inputs[5][:2], **RULES["appo"])
    assert torch.equal(gradient, grad_a[:cut])


@each_backend
def test_upstream_and_other_inputs(backend):
    """The gradient follows the upstream factor; integer offsets and masks, strided vectors; nothing
    but logp has one.
    """
    logp, old_logp, advantage, mask, offsets, weight = problem([20, 30], seed=6, dtype=torch.float32)  # fmt: skip
    _, want = run(backend, logp, old_logp, advantage, mask, offsets, weight)
    wide = torch.stack([logp, old_logp, advantage], dim=1)
    leaf, *rest = on(backend, *wide.unbind(1))
    leaf = leaf.detach().requires_grad_()
    rest[1] = rest[1].detach().requires_grad_()
    others = on(backend, mask.int(), offsets.int(), weight.float())
    out = policy_loss(leaf, *rest, *others, backend=backend)
    (3 * out.loss).backward()
    torch.testing.assert_close(leaf.grad.cpu(), 3 * want, rtol=1e-6, atol=1e-9)
    assert rest[1].grad is None
    assert not any(t.requires_grad for t in out[1:])
    with pytest.raises(RuntimeError, match="once_differentiable|does not require grad"):
        once = policy_loss(leaf, *rest, *others, backend=backend).loss
        (first,) = torch.autograd.grad(once, leaf, create_graph=True)
        first.sum().backward()


def test_compiled_graphs_do_not_break():
    logp, *rest = problem([20, 30])

    def loss(x):
        return policy_loss(x * 1.0, *rest, **RULES["appo"]).loss * 2

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    leaf, plain = logp.clone().requires_grad_(), logp.clone().requires_grad_()
    compiled(leaf).backward()
    loss(plain).backward()
    assert torch.equal(leaf.grad, plain.grad)


def test_wrong_arguments():
    x, o = torch.zeros(4), torch.tensor([0, 4])
    args = (x, x, x, x, o)
    for keywords, found in (
        (dict(gamma=1.5), "gamma is 1.5"),
        (dict(future_weight=0.5), "future_weight is 0.5 without gamma"),
        (dict(gamma=0.5, future_weight=-1.0), "future_weight is -1.0"),
        (dict(future_clip=(1.2, 1.0)), "future_clip is"),
        (dict(clip_low=1.5), "clip_low is 1.5"),
        (dict(clip_high=-0.1), "clip_high -0.1"),
        (dict(dual_clip=1.0), "dual_clip is 1.0"),
        (dict(backend="gpu"), "backend is 'gpu'"),
        (dict(row_weight=torch.ones(2)), r"row_weight has shape \(2,\)"),
    ):
        with pytest.raises(ValueError, match=found):
            policy_loss(*args, **keywords)
    with pytest.raises(ValueError, match=r"advantage \(3,\)"):
        policy_loss(x, x, x[:3], x, o)
    with pytest.raises(TypeError, match=r"logp is torch.int64"):
        policy_loss(x.long(), x, x, x, o)


@each_backend
@pytest.mark.parametrize("offsets", [[0, 3], [1, 4], [0, 3, 2, 4]])
def test_wrong_offsets(offsets, backend):
    (x,) = on(backend, torch.zeros(4))
    with pytest.raises(ValueError, match="offsets"):
        policy_loss(x, x, x, x, torch.tensor(offsets), backend=backend)
