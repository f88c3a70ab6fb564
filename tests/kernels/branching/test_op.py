"""Branching Score and selection: golden vectors, ties, flat vectors, NaN, shortfall, pooling."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.golden_vectors import vector
from support.packed_backends import on, packed_backends, packed_offsets

from appo._kernels.common import native
from appo.kernels import (
    BranchPoints,
    BranchScores,
    branch_scores,
    future_value,
    select_branch_points,
)

torch.set_num_threads(1)
BACKENDS = packed_backends()
each_backend = pytest.mark.parametrize("backend", BACKENDS)


def double(values):
    return torch.tensor(values, dtype=torch.float64)


def packed(name):
    """(scores keyword → tensors, eligible, offsets, params, expected) of a C vector."""
    v = vector(name)
    rollouts = v["inputs"]["rollouts"]
    joined = {key: [x for r in rollouts for x in r[key]] for key in rollouts[0]}
    offsets = torch.tensor([0, *(len(r["mask"]) for r in rollouts)]).cumsum(0)
    mask = torch.tensor(joined["mask"]).bool()
    eligible = mask & ~torch.tensor(joined["blank"]).bool()
    return double(joined["entropy"]), double(joined["log_ratio"]), mask, eligible, offsets, v


def score(backend, entropy, log_ratio, mask, offsets, **kwargs):
    inputs = on(backend, entropy, log_ratio, mask, offsets)
    return BranchScores(*(t.cpu() for t in branch_scores(*inputs, **kwargs, backend=backend)))


def select(backend, scores, eligible, offsets, groups, k, variant="paper"):
    """As select_branch_points; Triton ranks float32 scores."""
    if backend == "triton":
        scores = BranchScores(*(t.float() for t in scores[:4]), scores.omega_uninformative)
    scores = BranchScores(*on(backend, *scores))
    eligible, offsets, groups = on(backend, eligible, offsets, groups)
    points = select_branch_points(scores, eligible, offsets, groups, k, variant, backend=backend)
    return BranchPoints(points.index.cpu(), points.count.cpu(), points.rule.cpu())


def run(backend, name, variant, pooled=False, k=None):
    entropy, log_ratio, mask, eligible, offsets, v = packed(name)
    params = v["params"]
    scores = score(
        backend,
        entropy,
        log_ratio,
        mask,
        offsets,
        gamma=params["gamma"],
        clip=params["clip_eps"],
        variant=variant,
    )
    segments = offsets.shape[0] - 1
    groups = torch.zeros(segments, dtype=torch.int64) if pooled else None
    points = select(backend, scores, eligible, offsets, groups, k or params["budget"], variant)
    return scores, points, offsets, v


def as_pairs(index, offsets):
    """Packed positions → [[rollout, position], …], unfilled slots left out."""
    pairs = []
    for i in index.tolist():
        if i >= 0:
            rollout = int((offsets[1:] <= i).sum())
            pairs.append([rollout, i - int(offsets[rollout])])
    return pairs


GOLDEN = ["C1", "C2", "C3", "C4", "C5", "C6", "C7", "C11", "C12", "C13"]


@each_backend
@pytest.mark.parametrize("variant", ["paper", "released"])
@pytest.mark.parametrize("name", GOLDEN)
def test_golden_scores(name, variant, backend):
    scores, _, offsets, v = run(backend, name, variant)
    for i, want in enumerate(v["expected"].get("per_rollout", [])):
        part = slice(int(offsets[i]), int(offsets[i + 1]))
        for key, values in want.items():
            torch.testing.assert_close(
                getattr(scores, key)[part], double(values), rtol=0, atol=v["tol"]
            )
    if name == "C12":
        torch.testing.assert_close(
            scores.z_entropy, double(v["expected"]["z_entropy"]), rtol=0, atol=v["tol"]
        )


@each_backend
@pytest.mark.parametrize("name", GOLDEN)
def test_golden_released_selection(name, backend):
    _, points, offsets, v = run(backend, name, "released", pooled=True)
    assert as_pairs(points.index[0], offsets) == v["expected"]["selected"]
    assert points.count.tolist() == [len(v["expected"]["selected"])]
    strict = [
        p
        for p, rule in zip(as_pairs(points.index[0], offsets), points.rule[0].tolist())
        if rule == 0
    ]
    if "strict" in v["expected"]:
        assert all(p in v["expected"]["strict"] for p in strict)
        assert len(strict) == min(len(v["expected"]["strict"]), v["params"]["budget"])


@each_backend
def test_paper_fills_with_entropy_when_omega_is_flat(backend):
    scores, points, offsets, v = run(backend, "C3", "paper")
    assert scores.omega_uninformative.tolist() == [True]
    assert as_pairs(points.index[0], offsets) == v["expected"]["entropy_fallback_selection"]
    assert points.rule.tolist() == [[1, 1, 1]]


@each_backend
def test_paper_never_takes_two_negatives(backend):
    """C4: position 0 has the highest product of two negative z; the paper variant must not choose it."""
    _, points, offsets, v = run(backend, "C4", "paper")
    assert v["expected"]["selected"][-1] == [0, 0]
    assert as_pairs(points.index[0], offsets) == [[0, 2], [0, 3]]
    assert (points.count.tolist(), points.index[0, 2].item(), points.rule[0].tolist()) == (
        [2],
        -1,
        [0, 0, -1],
    )


@each_backend
def test_paper_second_place_by_entropy(backend):
    """C13: one strict candidate; the next is the largest positive z of entropy, not the raw product."""
    _, points, offsets, _ = run(backend, "C13", "paper")
    assert as_pairs(points.index[0], offsets) == [[0, 3], [0, 5]]
    assert points.rule.tolist() == [[0, 1]]


@each_backend
def test_budget_per_root_or_pooled(backend):
    _, each, offsets, v = run(backend, "C6", "paper", k=1)
    assert [as_pairs(row, offsets)[0] for row in each.index] == v["expected"]["paper_top1_each"]
    _, pooled, offsets, v = run(backend, "C6", "paper", pooled=True)
    assert as_pairs(pooled.index[0], offsets) == v["expected"]["selected"]


@each_backend
@pytest.mark.parametrize("n", vector("C14")["inputs"]["n"])
def test_saturated_omega_is_exactly_flat(n, backend):
    """C14: every Ω at the lower clip, in float32: z must be 0, not the rounding of a mean."""
    if backend == "triton" and n > 200:
        pytest.skip("the interpreter takes seconds")
    log_ratio = torch.full((n,), -5.0)  # float32
    entropy = torch.rand(n, generator=torch.Generator().manual_seed(n))
    offsets = torch.tensor([0, n])
    mask = torch.ones(n, dtype=torch.bool)
    scores = score(backend, entropy, log_ratio, mask, offsets, gamma=0.5, clip=0.2)
    assert torch.equal(scores.omega, torch.full((n,), 0.8))
    assert torch.count_nonzero(scores.z_omega) == 0
    points = select(backend, scores, mask, offsets, None, 3)
    assert scores.omega_uninformative.tolist() == [True]
    assert points.rule.tolist() == [[1, 1, 1]]


@each_backend
def test_sum_clamp(backend):
    """A6: the sum is clamped at ±20 before exp, and the clip afterwards is the same from either side."""
    v = vector("A6")
    for sign in ("pos", "neg"):
        x = double(v["inputs"][f"log_ratio_{sign}"])
        mask, offsets = torch.ones(4), torch.tensor([0, 4])
        s = future_value(x, mask, offsets, 1.0).clamp(-20, 20)
        assert s.tolist() == v["expected"][f"S_{sign}"]
        scores = score(backend, x, x, mask, offsets, gamma=1.0, clip=0.2)
        torch.testing.assert_close(
            scores.omega, double(v["expected"][f"clip_{sign}"]), rtol=0, atol=v["tol"]
        )
    huge = torch.full((3,), 1e30)
    scores = score(
        backend, huge.clone(), huge, torch.ones(3), torch.tensor([0, 3]), gamma=1.0, clip=0.2
    )
    assert torch.isfinite(scores.omega).all()


def by_hand(entropy, log_ratio, mask, gamma, clip):
    """A second, naive implementation of the score for one segment."""
    n = len(mask)
    ahead = [sum(gamma ** (k - i) * log_ratio[k] * mask[k] for k in range(i, n)) for i in range(n)]
    omega = [min(max(math.exp(min(max(s, -20), 20)), 1 - clip), 1 + clip) for s in ahead]

    def z(x):
        kept = [v for v, m in zip(x, mask) if m]
        mean = sum(kept) / max(len(kept), 1)
        std = math.sqrt(sum((v - mean) ** 2 for v in kept) / max(len(kept), 1))
        return [(v - mean) / (std + 1e-6) if m else 0.0 for v, m in zip(x, mask)]

    return omega, z(entropy), z(omega)


@each_backend
@pytest.mark.parametrize("lengths", [[], [0], [1], [2, 0, 3, 1], [129, 64]])
def test_scores_against_plain_python(lengths, backend):
    generator = torch.Generator().manual_seed(7)
    n = sum(lengths)
    entropy, log_ratio = (
        torch.randn(2, n, generator=generator, dtype=torch.float64) * 0.3
    ).unbind()
    mask = torch.rand(n, generator=generator) > 0.25
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    scores = score(backend, entropy, log_ratio, mask, offsets, gamma=0.9, clip=0.2)
    for a, b in zip(offsets.tolist(), offsets.tolist()[1:]):
        lists = [t[a:b].tolist() for t in (entropy, log_ratio, mask)]
        for got, want in zip(
            (scores.omega, scores.z_entropy, scores.z_omega), by_hand(*lists, 0.9, 0.2)
        ):
            torch.testing.assert_close(got[a:b], double(want), rtol=0, atol=1e-9)
    points = select(backend, scores, mask, offsets, None, 2)
    assert points.index.shape == (len(lengths), 2)
    assert bool((points.count <= 2).all())


def scores_of(z_entropy, z_omega):
    z_entropy, z_omega = torch.tensor(z_entropy), torch.tensor(z_omega)
    return BranchScores(
        torch.ones_like(z_omega), z_entropy, z_omega, z_entropy * z_omega, torch.tensor([False])
    )


@each_backend
def test_ties_go_to_the_earlier_position(backend):
    scores = scores_of([1.0, 2.0, 1.0, 2.0, 1.0], [2.0, 1.0, 2.0, 1.0, 2.0])
    points = select(backend, scores, torch.ones(5, dtype=torch.bool), torch.tensor([0, 5]), None, 4)
    assert points.index.tolist() == [[0, 1, 2, 3]]


@each_backend
def test_nan_ranks_lowest_and_signed_zero_is_zero(backend):
    nan = math.nan
    everything = torch.ones(4, dtype=torch.bool)
    offsets = torch.tensor([0, 4])
    paper = select(
        backend, scores_of([nan, 1.0, 2.0, 1.0], [1.0, nan, 1.0, 1.0]), everything, offsets, None, 4
    )
    assert paper.index.tolist() == [
        [2, 3, 1, -1]
    ]  # position 1 by its entropy alone; position 0 never
    assert paper.rule.tolist() == [[0, 0, 1, -1]]
    released = select(
        backend,
        scores_of([nan, -0.0, 0.0, -1.0], [1.0, 1.0, 1.0, 1.0]),
        everything,
        offsets,
        None,
        4,
        "released",
    )
    assert released.index.tolist() == [[1, 2, 3, 0]]  # -0 ties with 0, NaN last


@each_backend
def test_nan_entropy_spoils_only_its_segment(backend):
    entropy = torch.tensor([0.1, math.nan, 0.3, 0.1, 2.0, 0.3])
    log_ratio = torch.tensor([0.1, 0.0, -0.1, 0.0, 0.2, 0.0])
    mask, offsets = torch.ones(6, dtype=torch.bool), torch.tensor([0, 3, 6])
    scores = score(backend, entropy, log_ratio, mask, offsets, gamma=0.5, clip=0.2)
    points = select(backend, scores, mask, offsets, None, 1)
    assert points.index.tolist() == [[-1], [4]]
    assert points.count.tolist() == [0, 1]


@each_backend
def test_nothing_eligible(backend):
    scores = scores_of([1.0, 1.0], [1.0, 1.0])
    none = torch.zeros(2, dtype=torch.bool)
    for variant in ("paper", "released"):
        points = select(backend, scores, none, torch.tensor([0, 2]), None, 2, variant)
        assert (points.index.tolist(), points.count.tolist(), points.rule.tolist()) == (
            [[-1, -1]],
            [0],
            [[-1, -1]],
        )
    assert select(backend, scores, none, torch.tensor([0, 2]), None, 0).index.shape == (1, 0)


def test_wrong_arguments():
    scores = scores_of([1.0], [1.0])
    one, offsets = torch.ones(1, dtype=torch.bool), torch.tensor([0, 1])
    with pytest.raises(ValueError, match="variant is 'papers'"):
        select_branch_points(scores, one, offsets, None, 1, "papers")
    with pytest.raises(ValueError, match="k is -1"):
        select_branch_points(scores, one, offsets, None, -1)
    with pytest.raises(ValueError, match="groups has shape"):
        select_branch_points(scores, one, offsets, torch.zeros(2, dtype=torch.int64), 1)
    with pytest.raises(ValueError, match="groups holds -1"):
        select_branch_points(scores, one, offsets, torch.tensor([-1]), 1)
    with pytest.raises(TypeError, match="groups is torch.float32"):
        select_branch_points(scores, one, offsets, torch.tensor([0.0]), 1)
    with pytest.raises(ValueError, match=r"eligible \(2,\)"):
        select_branch_points(scores, torch.ones(2), offsets, None, 1)
    with pytest.raises(ValueError, match=r"entropy \(2,\)"):
        branch_scores(torch.ones(2), torch.ones(1), one, offsets, gamma=0.5, clip=0.2)
    with pytest.raises(ValueError, match="clip is -0.1"):
        branch_scores(torch.ones(1), torch.ones(1), one, offsets, gamma=0.5, clip=-0.1)


@each_backend
@pytest.mark.parametrize("offsets", [[0, 2, 1, 3], [1, 3], [0, 2]])
def test_wrong_offsets(offsets, backend):
    offsets, (three,) = torch.tensor(offsets), on(backend, torch.ones(3))
    scores = BranchScores(*on(backend, *scores_of([1.0] * 3, [1.0] * 3)))
    with pytest.raises(ValueError, match="offsets"):
        branch_scores(three, three, three, offsets, gamma=0.5, clip=0.2, backend=backend)
    with pytest.raises(ValueError, match="offsets"):
        select_branch_points(scores, three, offsets, None, 1, backend=backend)


@each_backend
def test_k_larger_than_the_segment(backend):
    scores = scores_of([1.0, 2.0, 3.0], [1.0, 1.0, 1.0])
    offsets = torch.tensor([0, 1, 3])
    points = select(backend, scores, torch.ones(3), offsets, None, 5)
    assert points.index.tolist() == [[0, -1, -1, -1, -1], [2, 1, -1, -1, -1]]
    assert points.count.tolist() == [1, 2]
    points = select(backend, scores, torch.ones(3), offsets, None, 5, "released")
    assert points.index.tolist() == [[0] * 5, [2, 1, 2, 1, 2]]
    assert points.rule.tolist() == [[0, 3, 3, 3, 3], [0, 0, 3, 3, 3]]


@each_backend
def test_groups_in_any_order_with_gaps(backend):
    scores = scores_of([1.0, 5.0, 3.0, 4.0], [1.0] * 4)
    points = select(backend, scores, torch.ones(4), torch.arange(5), torch.tensor([2, 0, 2, 0]), 2)
    assert points.index.tolist() == [[1, 3], [-1, -1], [2, 0]]


@each_backend
def test_other_layouts(backend):
    """Strided inputs, bfloat16 scores, integer masks and int32 offsets."""
    g = torch.Generator().manual_seed(5)
    entropy, log_ratio = torch.randn(2, 80, generator=g)[:, ::2]
    mask = (torch.rand(80, generator=g) > 0.3)[::2]
    offsets = torch.tensor([0, 25, 40])
    want = branch_scores(
        entropy.contiguous(), log_ratio.contiguous(), mask, offsets, gamma=0.9, clip=0.2, backend="torch"
    )  # fmt: skip
    got = score(backend, entropy, log_ratio, mask.int(), offsets.int(), gamma=0.9, clip=0.2)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-7)
    coarse = BranchScores(*(t.bfloat16() for t in want[:4]), want.omega_uninformative)
    points = select(backend, coarse, mask.int(), offsets.int(), None, 3)
    assert torch.equal(points.index, select("torch", coarse, mask, offsets, None, 3).index)


@pytest.mark.parametrize("backend", packed_backends("cpu", "triton"))
@pytest.mark.parametrize("variant", ["paper", "released"])
def test_backends_select_the_same(backend, variant):
    """Coarse values make ties, NaN, infinities and both zeros common; the order is total, so nothing may differ."""
    g = torch.Generator().manual_seed(11)
    values = torch.tensor([-math.inf, -1.0, -0.0, 0.0, 0.5, 1.0, math.inf, math.nan])
    for _ in range(2 if backend == "triton" else 40):
        lengths = torch.randint(0, 90, (5,), generator=g).tolist()
        offsets, n = packed_offsets(lengths), sum(lengths)
        z_entropy, z_omega, product = values[torch.randint(0, 8, (3, n), generator=g)]
        scores = BranchScores(z_omega, z_entropy, z_omega, product, torch.zeros(5).bool())
        eligible = torch.rand(n, generator=g) > 0.4
        for groups in (None, torch.randint(0, 3, (5,), generator=g)):
            for k in (1, 6):
                want = select("torch", scores, eligible, offsets, groups, k, variant)
                got = select(backend, scores, eligible, offsets, groups, k, variant)
                for a, b in zip(vars(got).values(), vars(want).values()):
                    assert torch.equal(a, b)


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_native_scores_equal_the_definition(data):
    if native.load()[0] is None:
        pytest.skip("native library not built")
    lengths = data.draw(st.lists(st.integers(0, 30), max_size=5))
    n, offsets = sum(lengths), packed_offsets(lengths)
    seed = data.draw(st.integers(0, 2**31))
    g = torch.Generator().manual_seed(seed)
    entropy = torch.rand(n, generator=g, dtype=torch.float64) * 3
    log_ratio = torch.randn(n, generator=g, dtype=torch.float64) * data.draw(st.floats(0.01, 3))
    mask = torch.rand(n, generator=g) > data.draw(st.floats(0, 1))
    inputs = (entropy, log_ratio, mask, offsets)
    options = dict(
        gamma=data.draw(st.floats(0, 1)),
        clip=data.draw(st.floats(0.01, 0.9)),
        variant=data.draw(st.sampled_from(["paper", "released"])),
    )
    got = branch_scores(*inputs, **options, backend="cpu")
    want = branch_scores(*inputs, **options, backend="torch")
    assert torch.equal(got.omega_uninformative, want.omega_uninformative)
    # Ω to rounding; z is as well conditioned as its deviation is large.
    torch.testing.assert_close(got.omega, want.omega, rtol=1e-12, atol=0)
    torch.testing.assert_close(got[1:4], want[1:4], rtol=1e-9, atol=1e-8)


@pytest.mark.skipif(native.load()[0] is None, reason="native library not built")
def test_same_bits_for_any_thread_count():
    g = torch.Generator().manual_seed(0)
    lengths = torch.randint(0, 9000, (80,), generator=g).tolist()
    n, offsets = sum(lengths), packed_offsets(lengths)
    entropy, log_ratio = torch.rand(2, n, generator=g) * 0.2
    mask = torch.rand(n, generator=g) > 0.2
    results = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        try:
            scores = branch_scores(
                entropy, log_ratio, mask, offsets, gamma=0.98, clip=0.2, backend="cpu"
            )
            points = select_branch_points(scores, mask, offsets, None, 8, backend="cpu")
        finally:
            torch.set_num_threads(1)
        results.append((*scores, points.index, points.rule))
    for a, b in zip(*results):
        assert torch.equal(a, b)


def test_compiled_graphs_do_not_break():
    g = torch.Generator().manual_seed(2)
    entropy, log_ratio = torch.rand(2, 50, generator=g)
    inputs = (entropy, log_ratio, torch.ones(50), torch.tensor([0, 20, 50]))

    def both(*inputs):
        scores = branch_scores(*inputs, gamma=0.9, clip=0.2)
        return scores.score * 2, future_value(*inputs[1:], 0.9) + 1

    compiled = torch.compile(both, backend="aot_eager", fullgraph=True)
    for a, b in zip(compiled(*inputs), both(*inputs)):
        assert torch.equal(a, b)
