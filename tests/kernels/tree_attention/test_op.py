"""Tree attention: every backend against the dense definition in float64, and the definition against sequences on their own."""

import functools
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from support.attention_problems import (
    HEADS,
    LARGE,
    LARGE_HEADS,
    TREES,
    error,
    exact,
    forks_at_both_ends,
    problem,
    random_ends,
    run,
)
from support.head_backends import backend_params, dtype_of, relative

from appo._kernels.common.backends import native_isa
from appo._kernels.tree_attention import backend_cpu as attention_cpu
from appo._kernels.tree_attention import backend_torch as attention_torch
from appo._kernels.tree_attention.op import Saved, TreeCall, backward_op, check_tree, forward_op
from appo.kernels import tree_attention

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, in the interpreter

BENCH = Path(__file__).parents[2] / "bench"
backends = pytest.mark.parametrize("backend", backend_params("torch", "cpu", "triton"))
native = pytest.mark.skipif(native_isa() is None, reason="the native kernels do not run here")


# -- the definition


def leaves_of(subtree_end):
    """The paths to the tokens under which nothing stands, as stream indices."""
    seen = attention_torch.visible(subtree_end, 0, subtree_end.shape[0])
    last = [i for i in range(subtree_end.shape[0]) if not seen[i + 1 :, i].any()]
    return [seen[i].nonzero()[:, 0] for i in last]


