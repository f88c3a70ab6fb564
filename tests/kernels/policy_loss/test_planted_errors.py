"""Every definition of the policy loss is called and tested: a wrong one fails a test of the
operation.
"""

from pathlib import Path

import pytest
from support.planted import functions_of, load_tests, plant, who_fails

from appo._kernels.policy_loss import definition

HERE = Path(__file__).parent
op, parts = load_tests(HERE / "test_op.py"), load_tests(HERE / "test_definition.py")
ALL = [
    *((op.test_golden_clipped_losses, (name, "torch")) for name in ("G1", "G2", "G7", "G13")),
    *((op.test_golden_appo_objective, case) for case in (("G17", 2, "torch"), ("G18", 8, "torch"))),
    (op.test_golden_on_policy_gradient_is_1_plus_b_times_the_plain_one, ("F1", "torch")),
    (op.test_golden_rows_without_trained_tokens_and_scaling, ("torch",)),
    *((op.test_equals_the_formula_written_out, ([3, 0, 130, 64], rules, "torch")) for rules in op.RULES.values()),
    (op.test_metrics, ("torch",)),
    (op.test_hostile_values_behind_the_mask_change_nothing, ("torch",)),
    (op.test_log_ratios_beyond_the_clamp_have_no_gradient, ("torch",)),
    *((parts.test_row_weights, (mode,)) for mode in parts.WANT),
    *((parts.test_an_aggregate_is_the_weighted_sum_of_its_rows_and_differentiable, (mode,))
      for mode in parts.WANT),
    *((parts.test_nothing_to_divide_by, (mode,)) for mode in parts.WANT),
    (parts.test_golden_branch_rows_enter_no_denominator, ("token-mean",)),
]  # fmt: skip

ERRORS = [
    ("log_ratio", "logp.double() - old_logp.double()", "old_logp.double() - logp.double()"),
    ("ratio", ".exp()", " + 1.0"),
    ("ratio", "d.clamp(-CLAMP, CLAMP)", "d"),
    ("future_factor", "offsets, gamma)", "offsets, 1.0)"),
    ("future_factor", "gamma), low, high)", "gamma), 0.0, high)"),
    ("future_scale", "1.0 + b * f", "b * f"),
    ("clipped_surrogate", "torch.maximum", "torch.minimum"),
    ("clipped_surrogate", "1.0 + clip_high", "1.0 + clip_low"),
    ("clipped_surrogate", "1.0 - clip_low", "0.0"),
    ("clipped_surrogate", "a < 0", "a > 0"),
    ("surrogate_slope", "plain < bounded", "plain > bounded"),
    ("surrogate_slope", "1.0 + clip_high", "1.0 + clip_low"),
    ("surrogate_slope", " | (d.abs() > CLAMP)", ""),
    ("surrogate_slope", "a < 0", "a > 0"),
    ("is_clipped", "advantage > 0", "advantage < 0"),
    ("is_clipped", "1.0 - clip_low", "1.0 - clip_high"),
    ("kl_estimate", "r - 1.0 - d", "r - 1.0 + d"),
    ("row_of", "offsets[1:] - offsets[:-1]", "(offsets[1:] - offsets[:-1]).flip(0)"),
    ("row_sums", "index_add(0, row,", "index_add(0, rows - 1 - row,"),
    ("denominators", "max(counts.tokens, 1.0)", "max(counts.rows, 1.0)"),
    ("denominators", '"seq-mean-token-mean" else', '"rollout-mean" else'),
    ("denominators", ".clamp(min=1.0)", ".clamp(min=2.0)"),
    ("denominators", "max(total, 1.0)", "max(total, 2.0)"),
    ("row_weight", "/ tokens / total", "/ total"),
    ("row_weight", "weight.double()", "1.0"),
    ("aggregate", "* weight.double() / tokens", "/ tokens"),
    ("aggregate", ".sum() / total", ".sum()"),
    ("aggregate", "torch.where(mask, x, torch.zeros((), dtype=x.dtype, device=x.device))", "x"),
]  # fmt: skip


def test_the_definitions_pass_as_they_are():
    assert who_fails(ALL) is None


def test_every_definition_has_a_planted_error():
    assert functions_of(definition) == {name for name, _, _ in ERRORS}


@pytest.mark.parametrize("error", ERRORS, ids=[f"{name}: {wrong}" for name, _, wrong in ERRORS])
def test_a_planted_error_fails_a_test(error, monkeypatch):
    plant(monkeypatch, definition, error)
    assert who_fails(ALL), f"no test noticed {error}"
