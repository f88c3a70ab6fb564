"""Triton scans, scores, selection and policy loss: what is special to them. Their results are compared with the other
backends in test_scan, test_branching and test_policy_loss; here: clear refusals, block edges, repeatability, devices."""

import importlib.util
import math

import pytest
import torch
from support.head_backends import marks_of
from support.packed_backends import on, packed_offsets, random_tree

from appo._kernels.common import packed
from appo.kernels import (
    BranchScores,
    branch_scores,
    future_value,
    policy_loss,
    select_branch_points,
    tree_future_value,
)

torch.set_num_threads(1)


def needs_triton(test):
    for mark in marks_of("triton"):
        test = mark(test)
    return test


OFFSETS = torch.tensor([0, 4])


def test_without_triton_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match="pip install 'triton"):
        future_value(torch.ones(4), torch.ones(4), OFFSETS, 0.5, backend="triton")


@needs_triton
def test_cpu_tensor_outside_the_interpreter(monkeypatch):
    monkeypatch.setattr(packed.gpu("common.gpu.launch"), "interpreted", lambda: False)
    x = torch.ones(4)
    scores = BranchScores(x, x, x, x, torch.zeros(1).bool())
    for call in (
        lambda: future_value(x, x, OFFSETS, 0.5, backend="triton"),
        lambda: tree_future_value(x, x, OFFSETS, torch.tensor([-1]), 0.5, backend="triton"),
        lambda: branch_scores(x, x, x, OFFSETS, gamma=0.5, clip=0.2, backend="triton"),
        lambda: select_branch_points(scores, x, OFFSETS, None, 1, backend="triton"),
        lambda: policy_loss(x, x, x, x, OFFSETS, backend="triton"),
    ):
        with pytest.raises(ValueError, match="needs a CUDA tensor"):
            call()


@needs_triton
def test_selection_refuses_what_its_keys_cannot_hold():
    x = torch.ones(4)
    scores = BranchScores(*on("triton", x, x, x, x, torch.zeros(1).bool()))
    eligible, offsets = on("triton", x, OFFSETS)
    with pytest.raises(ValueError, match="k=65"):
        select_branch_points(scores, eligible, offsets, None, 65, backend="triton")
    wide = BranchScores(*(t.double() for t in scores[:4]), scores.omega_uninformative)
    with pytest.raises(TypeError, match="torch.float64"):
        select_branch_points(wide, eligible, offsets, None, 1, backend="triton")


@needs_triton
@pytest.mark.parametrize("lengths", [[63, 1, 64], [64, 64], [65, 63], [0, 0, 129, 0]])
def test_segments_that_end_at_the_edges_of_blocks(lengths):
    n = sum(lengths)
    x = torch.randn(n, generator=torch.Generator().manual_seed(n), dtype=torch.float64)
    args = (x, torch.ones(n), packed_offsets(lengths), 0.999)
    got = future_value(*on("triton", *args[:3]), 0.999, backend="triton").cpu()
    torch.testing.assert_close(got, future_value(*args, backend="torch"), rtol=1e-12, atol=1e-12)


@needs_triton
def test_nan_travels_to_the_start_of_its_segment_and_no_further():
    """γ^n underflows long before the start: only a boundary may stop a NaN."""
    x = torch.zeros(200)
    x[190] = math.nan
    args = on("triton", x, torch.ones(200), packed_offsets([50, 150]))
    got = future_value(*args, 1e-5, backend="triton").cpu()
    assert got[50:191].isnan().all()
    assert (got[:50] == 0).all() and (got[191:] == 0).all()


@needs_triton
def test_same_bits_on_every_run():
    g = torch.Generator().manual_seed(3)
    entropy, log_ratio, advantage = torch.rand(3, 150, generator=g)
    mask, offsets = torch.rand(150, generator=g) > 0.2, packed_offsets([70, 80])
    inputs = on("triton", entropy, log_ratio, advantage, mask, offsets)

    def both():
        scores = branch_scores(*inputs[:2], *inputs[3:], gamma=0.97, clip=0.2, backend="triton")
        return (*scores, *policy_loss(*inputs, gamma=0.9, backend="triton"))

    for a, b in zip(both(), both()):
        assert torch.equal(a, b)


# -- on a device: sizes that the interpreter cannot run --------------------------------------------

on_device = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def large(rows=300, longest=6000):
    g = torch.Generator().manual_seed(1)
    lengths = torch.randint(0, longest, (rows,), generator=g).tolist()
    n = sum(lengths)
    log_ratio, entropy = 0.05 * torch.randn(n, generator=g), torch.rand(n, generator=g) ** 2
    mask = torch.rand(n, generator=g) > 0.2
    return [t.cuda() for t in (log_ratio, entropy, mask, packed_offsets(lengths))]


class TestOnDevice:
    pytestmark = on_device

    def test_future_value(self):
        log_ratio, _, mask, offsets = large()
        got = future_value(log_ratio, mask, offsets, 0.99, backend="triton")
        want = future_value(log_ratio.double(), mask, offsets, 0.99, backend="torch")
        torch.testing.assert_close(got, want.float(), rtol=2e-7, atol=1e-9)
        assert torch.equal(got, future_value(log_ratio, mask, offsets, 0.99, backend="triton"))

    def test_tree_future_value(self):
        log_ratio, _, mask, offsets = large(rows=40)
        parents = random_tree(40, torch.Generator().manual_seed(0))
        got = tree_future_value(log_ratio, mask, offsets, parents, 0.99, backend="triton")
        want = tree_future_value(
            log_ratio.cpu().double(), mask.cpu(), offsets.cpu(), parents, 0.99, backend="torch"
        )
        torch.testing.assert_close(got.cpu(), want.float(), rtol=2e-7, atol=1e-9)

    def test_branch_scores_and_selection(self):
        log_ratio, entropy, mask, offsets = large()
        got = branch_scores(
            entropy, log_ratio, mask, offsets, gamma=0.97, clip=0.2, backend="triton"
        )
        want = branch_scores(
            entropy, log_ratio, mask, offsets, gamma=0.97, clip=0.2, backend="torch"
        )
        assert torch.equal(got.omega_uninformative, want.omega_uninformative)
        torch.testing.assert_close(got[:4], want[:4], rtol=1e-6, atol=1e-6)
        pooled = torch.arange(offsets.shape[0] - 1, device="cuda") % 7
        for groups in (None, pooled):
            for k in (3, 64):
                for variant in ("paper", "released"):
                    args = (want, mask, offsets, groups, k, variant)
                    a, b = (
                        select_branch_points(*args, backend=name) for name in ("triton", "torch")
                    )
                    assert torch.equal(a.index, b.index) and torch.equal(a.rule, b.rule)

    def test_policy_loss(self):
        log_ratio, entropy, mask, offsets = large()
        logp = -entropy.clone().requires_grad_()
        rules = dict(gamma=0.98, future_weight=0.5, dual_clip=3.0)
        results = []
        for backend in ("triton", "torch"):
            args = (logp, logp.detach() - log_ratio, entropy - 0.5, mask, offsets)
            out = policy_loss(*args, **rules, backend=backend)
            results.append((out.loss, *torch.autograd.grad(out.loss, logp), *out[1:]))
        torch.testing.assert_close(results[0], results[1], rtol=1e-6, atol=1e-9)
