"""The parts of the policy loss that the objective calls by themselves: rows, denominators,
aggregates.
"""

import pytest
import torch
from support.golden_vectors import vector

from appo import kernels
from appo._kernels.policy_loss import definition
from appo.types import Counts

MASK = torch.tensor([1, 1, 0, 1, 0, 0, 1, 1, 1], dtype=torch.bool)
OFFSETS = torch.tensor([0, 4, 6, 9])  # 3, 0 and 3 trained tokens
COUNTS = Counts(tokens=12, rows=5, rollouts=16)  # of the mini-batch; these rows are a part of it
WEIGHT = torch.tensor([1.0, 1.0, 0.5])
WANT = {
    "token-mean": [1 / 12, 1 / 12, 0.5 / 12],
    "seq-mean-token-mean": [1 / 3 / 5, 1 / 5, 0.5 / 3 / 5],
    "rollout-mean": [1 / 3 / 16, 1 / 16, 0.5 / 3 / 16],
}


@pytest.mark.parametrize("mode", WANT)
def test_row_weights(mode):
    got = definition.row_weight(mode, MASK, OFFSETS, COUNTS, WEIGHT)
    assert got.dtype == torch.float64
    torch.testing.assert_close(got, torch.tensor(WANT[mode], dtype=torch.float64))


@pytest.mark.parametrize("mode", WANT)
def test_an_aggregate_is_the_weighted_sum_of_its_rows_and_differentiable(mode):
    x = torch.arange(9.0).requires_grad_()
    with torch.no_grad():
        x[2] = torch.nan  # a tool token
    got = definition.aggregate(x, MASK, OFFSETS, mode, COUNTS, WEIGHT)
    w = WANT[mode]
    torch.testing.assert_close(got.item(), w[0] * (0 + 1 + 3) + w[2] * (6 + 7 + 8))
    (grad,) = torch.autograd.grad(got, x)
    want = torch.tensor([w[0], w[0], 0, w[0], 0, 0, w[2], w[2], w[2]])
    torch.testing.assert_close(grad, want)


@pytest.mark.parametrize("mode", WANT)
def test_nothing_to_divide_by(mode):
    none = torch.zeros(9, dtype=torch.bool)
    args = (none, OFFSETS, Counts(0, 0, 0), WEIGHT)
    torch.testing.assert_close(definition.row_weight(mode, *args), WEIGHT.double())


@pytest.mark.parametrize("mode", ["token-mean", "seq-mean-token-mean"])
def test_golden_branch_rows_enter_no_denominator(mode):
    v = vector("F5")
    mask = torch.tensor(v["inputs"]["mask"], dtype=torch.bool)
    x = torch.tensor(v["inputs"]["per_token_loss"], dtype=torch.float64)
    counts = Counts(int(mask.sum()), int(mask.any(1).sum()), 0)
    offsets = torch.arange(0, mask.numel() + 1, mask.shape[1])
    got = definition.aggregate(
        x.flatten(), mask.flatten(), offsets, mode, counts, torch.ones(len(mask))
    )
    assert got.item() == pytest.approx(v["expected"][mode], abs=v["tol"])


def test_the_public_names_are_the_definitions():
    assert kernels.row_weight is definition.row_weight
    assert kernels.aggregate is definition.aggregate