@pytest.mark.parametrize("name", ["forks at both ends", "wide fork", "random 100"])
def test_the_definition_is_every_sequence_on_its_own(name):
    """Outputs of each path, and shared keys that get the sum of the gradients of all paths."""
    subtree_end = TREES[name]
    q, k, v, *_ = (x.double().requires_grad_() for x in problem(subtree_end, 4, 2, 8))
    o, _ = attention_torch.dense(q, k, v, subtree_end, 8**-0.5)
    weight = torch.randn(o.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    first, alone, tree = (
        torch.zeros(subtree_end.shape[0], dtype=torch.bool),
        0.0,
        (o * weight).sum(),
    )
    for path in leaves_of(subtree_end):
        heads = (x[path].transpose(0, 1)[None] for x in (q, k, v))
        own = F.scaled_dot_product_attention(*heads, is_causal=True, enable_gqa=True)[0]
        torch.testing.assert_close(own.transpose(0, 1), o[path], rtol=1e-12, atol=1e-12)
        new = ~first[path]  # every token once, in whatever sequence it comes first
        first[path] = True
        alone = alone + (own.transpose(0, 1)[new] * weight[path][new]).sum()
    a, b = (torch.autograd.grad(x, (q, k, v), retain_graph=True) for x in (tree, alone))
    for x, y in zip(a, b):
        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("how", ["dense", "torch"])
def test_gradients_of_the_definition(how):
    subtree_end = forks_at_both_ends()
    q, k, v, *_ = (x.double().requires_grad_() for x in problem(subtree_end, 4, 2, 3))
    call = {
        "dense": lambda *x: attention_torch.dense(*x, subtree_end, 0.7),
        "torch": lambda *x: tree_attention(*x, subtree_end, scale=0.7, return_lse=True),
    }[how]
    assert torch.autograd.gradcheck(call, (q, k, v), fast_mode=True)


# -- every backend against it


@backends
@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("name", TREES)
def test_small_trees(backend, name, heads):
    if backend == "triton" and name.startswith(("random", "wide")) and heads != HEADS[2]:
        pytest.skip("once is enough in the interpreter")
    subtree_end = TREES[name]
    inputs = problem(subtree_end, *heads)
    assert error(run(backend, subtree_end, *inputs), exact(subtree_end, *inputs)) < 1e-5


@pytest.mark.parametrize("backend", backend_params("torch", "cpu"))
@pytest.mark.parametrize("heads", LARGE_HEADS, ids=str)
@pytest.mark.parametrize("name", LARGE)
def test_large_trees(backend, name, heads):
    subtree_end = LARGE[name]
    inputs = problem(subtree_end, *heads)
    assert error(run(backend, subtree_end, *inputs), exact(subtree_end, *inputs)) < 1e-5


def sdpa(subtree_end, q, k, v, d_o):
    """torch's attention with the mask, in the dtype of the inputs: (o, dq, dk, dv)."""
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    mask = attention_torch.visible(subtree_end, 0, subtree_end.shape[0])
    heads = (x.transpose(0, 1)[None] for x in leaves)
    o = F.scaled_dot_product_attention(*heads, attn_mask=mask, enable_gqa=True)[0].transpose(0, 1)
    return [o.detach(), *torch.autograd.grad(o, leaves, d_o)]


@backends
@pytest.mark.parametrize("heads", LARGE_HEADS[:2], ids=str)
@pytest.mark.parametrize("name", ["random 515", "random 700", "chain of 300"])
def test_bfloat16_is_no_worse_than_dense_attention(backend, name, heads):
    if dtype_of(backend) != torch.bfloat16:
        pytest.skip("the interpreter computes bfloat16 wrongly")
    subtree_end = LARGE[name]
    q, k, v, d_o, _ = problem(subtree_end, *heads, dtype=torch.bfloat16)
    none = torch.zeros(q.shape[:2])
    o, _, *grads = exact(subtree_end, q, k, v, d_o, none)
    ours, _, *our_grads = run(backend, subtree_end, q, k, v, d_o, none)
    for got, dense, want in zip([ours, *our_grads], sdpa(subtree_end, q, k, v, d_o), [o, *grads]):
        assert got.dtype == torch.bfloat16
        assert relative(got, want) <= 1.02 * relative(dense, want)


ISAS = ["avx512_bf16", "avx512", "avx2"]


@native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("isa", ISAS)
def test_every_instruction_set_and_number_of_threads(isa, dtype):
    """Within the rounding of the dtype, and the same bits with 1, 2 and 5 threads."""
    if ISAS.index(isa) < ISAS.index(native_isa()):
        pytest.skip(f"this machine has {native_isa()}")
    if isa == "avx512_bf16" and dtype != torch.bfloat16:
        pytest.skip("for bfloat16 only")
    subtree_end = random_ends(1100, 5)
    q, k, v, d_o, d_lse = problem(subtree_end, 9, 3, 64, dtype=dtype)
    call = TreeCall(q, k, v, subtree_end, 0.125)

    def both(threads):
        o, lse = attention_cpu.forward(call, isa=isa, threads=threads)
        kept = Saved(o, lse)
        return o, lse, *attention_cpu.backward(call, kept, d_o, d_lse, isa=isa, threads=threads)

    alone = both(1)
    bound = {torch.float32: 1e-5, torch.bfloat16: 5e-3, torch.float16: 5e-4}[dtype]
    assert error(alone, exact(subtree_end, q, k, v, d_o, d_lse)) < bound
    for threads in (2, 5):
        assert all(map(torch.equal, alone, both(threads)))


@native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("heads", [(1, 1), (40, 1), (300, 1), (6, 6)], ids=str)
@pytest.mark.parametrize("dim", [1, 15, 33, 256])
def test_odd_sizes(dim, heads, dtype):
    """Heads that are no multiple of a vector, one query head to hundreds per key head; tiles of odd numbers of rows."""
    subtree_end = random_ends(37, 4)
    inputs = problem(subtree_end, *heads, dim, dtype=dtype)
    bound = 1e-5 if dtype == torch.float32 else 1e-2
    assert error(run("cpu", subtree_end, *inputs), exact(subtree_end, *inputs)) < bound


@native
@pytest.mark.parametrize("fill", ["decreasing", "beyond", "behind", "anything"])
def test_native_code_survives_what_python_refuses(fill):
    """Ends that are no tree, past the check: wrong numbers may come out, but it neither hangs nor leaves its memory."""
    n = 700
    at, g = torch.arange(n), torch.Generator().manual_seed(0)
    far = torch.iinfo(torch.int32)
    subtree_end = {
        "decreasing": n - at,
        "beyond": torch.full((n,), far.max),
        "behind": torch.where(at % 2 == 0, at - 5, far.min),
        "anything": torch.randint(far.min, far.max, (n,), generator=g),
    }[fill].int()
    with pytest.raises(ValueError, match="subtree_end"):
        check_tree(subtree_end)
    q, k, v, d_o, d_lse = problem(subtree_end, 6, 2, 64)
    call = TreeCall(q, k, v, subtree_end, 0.125)
    for threads in (1, 4):
        kept = Saved(*attention_cpu.forward(call, threads=threads))
        grads = attention_cpu.backward(call, kept, d_o, d_lse, threads=threads)
    assert [g.shape for g in grads] == [q.shape, k.shape, v.shape]


@native
def test_a_row_depends_on_what_it_sees_only():
    """The bits of a tree do not change when another tree is put in front of the block that it lies in."""
    one, subtree_end = random_ends(128, 1), random_ends(200, 7)
    both = torch.cat([one, subtree_end + 128])
    inputs = problem(both, 4, 2, 32, dtype=torch.bfloat16)
    together, alone = run("cpu", both, *inputs), run("cpu", subtree_end, *(x[128:] for x in inputs))
    for a, b in zip(together[:2], alone[:2]):
        assert torch.equal(a[128:], b)


# -- hostile input


@backends
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["q", "k", "v", "d_o"])
def test_what_is_not_finite_stays_with_those_who_see_it(backend, where, bad):
    """A token of one branch is spoilt: its siblings and their descendants, outputs and gradients, keep their bits."""
    # prompt 6 · branch of 10 (spoilt at its 4th token) with a child of 5 · branch of 20 · another tree of 9
    subtree_end = torch.tensor([41] * 6 + [21] * 15 + [41] * 20 + [50] * 9)
    inputs = dict(zip(("q", "k", "v", "d_o", "d_lse"), problem(subtree_end, 4, 2, 16)))
    clean = run(backend, subtree_end, **inputs)
    inputs[where][9, 0, 3] = bad
    o, lse, dq, dk, dv = run(backend, subtree_end, **inputs)
    others = torch.ones(50, dtype=torch.bool)
    others[9 : 10 if where in ("q", "d_o") else 21] = False  # a key spoils all that stand under it
    group = slice(0, 1) if where in ("q", "d_o") else slice(0, 2)  # heads
    for got, before in zip((o, lse, dq), (clean[0], clean[1], clean[2])):
        assert torch.equal(got[others], before[others])
        if where != "d_o" or got is dq:
            assert got[~others][:, group].isnan().all()
    beyond = torch.ones(50, dtype=torch.bool)
    beyond[:21] = False  # no key that a spoilt query sees
    assert torch.equal(dk[beyond], clean[3][beyond])
    assert torch.equal(dv[beyond], clean[4][beyond])
    assert dk[:6, 0].isnan().all() and dv[:6, 0].isnan().all()


