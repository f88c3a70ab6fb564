"""Parts of the released code, with the trained path's policy loss, against vectors of the released
functions.
"""

import numpy as np
import pytest
import torch
from support.golden_vectors import vector

from appo.algo.presets.tree.appo_released import kl_penalty, released_scale, sequence_filter
from appo.kernels import half_life_to_gamma, policy_loss, row_weight
from appo.types import Counts


def packed(v, *keys):
    """Padded [B, T] lists of a vector → packed float64 tensors, mask, offsets and shape."""
    rows = [torch.tensor(v["inputs"][k], dtype=torch.float64) for k in keys]
    mask = torch.tensor(v["inputs"]["mask"], dtype=torch.bool)
    offsets = torch.arange(0, mask.numel() + 1, mask.shape[1])
    return [r.flatten() for r in rows], mask.flatten(), offsets, mask.shape


def close(v, got, want):
    np.testing.assert_allclose(
        np.asarray(got, float), np.asarray(want, float), rtol=0, atol=v["tol"]
    )


def released(v):
    """The authors' loss on a vector: (scale, kept rows, loss, gradient, mask)."""
    p = v["params"]
    gamma = p.get("gamma") or half_life_to_gamma(p["tau"])
    (logp, old, adv), mask, offsets, shape = packed(v, "log_prob", "old_log_prob", "advantages")
    logp.requires_grad_()
    d = torch.where(mask, logp.detach() - old, 0.0)
    f = released_scale(d, adv, mask, offsets, gamma=gamma, c=p["c"], safety=p.get("safety", 6.0))
    weighted = adv * (1 + p["b"] * f)
    keep = sequence_filter(d, weighted, mask, offsets, c=p["c"])
    used = mask & keep.repeat_interleave(shape[1])
    counts = Counts(int(used.sum()), 0, 0)
    weight = row_weight("token-mean", used, offsets, counts, torch.ones(shape[0]))
    clips = dict(clip_low=p.get("clip_low", 0.2), clip_high=p.get("clip_high", 0.28))
    out = policy_loss(logp, old, weighted, used, offsets, weight, dual_clip=p["c"], **clips, backend="torch")  # fmt: skip
    out.loss.backward()
    return f.view(shape), keep, out.loss.detach(), logp.grad.view(shape), mask.view(shape)


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


def test_kl_estimators():
    v = vector("G19")
    for kind in ("k1", "k2", "k3"):
        logp = torch.tensor(v["inputs"]["log_prob"], dtype=torch.float64, requires_grad=True)
        kl = kl_penalty(logp, torch.tensor(v["inputs"]["ref_log_prob"], dtype=torch.float64), kind)
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
        f = released_scale(d, torch.ones_like(d), mask, offsets, gamma=v["params"]["gamma"], c=c)
        want = v["expected"].get("f_high_only") or np.clip(np.exp(v["expected"]["S"]), 1.0, 1.2)
        close(v, f, want)


def test_rows_with_two_dual_clipped_tokens_are_dropped():
    big = torch.tensor([2.0, 2.0, 0.0, 2.0, 0.0, 0.0, 2.0, 2.0]).double()
    mask = torch.tensor([1, 1, 1, 1, 0, 1, 1, 0], dtype=torch.bool)
    offsets = torch.tensor([0, 3, 3, 5, 8])  # two clipped, an empty row, one, one in the mask
    keep = sequence_filter(big, -torch.ones(8).double(), mask, offsets, c=3.0)
    assert keep.tolist() == [False, True, True, True]
    assert sequence_filter(big, torch.ones(8).double(), mask, offsets, c=3.0).all()


def test_unknown_estimators_are_refused():
    with pytest.raises(ValueError, match="kind='k4'"):
        kl_penalty(torch.zeros(1), torch.zeros(1), "k4")
