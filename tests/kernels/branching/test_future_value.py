"""future_value and its tree variant: golden vectors, the plain recurrence as oracle, ragged segments, all backends."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.golden_vectors import vector
from support.packed_backends import on, packed_backends, packed_offsets, random_tree

from appo._kernels.common import native
from appo.kernels import future_value, half_life_to_gamma, tree_future_value

torch.set_num_threads(1)
HAS_NATIVE = native.load()[0] is not None
BACKENDS = packed_backends()


def scan(backend, x, mask, offsets, gamma):
    x, mask, offsets = on(backend, x, mask, offsets)
    return future_value(x, mask, offsets, gamma, backend=backend).cpu()


def plain(x, mask, offsets, gamma):
    """The recurrence, one token at a time."""
    out = [0.0] * len(x)
    for a, b in itertools.pairwise(offsets):
        ahead = 0.0
        for i in range(b - 1, a - 1, -1):
            ahead = (x[i] if mask[i] else 0.0) + (gamma * ahead if gamma else 0.0)
            out[i] = ahead
    return out


def double(values):
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["A1", "A2", "A3", "A4", "A5", "A9"])
def test_golden(name, backend):
    v = vector(name)
    x, mask = double(v["inputs"]["log_ratio"]), torch.tensor(v["inputs"]["mask"])
    s = scan(backend, x, mask, torch.tensor([0, len(x)]), v["params"]["gamma"])
    want = v["expected"]
    if "S" in want or "S_raw" in want:
        torch.testing.assert_close(
            s, double(want.get("S", want.get("S_raw"))), rtol=0, atol=v["tol"]
        )
    omega = double(want.get("omega", want.get("omega_raw")))
    torch.testing.assert_close(s.exp(), omega, rtol=0, atol=v["tol"])


@pytest.mark.parametrize("backend", BACKENDS)
def test_golden_loss_terms(backend):
    """A7 clamps each term, A8 drops non-participating tokens: both are the same scan on prepared inputs."""
    clamped, dropped = vector("A7"), vector("A8")
    one = torch.tensor([0, 4])
    x = double(clamped["inputs"]["log_ratio"]).clamp(-20, 20)
    got = scan(backend, x, torch.ones(4), one, clamped["params"]["gamma"])
    torch.testing.assert_close(got, double(clamped["expected"]["S"]), rtol=0, atol=clamped["tol"])
    x = double(dropped["inputs"]["log_ratio"])
    takes_part = x <= dropped["params"]["log_c"]
    assert takes_part.int().tolist() == dropped["expected"]["participates"]
    got = scan(backend, x, takes_part, one, dropped["params"]["gamma"])
    torch.testing.assert_close(got, double(dropped["expected"]["S"]), rtol=0, atol=dropped["tol"])


def test_half_life():
    v = vector("A10")
    got = [half_life_to_gamma(t) for t in v["inputs"]["tau"]]
    assert got == pytest.approx(v["expected"]["gamma"], abs=v["tol"])
    with pytest.raises(ValueError, match="half-life is 0"):
        half_life_to_gamma(0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("lengths", [[], [0], [1], [0, 0, 3], [1, 129, 0, 1, 64, 65], [1000]])
@pytest.mark.parametrize("gamma", [0.0, 0.9, 0.999, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ragged_segments(backend, lengths, gamma, dtype):
    if backend == "triton" and sum(lengths) == 1000 and dtype == torch.float64:
        pytest.skip("the interpreter takes seconds; float32 runs the same kernel")
    generator = torch.Generator().manual_seed(len(lengths))
    n = sum(lengths)
    x = torch.randn(n, generator=generator, dtype=dtype)
    mask = torch.rand(n, generator=generator) > 0.3
    offsets = packed_offsets(lengths)
    got = scan(backend, x, mask, offsets, gamma)
    want = double(plain(x.tolist(), mask.tolist(), offsets.tolist(), gamma))
    assert got.dtype == dtype
    # One rounding of the result for float32: the sum itself runs in float64.
    torch.testing.assert_close(
        got, want.to(dtype), rtol=1e-7 if dtype == torch.float32 else 1e-12, atol=1e-12
    )


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_backends_agree(data):
    lengths = data.draw(st.lists(st.integers(0, 40), max_size=6))
    n = sum(lengths)
    x = double(data.draw(st.lists(st.floats(-300, 300), min_size=n, max_size=n)))
    mask = torch.tensor(
        data.draw(st.lists(st.booleans(), min_size=n, max_size=n)), dtype=torch.bool
    )
    gamma = data.draw(st.floats(0, 1))
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    want = double(plain(x.tolist(), mask.tolist(), offsets.tolist(), gamma))
    for backend in ["torch", *(["cpu"] if HAS_NATIVE else [])]:
        got = future_value(x, mask, offsets, gamma, backend=backend)
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-10)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("gamma", [0.0, 0.5])
def test_nan_stays_in_its_segment_and_behind_the_mask(backend, gamma):
    x = torch.tensor([1.0, math.nan, 1.0, 2.0, math.nan, 2.0])
    mask = torch.tensor([True, False, True, True, True, True])
    got = scan(backend, x, mask, torch.tensor([0, 3, 6]), gamma)
    assert got[:3].tolist() == [1 + gamma**2, gamma, 1.0]
    assert got[3].isnan() == (gamma > 0)
    assert got[4].isnan()
    assert got[5] == 2.0


@pytest.mark.parametrize("backend", BACKENDS)
def test_other_layouts(backend):
    """Non-contiguous input, bfloat16, integer mask, int32 offsets, a tensor that requires grad."""
    x = torch.arange(8.0)[::2].requires_grad_()
    ones, offsets = torch.ones(4, dtype=torch.int32), torch.tensor([0, 4], dtype=torch.int32)
    got = scan(backend, x, ones, offsets, 1.0)
    assert got.tolist() == [12.0, 12.0, 10.0, 6.0]
    assert not got.requires_grad
    half = scan(backend, x.bfloat16(), torch.ones(4), torch.tensor([0, 4]), 1.0)
    assert half.dtype == torch.bfloat16
    assert half.tolist() == got.tolist()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("offsets", [[0, 3], [1, 4], [0, 3, 2, 4], [0, 5], []])
def test_wrong_offsets(backend, offsets):
    with pytest.raises(ValueError, match="offsets"):
        future_value(
            *on(backend, torch.ones(4), torch.ones(4)),
            torch.tensor(offsets, dtype=torch.int64),
            0.5,
            backend=backend,
        )


def test_wrong_arguments():
    x, o = torch.ones(4), torch.tensor([0, 4])
    with pytest.raises(ValueError, match="gamma is 1.5"):
        future_value(x, x, o, 1.5)
    with pytest.raises(ValueError, match=r"gamma is nan"):
        future_value(x, x, o, math.nan)
    with pytest.raises(ValueError, match=r"offsets \(0,\)"):
        future_value(x, x, o[:0], 0.5)
    with pytest.raises(ValueError, match="backend is 'cuda'"):
        future_value(x, x, o, 0.5, backend="cuda")
    with pytest.raises(ValueError, match=r"mask \(3,\)"):
        future_value(x, x[:3], o, 0.5)


@pytest.mark.skipif(not HAS_NATIVE, reason="native library not built")
def test_same_bits_for_any_thread_count():
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(0, 9000, (80,), generator=generator)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    n = int(offsets[-1])
    assert n > 4 * 65536  # enough for several threads to start
    x, mask = torch.randn(n, generator=generator), torch.rand(n, generator=generator) > 0.2
    one = future_value(x, mask, offsets, 0.98, backend="cpu", threads=1)
    for threads in (2, 3, 64):
        assert torch.equal(
            one, future_value(x, mask, offsets, 0.98, backend="cpu", threads=threads)
        )
    torch.testing.assert_close(
        one, future_value(x, mask, offsets, 0.98, backend="torch"), rtol=1e-6, atol=1e-6
    )


# -- along a tree ----------------------------------------------------------------------------------


def plain_tree(x, mask, offsets, parents, weights, gamma):
    """F of every token by following the definition, the last node first."""
    out, first = [0.0] * len(x), [0.0] * len(parents)
    for node in range(len(parents) - 1, -1, -1):
        children = [c for c, p in enumerate(parents) if p == node]
        ahead = sum(
            (1 / len(children) if weights is None else weights[c]) * first[c] for c in children
        )
        for i in range(offsets[node + 1] - 1, offsets[node] - 1, -1):
            ahead = out[i] = (x[i] if mask[i] else 0.0) + gamma * ahead
        first[node] = ahead
    return out


def tree_scan(backend, x, mask, offsets, parents, gamma, weights=None):
    x, mask = on(backend, x, mask)
    return tree_future_value(
        x, mask, offsets, parents, gamma, weights=weights, backend=backend
    ).cpu()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("gamma", [0.0, 0.9, 1.0])
@pytest.mark.parametrize("lengths", [[], [3], [0, 2, 0, 3], [40, 70, 1, 0, 65, 5, 9]])
def test_tree_against_the_definition(backend, lengths, gamma):
    generator = torch.Generator().manual_seed(len(lengths))
    n = sum(lengths)
    x = torch.randn(n, generator=generator, dtype=torch.float64)
    mask = torch.rand(n, generator=generator) > 0.2
    offsets, parents = packed_offsets(lengths), random_tree(len(lengths), generator)
    given = torch.randn(len(lengths), generator=generator, dtype=torch.float64)
    lists = [t.tolist() for t in (x, mask, offsets, parents)]
    for weights in (None, given):
        got = tree_scan(backend, x, mask, offsets, parents, gamma, weights)
        want = plain_tree(*lists, None if weights is None else weights.tolist(), gamma)
        torch.testing.assert_close(got, double(want), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_chain_of_nodes_is_one_segment(backend):
    x = torch.randn(90, generator=torch.Generator().manual_seed(1))
    mask = torch.ones(90)
    got = tree_scan(backend, x, mask, packed_offsets([20, 0, 30, 40]), torch.arange(-1, 3), 0.97)
    want = scan(backend, x, mask, packed_offsets([90]), 0.97)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-7)
    alone = tree_scan(backend, x, mask, packed_offsets([20, 70]), torch.tensor([-1, -1]), 0.97)
    want = scan(backend, x, mask, packed_offsets([20, 70]), 0.97)
    torch.testing.assert_close(alone, want, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("backend", BACKENDS)
def test_branches_average_and_a_weight_of_zero_hides_a_child(backend):
    """Root of 2 tokens with two branches of 1: what lies ahead of the root is their mean."""
    x = torch.tensor([1.0, 2.0, 4.0, math.nan])
    tree = (torch.ones(4), packed_offsets([2, 1, 1]), torch.tensor([-1, 0, 0]), 0.5)
    assert tree_scan(backend, x, *tree)[:2].isnan().all()
    only = tree_scan(backend, x, *tree, weights=torch.tensor([1.0, 1.0, 0.0]))
    assert only[:3].tolist() == [3.0, 4.0, 4.0]
    x[3] = 8.0
    assert tree_scan(backend, x, *tree).tolist() == [3.5, 5.0, 4.0, 8.0]


@pytest.mark.parametrize("backend", BACKENDS)
def test_wrong_trees(backend):
    x, offsets = torch.ones(4), packed_offsets([2, 2])
    for parents, found in (
        ([-1, 1], r"parents\[1\] is 1"),
        ([-2, 0], r"parents\[0\] is -2"),
        ([0], "expected"),
    ):
        with pytest.raises(ValueError, match=found):
            tree_scan(backend, x, x, offsets, torch.tensor(parents), 0.5)
    with pytest.raises(ValueError, match="weights must be finite"):
        tree_scan(backend, x, x, offsets, torch.tensor([-1, 0]), 0.5, torch.tensor([1.0, math.nan]))
    with pytest.raises(ValueError, match="offsets"):
        tree_scan(backend, x, x, packed_offsets([2, 3]), torch.tensor([-1, 0]), 0.5)