@backends
def test_large_scores_do_not_overflow(backend):
    subtree_end = TREES["random 100"]
    q, k, v, d_o, d_lse = problem(subtree_end, 2, 1, 16)
    inputs = (300 * q, k, v, d_o, d_lse)
    got, want = run(backend, subtree_end, *inputs), exact(subtree_end, *inputs)
    assert all(bool(x.isfinite().all()) for x in got)
    assert error(got[:2], want[:2]) < 1e-3  # scores of a thousand, rounded to float32


@backends
def test_nothing_to_do(backend):
    q, k, v = (torch.zeros(0, h, 8, requires_grad=True) for h in (4, 2, 2))
    o = tree_attention(q, k, v, torch.zeros(0, dtype=torch.int32), backend=backend)
    assert o.shape == (0, 4, 8)
    o.sum().backward()
    assert k.grad.shape == (0, 2, 8)


TWO = torch.zeros(2, 2, 4)


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        (dict(subtree_end=torch.tensor([2, 1])), ValueError, r"subtree_end\[1\] is 1, expected 2 … 2"),
        (dict(subtree_end=torch.tensor([0, 2])), ValueError, r"subtree_end\[0\] is 0"),
        (dict(subtree_end=torch.tensor([2, 3])), ValueError, r"subtree_end\[1\] is 3"),
        (dict(subtree_end=torch.tensor([2, -5])), ValueError, r"subtree_end\[1\] is -5"),
        (dict(subtree_end=torch.tensor([2**32 + 2, 2])), ValueError, r"subtree_end\[0\] is 2147483647, expected 1 … 2"),
        (dict(subtree_end=torch.tensor([2 - 2**32, 2])), ValueError, r"subtree_end\[0\] is -2147483648"),
        (dict(subtree_end=torch.tensor([2, 2], dtype=torch.uint32)), TypeError, "subtree_end is torch.uint32"),
        (dict(subtree_end=torch.tensor([2])), ValueError, r"subtree_end is \(1,\), expected \[2\]"),
        (dict(subtree_end=torch.tensor([2.0, 2.0])), TypeError, "subtree_end is torch.float32"),
        (dict(subtree_end=torch.tensor([True, True])), TypeError, "subtree_end is torch.bool"),
        (dict(q=torch.zeros(2, 3, 4)), ValueError, "Hkv must divide Hq"),
        (dict(q=torch.zeros(2, 2, 5)), ValueError, "expected \\[N, Hq, D\\]"),
        (dict(v=torch.zeros(2, 1, 4)), ValueError, "expected \\[N, Hq, D\\]"),
        (dict(v=TWO.double()), TypeError, "one floating-point dtype"),
        (dict(q=TWO.int(), k=TWO.int(), v=TWO.int()), TypeError, "one floating-point dtype"),
        (dict(scale=math.nan), ValueError, "scale is nan"),
        (dict(backend="gpu"), ValueError, "backend is 'gpu', expected one of 'auto'"),
        (dict(backend="cpu", q=TWO.double(), k=TWO.double(), v=TWO.double()), TypeError, "backend='cpu' takes"),
    ],
)  # fmt: skip
def test_wrong_input_is_refused(change, kind, message):
    arguments = dict(q=TWO, k=TWO, v=TWO, subtree_end=torch.tensor([2, 2])) | change
    with pytest.raises(kind, match=message):
        tree_attention(**arguments)


