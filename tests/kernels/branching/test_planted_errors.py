"""Every definition of the branching rule is called and tested: a wrong one fails a golden test."""

from pathlib import Path

import pytest
import torch
from support.planted import functions_of, load_tests, plant, who_fails

from appo._kernels.branching import definition, half_life

HERE = Path(__file__).parent
op, scan = load_tests(HERE / "test_op.py"), load_tests(HERE / "test_future_value.py")
loss = load_tests(HERE.parent / "policy_loss" / "test_op.py")
ALL = [
    *((scan.test_golden, (name, "torch")) for name in ("A1", "A2", "A3", "A4", "A5", "A9")),
    *((op.test_golden_scores, (name, variant, "torch"))
      for name in op.GOLDEN for variant in ("paper", "released")),
    *((op.test_golden_released_selection, (name, "torch")) for name in op.GOLDEN),
    (op.test_paper_fills_with_entropy_when_omega_is_flat, ("torch",)),
    (op.test_paper_never_takes_two_negatives, ("torch",)),
    (op.test_paper_second_place_by_entropy, ("torch",)),
    (op.test_budget_per_root_or_pooled, ("torch",)),
    (op.test_scores_against_plain_python, ([129, 64], "torch")),
    (op.test_sum_clamp, ("torch",)),
    (scan.test_ragged_segments, ("torch", [1, 129, 0, 1, 64, 65], 0.9, torch.float64)),
    *((op.test_saturated_omega_is_exactly_flat, (n, "torch")) for n in op.vector("C14")["inputs"]["n"]),
]  # fmt: skip

ERRORS = [
    ("future_value_torch", "gamma**reach * ahead", "gamma * ahead"),
    ("future_value_torch", "torch.where(mask.to(torch.bool), log_ratio.double(), 0.0)", "log_ratio.double()"),
    ("future_value_torch", "offsets[1:], lengths", "offsets[-1:].expand(len(lengths)), lengths"),
    ("omega", ".exp()", ""),
    ("omega", ".clamp(low, high)", ".clamp(min=low)"),
    ("standardise", "x - mean[segment]", "x"),
    ("standardise", ").sqrt()", ")"),
    ("standardise", "/ count).sqrt()", "/ (count - 1)).sqrt()"),
    ("standardise", 'variant == "paper"', 'variant != "paper"'),
    ("branching_score", "z_entropy * z_omega", "z_entropy + z_omega"),
    ("branch_scores_torch", "1.0 - clip, 1.0 + clip", "1.0 - clip, 9.0"),
    ("branch_scores_torch", "offsets, gamma)", "offsets, 1.0)"),
    ("ranking", "(z_entropy > 0) & (z_omega > 0)", "(z_omega > 0)"),
    ("ranking", "torch.where(strict, score, z_entropy)", "score"),
    ("ranking", "candidate & (z_entropy > 0), RULE_ENTROPY", "candidate, RULE_ENTROPY"),
]  # fmt: skip


def test_the_definitions_pass_as_they_are():
    assert who_fails([*ALL, (scan.test_half_life, ())]) is None


def test_every_definition_has_a_planted_error():
    assert functions_of(definition) == {name for name, _, _ in ERRORS}


@pytest.mark.parametrize("error", ERRORS, ids=[f"{name}: {wrong}" for name, _, wrong in ERRORS])
def test_a_planted_error_fails_a_test(error, monkeypatch):
    plant(monkeypatch, definition, error)
    assert who_fails(ALL), f"no test noticed {error}"


SHARED = [
    ("future_value_torch", "gamma**reach * ahead", "gamma * ahead"),
    ("omega", ".exp()", ""),
    ("omega", ".clamp(low, high)", ".clamp(min=low)"),
]


@pytest.mark.parametrize("error", SHARED, ids=str)
def test_the_policy_loss_calls_the_same_definition(error, monkeypatch):
    """Eq. 7 sums and clips as Eq. 4 and 5 do: what is wrong in one is wrong in both."""
    rules = [loss.RULES["both"], loss.RULES["appo"]]
    written_out = [
        (loss.test_equals_the_formula_written_out, ([3, 0, 130, 64], r, "torch")) for r in rules
    ]
    assert who_fails(written_out) is None
    plant(monkeypatch, definition, error)
    assert who_fails(written_out)


def test_a_wrong_half_life_fails_its_test(monkeypatch):
    plant(monkeypatch, half_life, ("half_life_to_gamma", "-1.0 / tau", "-tau"))
    assert who_fails([(scan.test_half_life, ())])
