"""Old log-probs: the ratio, the weight of stale tokens and their gradient against a plain formula,
and every token its own.
"""

import itertools
import math
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from support.trainer_parts import FixedLearner, make_trainer, run_steps

from appo.algo.credit import assign
from appo.algo.objective import importance_weight, make_objective
from appo.algo.presets import ALGORITHMS
from appo.kernels import LogProbEntropy
from appo.observability.codec import tree_from_json, tree_to_json
from appo.packing.pack import pack
from appo.trainer.old_logprobs import set_old_logp
from appo.types import Counts, Credit

NOW = 5
OFFSETS = [0, 7, 12, 20]


def rows_of(g, dtype=torch.float64):
    n = OFFSETS[-1]
    mask = torch.rand(n, generator=g) < 0.8
    behavior_logp = -torch.rand(n, generator=g, dtype=dtype)
    return SimpleNamespace(
        offsets=torch.tensor(OFFSETS),
        mask=mask,
        version=torch.where(mask, torch.randint(3, NOW + 1, (n,), generator=g), -1),
        behavior_logp=behavior_logp,
        old_logp=behavior_logp + 0.6 * torch.randn(n, generator=g, dtype=dtype),
        advantage=torch.randn(n, generator=g, dtype=dtype) * mask,
        weight=torch.ones(3),
    )


def stats_of(logp):
    return LogProbEntropy(logp, torch.zeros_like(logp), logp)


def plain(logp, rows, algo, *, here, cap, rollouts):
    """The loss written out token by token. here: the version of the old log-probs is the one under
    training.
    """
    total = torch.zeros((), dtype=torch.float64)
    for a, b in itertools.pairwise(OFFSETS):
        kept = [t for t in range(a, b) if rows.mask[t]]
        d, weight = {}, {}
        for t in kept:
            fresh = rows.version[t] == NOW
            old_logp = logp[t].detach() if fresh or here else rows.old_logp[t]
            d[t] = logp[t] - old_logp
            w = 1.0 if fresh else math.exp(float(old_logp - rows.behavior_logp[t]))
            weight[t] = 1.0 if cap is None else min(w, cap)
        for t in kept:
            ahead = sum(algo.gamma ** (k - t) * float(d[k].detach()) for k in kept if k >= t)
            f = min(max(math.exp(ahead), algo.future_clip[0]), algo.future_clip[1])
            adv = rows.advantage[t] * weight[t] * (1 + algo.future_weight * f)
            r = d[t].exp()
            clipped = r.clamp(1 - algo.clip_low, 1 + algo.clip_high)
            total = total - torch.minimum(r * adv, clipped * adv) / len(kept) / rollouts
    return total