def test_crossing_intervals_are_found():
    """One end moved in many trees: refused exactly where two intervals cross, with both tokens in the message."""
    with pytest.raises(
        ValueError,
        match=r"subtree_end\[1\] is 3 and subtree_end\[2\] is 4: token 2 lies in the subtree of token 1",
    ):
        check_tree(torch.tensor([4, 3, 4, 4]))  # fmt: skip
    for seed in range(60):
        subtree_end = random_ends(40, seed)
        check_tree(subtree_end)
        i = seed % 39
        subtree_end[i] = i + 1 + (seed * 7) % (40 - i)
        crossing = any(
            a < b < subtree_end[a] < subtree_end[b]
            for a in range(40)
            for b in range(a + 1, int(subtree_end[a]))
        )
        if crossing:
            with pytest.raises(ValueError, match="lies in the subtree"):
                check_tree(subtree_end)
        else:
            check_tree(subtree_end)


# -- the operator


@pytest.mark.parametrize("backend", backend_params("torch", "cpu"))
def test_strides_and_integer_types(backend):
    """Heads first as transformers has them, a head in every second number, int64 ends: the same bits."""
    subtree_end = TREES["random 131"]
    inputs = problem(subtree_end, 4, 2, 16)
    want = run(backend, subtree_end, *inputs)
    first = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in inputs]
    apart = [torch.stack([x, x], -1).flatten(-2)[..., ::2] for x in inputs]
    for other in (first, apart):
        assert not any(x.is_contiguous() for x in other[:4])
        assert all(map(torch.equal, want, run(backend, subtree_end.long(), *other)))


