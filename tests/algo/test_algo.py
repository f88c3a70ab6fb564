"""Advantages and losses against the golden vectors, and what must hold beyond them."""

import numpy as np
import pytest
import torch
from support.golden_vectors import vector

from appo.algo import losses
from appo.algo.advantages import dual_group_advantage, group_advantage, prefix_credit, standardise
from appo.algo.objective import make_objective
from appo.algo.presets import ALGORITHMS
from appo.kernels import LogProbEntropy, half_life_to_gamma
from appo.types import Counts


def packed(v, *keys):
    """Padded [B, T] lists of a vector → packed float64 tensors, offsets and mask."""
    rows = [torch.tensor(v["inputs"][k], dtype=torch.float64) for k in keys]
    mask = torch.tensor(v["inputs"]["mask"], dtype=torch.bool)
    offsets = torch.arange(0, mask.numel() + 1, mask.shape[1])
    return [r.flatten() for r in rows], mask.flatten(), offsets, mask.shape


def counts_of(mask, shape, rollouts=0):
    m = mask.view(shape)
    return Counts(tokens=int(m.sum()), rows=int(m.any(1).sum()), rollouts=rollouts)


def close(v, got, want):
    np.testing.assert_allclose(
        np.asarray(got, float), np.asarray(want, float), rtol=0, atol=v["tol"]
    )


# -- advantages ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["D1", "D2", "D3", "D4"])
def test_dual_group_and_prefix_credit(name):
    v = vector(name)
    i, e = v["inputs"], v["expected"]
    a_root, a_branch = dual_group_advantage(i["root_rewards"], i["branch_rewards"])
    close(v, a_root, e["A_init"])
    close(v, a_branch, e["A_branch"])
    mask = np.array(i["mask"])
    # The vectors name the chosen token, which the published code keeps: the branch draws from the next one on.
    split = [s + 1 for s in i["branch_split"]]
    rules = {"code_sum": "sum", "mean_of_init_and_attached": "mean", "literal_eq6": "literal"}
    for key, rule in rules.items():
        if key in e:
            got = prefix_credit(i["root_rewards"], i["branch_rewards"], i["branch_parent"], split,
                                [mask.shape[1]] * len(mask), rule=rule)  # fmt: skip
            close(v, np.stack(got) * mask, e[key])


def test_redrawn_token_gets_no_credit_from_its_alternative():
    base = prefix_credit([1.0, 0.0], [1.0, 0.0], [0, 1], [2, 0], [4, 4])
    a_root, a_branch = dual_group_advantage([1.0, 0.0], [1.0, 0.0])
    close({"tol": 1e-12}, base[0], a_root[0] + np.array([a_branch[0]] * 2 + [0, 0]))
    close({"tol": 1e-12}, base[1], [a_root[1]] * 4)


def test_constant_groups_are_exactly_zero():
    v = vector("D5")
    for group in v["inputs"]["groups"]:
        rewards = np.array(group, np.float32)
        assert not standardise(rewards).any()
        assert not group_advantage(rewards, [0] * len(rewards)).any()
        assert not group_advantage(rewards.astype(float), [0] * len(rewards)).any()


def test_group_advantage_conventions():
    v = vector("H1")
    r, uid, e = v["inputs"]["rewards"], v["inputs"]["uid"], v["expected"]
    close(v, group_advantage(r, uid), e["grpo_verl"])
    close(v, group_advantage(r, uid, std="population"), e["grpo_population_std"])
    close(v, group_advantage(r, uid, std="none"), e["dr_grpo"])


# -- losses --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["G1", "G2", "G7", "G13"])
def test_clipped_policy_loss(name):
    v = vector(name)
    p = v["params"]
    (logp, old, adv), mask, offsets, shape = packed(v, "log_prob", "old_log_prob", "advantages")
    logp.requires_grad_()
    per_token = losses.clipped_policy_loss(losses.log_ratio_of(logp, old, mask), adv, clip_low=p["clip_low"],
                                           clip_high=p["clip_high"], dual_clip=p["dual_clip"])  # fmt: skip
    loss = losses.aggregate(per_token, mask, offsets, p["agg"], counts_of(mask, shape))
    loss.backward()
    close(v, loss.detach(), v["expected"]["loss"])
    close(v, logp.grad.view(shape), v["expected"]["grad_wrt_log_prob"])


@pytest.mark.parametrize(("name", "rollouts"), [("G17", 2), ("G18", 8)])
def test_appo_objective_of_the_paper(name, rollouts):
    v = vector(name)
    p = v["params"]
    (logp, old, adv), mask, offsets, shape = packed(v, "log_prob", "old_log_prob", "advantages")
    logp.requires_grad_()
    d = losses.log_ratio_of(logp, old, mask)
    fut = losses.future_scale(
        d, mask, offsets, gamma=half_life_to_gamma(p["tau"]), clip=tuple(p["f_clip"])
    )
    close(
        v, fut.view(shape)[mask.view(shape)], torch.tensor(v["expected"]["A_fut"])[mask.view(shape)]
    )
    weighted = adv * (1 + p["b"] * fut)
    close(v, (weighted * mask).view(shape), v["expected"]["weighted_adv"])
    per_token = losses.clipped_policy_loss(
        d, weighted, clip_low=p["clip_low"], clip_high=p["clip_high"]
    )
    loss = losses.aggregate(
        per_token, mask, offsets, "rollout-mean", counts_of(mask, shape, rollouts)
    )
    loss.backward()
    close(v, loss.detach(), v["expected"]["loss"])
    close(v, logp.grad.view(shape), v["expected"]["grad_wrt_log_prob"])


