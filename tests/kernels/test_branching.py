"""Branching Score and selection: golden vectors, ties, flat vectors, NaN, shortfall, pooling."""

import math

import pytest
import torch
from golden_vectors import vector

from appo.kernels import BranchScores, branch_scores, future_value, select_branch_points

torch.set_num_threads(1)


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


def run(name, variant, pooled=False, k=None):
    entropy, log_ratio, mask, eligible, offsets, v = packed(name)
    params = v["params"]
    scores = branch_scores(
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
    points = select_branch_points(scores, eligible, offsets, groups, k or params["budget"], variant)
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


@pytest.mark.parametrize("variant", ["paper", "released"])
@pytest.mark.parametrize("name", GOLDEN)
def test_golden_scores(name, variant):
    scores, _, offsets, v = run(name, variant)
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


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_released_selection(name):
    _, points, offsets, v = run(name, "released", pooled=True)
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


def test_paper_fills_with_entropy_when_omega_is_flat():
    scores, points, offsets, v = run("C3", "paper")
    assert scores.flat.tolist() == [True]
    assert as_pairs(points.index[0], offsets) == v["expected"]["entropy_fallback_selection"]
    assert points.rule.tolist() == [[1, 1, 1]]


def test_paper_never_takes_two_negatives():
    """C4: position 0 has the highest product of two negative z; the paper variant must not choose it."""
    _, points, offsets, v = run("C4", "paper")
    assert v["expected"]["selected"][-1] == [0, 0]
    assert as_pairs(points.index[0], offsets) == [[0, 2], [0, 3]]
    assert (points.count.tolist(), points.index[0, 2].item(), points.rule[0].tolist()) == (
        [2],
        -1,
        [0, 0, -1],
    )


def test_paper_second_place_by_entropy():
    """C13: one strict candidate; the next is the largest positive z of entropy, not the raw product."""
    _, points, offsets, _ = run("C13", "paper")
    assert as_pairs(points.index[0], offsets) == [[0, 3], [0, 5]]
    assert points.rule.tolist() == [[0, 1]]


def test_budget_per_root_or_pooled():
    _, each, offsets, v = run("C6", "paper", k=1)
    assert [as_pairs(row, offsets)[0] for row in each.index] == v["expected"]["paper_top1_each"]
    _, pooled, offsets, v = run("C6", "paper", pooled=True)
    assert as_pairs(pooled.index[0], offsets) == v["expected"]["selected"]


@pytest.mark.parametrize("n", vector("C14")["inputs"]["n"])
def test_saturated_omega_is_exactly_flat(n):
    """C14: every Ω at the lower clip, in float32: z must be 0, not the rounding of a mean."""
    log_ratio = torch.full((n,), -5.0)  # float32
    entropy = torch.rand(n, generator=torch.Generator().manual_seed(n))
    offsets = torch.tensor([0, n])
    mask = torch.ones(n, dtype=torch.bool)
    scores = branch_scores(entropy, log_ratio, mask, offsets, gamma=0.5, clip=0.2)
    assert torch.equal(scores.omega, torch.full((n,), 0.8))
    assert torch.count_nonzero(scores.z_omega) == 0
    points = select_branch_points(scores, mask, offsets, None, 3)
    assert scores.flat.tolist() == [True]
    assert points.rule.tolist() == [[1, 1, 1]]


def test_sum_clamp():
    """A6: the sum is clamped at ±20 before exp, and the clip afterwards is the same from either side."""
    v = vector("A6")
    for sign in ("pos", "neg"):
        x = double(v["inputs"][f"log_ratio_{sign}"])
        mask, offsets = torch.ones(4), torch.tensor([0, 4])
        s = future_value(x, mask, offsets, 1.0).clamp(-20, 20)
        assert s.tolist() == v["expected"][f"S_{sign}"]
        scores = branch_scores(x, x, mask, offsets, gamma=1.0, clip=0.2)
        torch.testing.assert_close(
            scores.omega, double(v["expected"][f"clip_{sign}"]), rtol=0, atol=v["tol"]
        )
    huge = torch.full((3,), 1e30)
    scores = branch_scores(
        huge.clone(), huge, torch.ones(3), torch.tensor([0, 3]), gamma=1.0, clip=0.2
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


@pytest.mark.parametrize("lengths", [[], [0], [1], [2, 0, 3, 1], [129, 64]])
def test_scores_against_plain_python(lengths):
    generator = torch.Generator().manual_seed(7)
    n = sum(lengths)
    entropy, log_ratio = (
        torch.randn(2, n, generator=generator, dtype=torch.float64) * 0.3
    ).unbind()
    mask = torch.rand(n, generator=generator) > 0.25
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    scores = branch_scores(entropy, log_ratio, mask, offsets, gamma=0.9, clip=0.2)
    for a, b in zip(offsets.tolist(), offsets.tolist()[1:]):
        lists = [t[a:b].tolist() for t in (entropy, log_ratio, mask)]
        for got, want in zip(
            (scores.omega, scores.z_entropy, scores.z_omega), by_hand(*lists, 0.9, 0.2)
        ):
            torch.testing.assert_close(got[a:b], double(want), rtol=0, atol=1e-9)
    points = select_branch_points(scores, mask, offsets, None, 2)
    assert points.index.shape == (len(lengths), 2)
    assert bool((points.count <= 2).all())


def scores_of(z_entropy, z_omega):
    z_entropy, z_omega = torch.tensor(z_entropy), torch.tensor(z_omega)
    return BranchScores(
        torch.ones_like(z_omega), z_entropy, z_omega, z_entropy * z_omega, torch.tensor([False])
    )


def test_ties_go_to_the_earlier_position():
    scores = scores_of([1.0, 2.0, 1.0, 2.0, 1.0], [2.0, 1.0, 2.0, 1.0, 2.0])
    points = select_branch_points(
        scores, torch.ones(5, dtype=torch.bool), torch.tensor([0, 5]), None, 4
    )
    assert points.index.tolist() == [[0, 1, 2, 3]]


def test_nan_ranks_lowest_and_signed_zero_is_zero():
    nan = math.nan
    everything = torch.ones(4, dtype=torch.bool)
    offsets = torch.tensor([0, 4])
    paper = select_branch_points(
        scores_of([nan, 1.0, 2.0, 1.0], [1.0, nan, 1.0, 1.0]), everything, offsets, None, 4
    )
    assert paper.index.tolist() == [
        [2, 3, 1, -1]
    ]  # position 1 by its entropy alone; position 0 never
    assert paper.rule.tolist() == [[0, 0, 1, -1]]
    released = select_branch_points(
        scores_of([nan, -0.0, 0.0, -1.0], [1.0, 1.0, 1.0, 1.0]),
        everything,
        offsets,
        None,
        4,
        "released",
    )
    assert released.index.tolist() == [[1, 2, 3, 0]]  # -0 ties with 0, NaN last


def test_nan_entropy_spoils_only_its_segment():
    entropy = torch.tensor([0.1, math.nan, 0.3, 0.1, 2.0, 0.3])
    log_ratio = torch.tensor([0.1, 0.0, -0.1, 0.0, 0.2, 0.0])
    mask, offsets = torch.ones(6, dtype=torch.bool), torch.tensor([0, 3, 6])
    scores = branch_scores(entropy, log_ratio, mask, offsets, gamma=0.5, clip=0.2)
    points = select_branch_points(scores, mask, offsets, None, 1)
    assert points.index.tolist() == [[-1], [4]]
    assert points.count.tolist() == [0, 1]


def test_nothing_eligible():
    scores = scores_of([1.0, 1.0], [1.0, 1.0])
    none = torch.zeros(2, dtype=torch.bool)
    for variant in ("paper", "released"):
        points = select_branch_points(scores, none, torch.tensor([0, 2]), None, 2, variant)
        assert (points.index.tolist(), points.count.tolist(), points.rule.tolist()) == (
            [[-1, -1]],
            [0],
            [[-1, -1]],
        )
    assert select_branch_points(scores, none, torch.tensor([0, 2]), None, 0).index.shape == (1, 0)


def test_wrong_arguments():
    scores = scores_of([1.0], [1.0])
    one, offsets = torch.ones(1, dtype=torch.bool), torch.tensor([0, 1])
    with pytest.raises(ValueError, match="variant is 'papers'"):
        select_branch_points(scores, one, offsets, None, 1, "papers")
    with pytest.raises(ValueError, match="k is -1"):
        select_branch_points(scores, one, offsets, None, -1)
    with pytest.raises(ValueError, match="groups has shape"):
        select_branch_points(scores, one, offsets, torch.zeros(2, dtype=torch.int64), 1)