@pytest.mark.parametrize("here", [False, True])
@pytest.mark.parametrize("cap", [2.0, 1.1, None])
def test_loss_and_gradient_are_those_of_the_plain_formula(here, cap):
    algo = ALGORITHMS["appo"]
    for seed in range(5):
        g = torch.Generator().manual_seed(seed)
        rows = rows_of(g)
        logp = rows.old_logp + 0.2 * torch.randn(OFFSETS[-1], generator=g, dtype=torch.float64)
        logp.requires_grad_()
        old_logp_version = NOW if here else NOW - 1
        objective = make_objective(
            algo,
            version=lambda: NOW,
            old_logp_version=lambda at=old_logp_version: at,
            importance_cap=cap,
        )
        loss, metrics = objective(stats_of(logp), rows, Counts(16, 3, 8))
        want = plain(logp, rows, algo, here=here, cap=cap, rollouts=8)
        torch.testing.assert_close(loss, want, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(*(torch.autograd.grad(x, logp)[0] for x in (loss, want)), rtol=1e-11, atol=1e-14)  # fmt: skip
        check_metrics(metrics, logp, rows, here, cap)


def check_metrics(metrics, logp, rows, here, cap):
    with torch.no_grad():
        m = rows.mask
        old_logp = logp if here else torch.where(rows.version == NOW, logp, rows.old_logp)
        drift = torch.where(rows.version == NOW, 0.0, old_logp - rows.behavior_logp)[m]
        r, a = (logp - old_logp)[m].exp(), rows.advantage[m]
        want = {
            "staleness": (NOW - rows.version[m]).double(),
            "log_ratio_behavior": (logp - rows.behavior_logp)[m].abs(),
            "is_weight": torch.ones(len(drift)) if cap is None else drift.exp().clamp(max=cap),
            "is_clipped": (drift.exp() > (cap or math.inf)).double(),
            "log_ratio_abs": (logp - old_logp)[m].abs(),
            "clip_fraction": (((a > 0) & (r > 1.28)) | ((a < 0) & (r < 0.8))).double(),
            "kl_old_logp": r - 1 - r.log(),
        }
    for name, values in want.items():
        total, n = metrics[f"policy/{name}"]
        assert n == m.sum() and float(total) == pytest.approx(float(values.sum()), abs=1e-12), name


def test_rounding_of_the_engine_is_not_taken_for_a_moved_policy():
    """Mini-batch 1 was empty, so mini-batch 2 meets the weights of the step's start; the engine's
    log-probs are noisy.
    """
    algo, g = ALGORITHMS["appo"], torch.Generator().manual_seed(0)
    n = 4000
    logp = -torch.rand(n, generator=g).double()
    rows = SimpleNamespace(
        offsets=torch.tensor([0, n]), mask=torch.ones(n, dtype=torch.bool), version=torch.zeros(n, dtype=torch.int64),
        behavior_logp=logp + 0.02 * torch.randn(n, generator=g), old_logp=logp.clone(), advantage=torch.ones(n), weight=torch.ones(1),
    )  # fmt: skip

    def run(behavior_only, version, old_logp_version):
        part = SimpleNamespace(**vars(rows))
        part.old_logp = rows.behavior_logp if behavior_only else rows.old_logp
        objective = make_objective(
            algo, version=lambda: version, old_logp_version=lambda: old_logp_version
        )
        x = logp.clone().requires_grad_()
        loss, metrics = objective(stats_of(x), part, Counts(n, 1, 1))
        means = {k: float(s) / float(c) for k, (s, c) in metrics.items()}
        return means, torch.autograd.grad(loss, x)[0] * n

    for version, old_logp_version in (
        (1, 1),
        (1, 0),
    ):  # without looking at the old log-probs, and by them
        means, gradient = run(False, version, old_logp_version)
        assert means["policy/log_ratio_abs"] == 0 and means["policy/future_scale"] == 1.5
        weight = torch.exp(logp - rows.behavior_logp)
        torch.testing.assert_close(gradient, -1.5 * weight, rtol=1e-12, atol=0)
    means, _ = run(True, 1, None)  # the engine's log-probs: Ω reads noise
    assert means["policy/log_ratio_abs"] > 0.01 and means["policy/future_scale"] > 1.51
    assert importance_weight(torch.tensor([-50.0, 0.0, 50.0]), 2.0).tolist() == pytest.approx([math.exp(-20), 1, 2])  # fmt: skip


# -- every token its own old log-prob


def signature(ids):
    """A number in (-1, 0) that says which path a token ends."""
    return -(zlib.crc32(str(list(ids)).encode()) + 1) / 2**32


class PathLearner(FixedLearner):
    """The old log-prob of a token is the signature of the path that it ends."""

    def old_logprobs(self, batches):
        return [torch.tensor(edge_signatures(b), dtype=torch.float32) for b in batches]


def edge_signatures(batch):
    """Of every edge of a packed batch, read off the stream alone: the path of a token is what sees
    it.
    """
    out = []
    ids, subtree_end = batch.token_ids.tolist(), batch.subtree_end.tolist()
    for at, target, kept in zip(batch.source.tolist(), batch.target.tolist(), batch.mask.tolist()):
        path = [ids[k] for k in range(at + 1) if subtree_end[k] > at]
        out.append(signature([*path, target]) if kept else 0.0)
    return out


def trees_with_old_logp():
    """Trees with branches, whose old log-probs were set when there were only roots, as a step does
    it.
    """
    trainer = make_trainer(learner=PathLearner())
    result = run_steps(trainer, [1], 1)[0]
    return trainer, [t for t, k in zip(result.trees, result.minibatch) if k == 1]


@pytest.mark.filterwarnings("ignore:task:UserWarning")  # rows over a budget of 40 tokens
def test_every_packed_row_gets_the_old_logp_of_its_own_tokens():
    _, trees = trees_with_old_logp()
    assert sum(len(t.branches) for t in trees) > 4
    rng = np.random.default_rng(0)
    for budget in (10_000, 90, 40):  # whole trees, cut between roots, single rows
        for _ in range(4):
            order = rng.permutation(len(trees))
            some = [trees[i] for i in order]
            rows = []
            for (
                tree
            ) in some:  # any leaves in any order: rows are dropped, roots and branches are mixed
                leaves = rng.permutation(len(tree.leaves))[: rng.integers(0, len(tree.leaves) + 1)]
                rows.append([credit_of(tree, int(leaf), rng) for leaf in leaves])
            for batch in pack(some, rows, token_budget=budget, keep_all=True):
                expect = expected_old_logp(batch, some)
                assert batch.old_logp.tolist() == np.float32(expect).tolist()


def credit_of(tree, leaf, rng):
    view = tree.trajectory(leaf)
    return Credit(leaf, rng.normal(size=len(view)), view.mask)


def expected_old_logp(batch, trees):
    """Root tokens: the signature; tokens that a branch drew: what the engine recorded; tool
    results: 0.
    """
    out = []
    for i, leaf in batch.rows:
        view, record = trees[i].trajectory(leaf), trees[i].leaves[leaf]
        split = len(view) if record.is_root else record.split
        for t in range(len(view)):
            path = view.token_ids[: view.prompt_len + t + 1].tolist()
            out.append(0.0 if not view.mask[t] else signature(path) if t < split else view.logprobs[t])  # fmt: skip
    return out


def test_old_logp_are_computed_before_the_first_update_for_later_minibatches_only():
    learner, asked = PathLearner(), []
    trainer = make_trainer(learner=learner)
    compute = learner.old_logprobs

    def old_logprobs(batches):
        asked.append((trainer.version, sum(len(b.rows) for b in batches)))
        return compute(batches)

    learner.old_logprobs = old_logprobs
    result = run_steps(trainer, [1], 1)[0]
    assert (
        asked == [(0, 2 * trainer.algo.roots)]
        and trainer.version == 2
        and trainer.old_logp_version == 0
    )
    for tree, k in zip(result.trees, result.minibatch, strict=True):
        have = {n.old_logp is not None for n in tree.nodes if n.sampled and len(n.path) == 1}
        assert have == {k == 1}
        assert all(n.old_logp is None for n in tree.nodes if not n.sampled or len(n.path) > 1)


def test_the_engines_log_probs_can_be_asked_for():
    learner = PathLearner()
    learner.old_logprobs = None  # never called
    trainer = make_trainer(learner=learner, old_logprobs="engine")
    run_steps(trainer, [1], 1)
    assert trainer.old_logp_version is None
    for batches in learner.batches:
        assert all(torch.equal(b.old_logp, b.behavior_logp) for b in batches)


def test_saved_trees_carry_their_old_logp_and_can_be_learned_from_again():
    """`learn` on trees of a file does what the step did, and finds the same old log-probs."""
    trainer = make_trainer(learner=PathLearner())
    result = run_steps(trainer, [1], 1)[0]
    again = make_trainer(learner=PathLearner())
    trees = [tree_from_json(tree_to_json(t)) for t in result.trees]
    saved = [[n.old_logp for n in t.nodes] for t in trees]
    parts = [[t for t, k in zip(trees, result.minibatch) if k == j] for j in range(2)]
    metrics, answers = again.learn(parts)
    assert [[n.old_logp for n in t.nodes] for t in trees] == saved
    assert len(answers) == 2 and again.version == 2
    same = {k for k in metrics if not k.startswith("time/")}
    assert {"policy/is_weight", "learn/rows", "policy/version"} <= same
    assert {k: metrics[k] for k in same} == {k: result.metrics[k] for k in same}


def test_rows_without_any_tree_still_take_part_in_the_collective():
    called = []
    learner = SimpleNamespace(old_logprobs=lambda batches: called.append(batches) or [])
    set_old_logp([], learner, 100)
    assert called == [[]]
    assert assign([], ALGORITHMS["appo"]).credits == []


# -- micro-batches


class Rows:
    """A packed batch of two rows with a tool result in the first."""

    offsets = torch.tensor([0, 5, 8])
    mask = torch.tensor([1, 1, 0, 1, 1, 1, 1, 1], dtype=torch.bool)
    weight = torch.ones(2)
    version = torch.zeros(8, dtype=torch.int64)

    def __init__(self, generator):
        self.behavior_logp = self.old_logp = -torch.rand(8, generator=generator)
        self.advantage = torch.randn(8, generator=generator) * self.mask


@pytest.mark.parametrize("name", sorted(ALGORITHMS))
def test_any_split_into_micro_batches_gives_the_same_gradient(name):
    g = torch.Generator().manual_seed(3)
    rows, counts = Rows(g), Counts(7, 2, 4)
    logp = (rows.behavior_logp + 0.3 * torch.randn(8, generator=g)).requires_grad_()
    objective = make_objective(ALGORITHMS[name], entropy_coef=0.01)
    entropy = torch.rand(8, generator=g)

    def loss_of(lo, hi, offsets):
        part = Rows(g)
        for k in ("behavior_logp", "old_logp", "advantage", "version"):
            setattr(part, k, getattr(rows, k)[lo:hi])
        part.mask, part.offsets, part.weight = (
            rows.mask[lo:hi],
            torch.tensor(offsets),
            torch.ones(len(offsets) - 1),
        )
        stats = LogProbEntropy(logp[lo:hi], entropy[lo:hi], logp[lo:hi])
        return objective(stats, part, counts)

    whole, metrics = loss_of(0, 8, [0, 5, 8])
    (grad,) = torch.autograd.grad(whole, logp)
    a, b = loss_of(0, 5, [0, 5]), loss_of(5, 8, [0, 3])
    (grad_split,) = torch.autograd.grad(a[0] + b[0], logp)
    torch.testing.assert_close(grad, grad_split, rtol=1e-6, atol=1e-8)
    assert grad[2] == 0 and grad.abs().sum() > 0
    for key, (total, n) in metrics.items():
        parts = a[1][key][0] + b[1][key][0]
        assert float(total) == pytest.approx(float(parts), abs=1e-5)
        assert n == a[1][key][1] + b[1][key][1]


def test_tokens_of_the_version_under_training_have_ratio_one_exactly():
    g = torch.Generator().manual_seed(1)
    rows = Rows(g)
    rows.version = torch.tensor([4, 4, -1, 4, 4, 3, 3, 3])
    logp = (
        rows.behavior_logp + 0.02 * torch.randn(8, generator=g)
    ).requires_grad_()  # engine and learner round differently
    stats = LogProbEntropy(logp, torch.zeros(8), logp)
    exact = make_objective(ALGORITHMS["appo"], version=lambda: 4)
    loss, metrics = exact(stats, rows, Counts(7, 2, 4))
    (grad,) = torch.autograd.grad(loss, logp)
    # Row 0 is on policy: scale 1.5, mean over its 4 tokens, over 4 rollouts.
    want = -rows.advantage[:5] * 1.5 / 4 / 4
    torch.testing.assert_close(
        grad[:5], torch.where(rows.mask[:5], want, 0.0), rtol=1e-6, atol=1e-9
    )
    assert 0 < metrics["policy/log_ratio_abs"][0] < 0.02 * 3 * 4  # row 1 only