def released(v):
    """The authors' loss on a vector: (scale, kept rows, loss, gradient)."""
    p = v["params"]
    gamma = p.get("gamma") or half_life_to_gamma(p["tau"])
    (logp, old, adv), mask, offsets, shape = packed(v, "log_prob", "old_log_prob", "advantages")
    logp.requires_grad_()
    d = losses.log_ratio_of(logp, old, mask)
    f = losses.released_scale(
        d, adv, mask, offsets, gamma=gamma, c=p["c"], safety=p.get("safety", 6.0)
    )
    weighted = adv * (1 + p["b"] * f)
    keep = losses.sequence_filter(d, weighted, mask, offsets, c=p["c"])
    used = mask & keep[losses.row_of(offsets)]
    per_token = losses.clipped_policy_loss(d, weighted, clip_low=p.get("clip_low", 0.2),
                                           clip_high=p.get("clip_high", 0.28), dual_clip=p["c"])  # fmt: skip
    loss = losses.aggregate(per_token, used, offsets, "token-mean", counts_of(used, shape))
    loss.backward()
    return f.view(shape), keep, loss.detach(), logp.grad.view(shape), mask.view(shape)


@pytest.mark.parametrize("name", ["F1", "F2", "F3", "F4", "G16"])
def test_released_objective(name):
    v = vector(name)
    f, keep, loss, grad, mask = released(v)
    e = v["expected"]
    close(v, f[mask], torch.tensor(e["f"])[mask])
    close(v, grad, e["grad"])
    if "loss" in e:
        close(v, loss, e["loss"])
        assert keep.int().tolist() == e["keep_sequence"]


def test_on_policy_gradient_is_1_plus_b_times_that_without_the_future_term():
    for name in ("F1", "F2"):
        v = vector(name)
        _, _, _, grad, _ = released(v)
        close(v, grad, (1 + v["params"]["b"]) * np.array(v["expected"]["grpo_grad"]))


def test_branch_rows_enter_no_denominator():
    v = vector("F5")
    (per_token,), mask, offsets, shape = packed(v, "per_token_loss")
    for mode in ("token-mean", "seq-mean-token-mean"):
        got = losses.aggregate(per_token, mask, offsets, mode, counts_of(mask, shape))
        close(v, got, v["expected"][mode])
    close(v, losses.row_sums(per_token * mask, offsets)[0], v["expected"]["seq-mean-token-sum"])


def test_future_aware_scaling_alone():
    v = vector("F6")
    base, fut = np.array(v["inputs"]["A_base"]), np.array(v["inputs"]["A_fut"])
    close(v, base * (1 + v["inputs"]["b"] * fut), v["expected"]["A"])


def test_kl_estimators():
    v = vector("G19")
    for kind in ("k1", "k2", "k3"):
        logp = torch.tensor(v["inputs"]["log_prob"], dtype=torch.float64, requires_grad=True)
        kl = losses.kl_penalty(
            logp, torch.tensor(v["inputs"]["ref_log_prob"], dtype=torch.float64), kind
        )
        kl.sum().backward()
        close(v, kl.detach(), v["expected"][kind])
        close(v, logp.grad, v["expected"][f"grad_{kind}"])


def test_future_scale_released_vectors():
    for name in ("A7", "A8"):
        v = vector(name)
        d = torch.tensor(v["inputs"]["log_ratio"], dtype=torch.float64)
        mask = torch.ones(len(d), dtype=torch.bool)
        offsets = torch.tensor([0, len(d)])
        c = v["params"].get("c", float("inf"))
        f = losses.released_scale(
            d, torch.ones_like(d), mask, offsets, gamma=v["params"]["gamma"], c=c
        )
        want = v["expected"].get("f_high_only") or np.clip(np.exp(v["expected"]["S"]), 1.0, 1.2)
        close(v, f, want)


# -- the objective -------------------------------------------------------------------------------------------------


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


def test_future_term_reads_raw_positions_through_a_tool_result():
    d = torch.tensor([0.1, 0.2, 9.0, 0.3], dtype=torch.float64)
    mask = torch.tensor([1, 1, 0, 1], dtype=torch.bool)
    f = losses.future_scale(d, mask, torch.tensor([0, 4]), gamma=0.5, clip=(0.0, 10.0))
    close({"tol": 1e-12}, f.log(), [0.1 + 0.1 + 0.0375, 0.2 + 0.075, 0.15, 0.3])


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