def test_compile_without_a_graph_break():
    subtree_end = TREES["random 100"]
    inputs = [x.requires_grad_() for x in problem(subtree_end, 4, 2, 16)[:3]]

    def loss(q, k, v):
        return tree_attention(q * 1.0, k, v, subtree_end).square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    a, b = (torch.autograd.grad(f(*inputs), inputs) for f in (loss, compiled))
    assert all(map(torch.equal, a, b))


@pytest.mark.parametrize("backend", backend_params("torch", "cpu"))
def test_operators_keep_their_promises(backend):
    subtree_end = random_ends(20, 1)
    q, k, v, d_o, d_lse = problem(subtree_end, 4, 2, 8, dtype=torch.bfloat16)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(forward_op, (q, k, v, subtree_end, 0.5, backend), test_utils=tests)
    kept = forward_op(q, k, v, subtree_end, 0.5, backend)
    for d in (d_lse, None):
        args = (q, k, v, subtree_end, 0.5, *kept, d_o, d, backend)
        torch.library.opcheck(backward_op, args, test_utils=tests)


def test_gradients_of_part_of_the_results():
    """Only o, only lse, only one input: what is not asked for is not there, the rest as always."""
    subtree_end = TREES["random 100"]
    q, k, v, d_o, d_lse = problem(subtree_end, 2, 1, 8)
    zero = torch.zeros_like
    for o_part, lse_part in ((d_o, zero(d_lse)), (zero(d_o), d_lse)):
        leaf = k.clone().requires_grad_()
        o, lse = tree_attention(q, leaf, v, subtree_end, return_lse=True)
        (o * d_o).sum().backward() if o_part is d_o else (lse * d_lse).sum().backward()
        want = exact(subtree_end, q, k, v, o_part, lse_part)
        assert relative(leaf.grad, want[3]) < 1e-5


# -- faults that must not pass


def planted(monkeypatch, fault):
    """The torch backend with a fault in it."""
    visible = attention_torch.visible

    def causal(subtree_end, first, last):
        return visible(torch.full_like(subtree_end, subtree_end.shape[0]), first, last)

    def early(subtree_end, first, last):
        at = torch.arange(subtree_end.shape[0], dtype=subtree_end.dtype)
        return visible(torch.maximum(subtree_end - 1, at + 1), first, last)

    def late(subtree_end, first, last):
        return visible((subtree_end + 1).clamp(max=subtree_end.shape[0]), first, last)

    def averaged(call, kept, d_o, d_lse):
        dq, dk, dv = backward(call, kept, d_o, d_lse)
        users = visible(call.subtree_end, 0, call.subtree_end.shape[0]).sum(0)[:, None, None]
        return dq, dk / users, dv / users

    faults = {"causal": causal, "early": early, "late": late}
    backward = attention_torch.backward
    if fault == "averaged":
        monkeypatch.setattr(attention_torch, "backward", averaged)
    else:
        monkeypatch.setattr(attention_torch, "visible", faults[fault])


@pytest.mark.parametrize("fault", ["causal", "early", "late", "averaged"])
@pytest.mark.parametrize("name", ["forks at both ends", "random 131"])
def test_seeded_faults_are_caught(monkeypatch, name, fault):
    """A plain causal mask, subtrees that end one token early or late, gradients of shared keys averaged instead of summed."""
    subtree_end = TREES[name]
    inputs = problem(subtree_end, 4, 2, 16)
    want = exact(subtree_end, *inputs)
    planted(monkeypatch, fault)
    assert error(run("torch", subtree_end, *inputs), want) > 1e-2


# -- memory


@native
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
@pytest.mark.parametrize("backward", [False, True])
def test_memory_grows_with_the_tokens(backward):
    """Resident bytes at twice the tokens: twice, not four times; a mask alone would take 63 and 268 MB."""
    from bench.common import in_fresh_process
    from bench.kernels.tree_attention import Shape, memory

    measure = functools.partial(in_fresh_process, memory, "ours")
    small, large = (measure(Shape(n, 1, 256, 512), backward) for n in (10, 21))
    assert large < 2.4 * small + 4
    assert large < 100
