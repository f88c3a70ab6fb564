"""Every definition of advantages, credit and branching rules is called and tested: a wrong one
fails a test.
"""

from pathlib import Path

import pytest
from support.planted import functions_of, load_tests, plant, who_fails

from appo.algo import advantages, branching, credit, objective
from appo.algo.presets import ALGORITHMS
from appo.algo.presets.flat import grpo
from appo.algo.presets.tree import appo, appo_released

HERE = Path(__file__).parent
adv, cred = load_tests(HERE / "test_advantages.py"), load_tests(HERE / "test_credit.py")
obj, rel = load_tests(HERE / "test_objective.py"), load_tests(HERE / "test_appo_released.py")

ADVANTAGES = [
    *((adv.test_dual_group_and_prefix_credit, (name,)) for name in ("D1", "D2", "D3", "D4")),
    (adv.test_redrawn_token_gets_no_credit_from_its_alternative, ()),
    (adv.test_constant_groups_are_exactly_zero, ()),
    (adv.test_constant_up_to_rounding_is_constant, ()),
    (adv.test_group_advantage_conventions, ()),
]
CREDIT = [
    (cred.test_roots_carry_prefix_credit_and_branches_none, ()),
    (cred.test_branches_are_trained_from_their_split_on_only_if_asked, ()),
    (cred.test_groups_without_signal_leave_no_rows_but_stay_in_the_denominators, ()),
    (cred.test_equal_roots_with_unequal_branches_still_teach, ()),
    (cred.test_an_ungraded_leaf_is_left_out_and_counted, ()),
    (cred.test_grpo_trains_every_leaf_of_a_prompt, ()),
    (
        cred.test_what_an_advantage_rule_returns_is_checked,
        (lambda *given: 2 * ALGORITHMS["grpo"].advantage(*given), "at most one Credit"),
    ),
]
BRANCHING = [
    (cred.test_unmoved_weights_rank_by_entropy_and_say_so, ()),
    (cred.test_strict_points_are_positive_in_both_and_come_first, ()),
    (cred.test_a_shortfall_is_reported_not_padded, ()),
    (cred.test_random_branching_is_seeded_and_distinct, ()),
    (cred.test_entropy_branching_ignores_omega, ()),
    (cred.test_positions_past_the_budget_are_not_eligible, ()),
]
OBJECTIVE = [
    *(
        (obj.test_loss_and_gradient_are_those_of_the_plain_formula, (here, cap))
        for cap in (2.0, 1.1, None)
        for here in (False, True)
    ),
    *(
        (obj.test_any_split_into_micro_batches_gives_the_same_gradient, (name,))
        for name in ("appo", "grpo")
    ),
]
RELEASED = [
    *((rel.test_released_objective, (name,)) for name in ("F1", "F2", "F3", "F4", "G16")),
    (rel.test_kl_estimators, ()),
    (rel.test_future_scale_released_vectors, ()),
    (rel.test_rows_with_two_dual_clipped_tokens_are_dropped, ()),
]  # fmt: skip

ERRORS = [
    (advantages, "_spread", "<= tolerance", "< 0.0", ADVANTAGES),
    (advantages, "standardise", "float(r.mean())", "0.0", ADVANTAGES),
    (advantages, "_z", "(std + EPS)", "(std + 1e-3)", ADVANTAGES),
    (advantages, "standardise", "ddof, raw.dtype", "1, raw.dtype", ADVANTAGES),
    (advantages, "group_advantage", 'ddof=1 if std == "sample" else 0', "ddof=0", ADVANTAGES),
    (advantages, "group_advantage", "r[i] - r[i].mean()", "r[i]", ADVANTAGES),
    (advantages, "group_advantage", "labels == label", "labels != ''", ADVANTAGES),
    (advantages, "dual_group_advantage", "standardise(branch_rewards)", "standardise(root_rewards)", ADVANTAGES),
    (advantages, "prefix_credit", "total[:split]", "total[: split + 1]", ADVANTAGES),
    (advantages, "prefix_credit", "root == i", "root != i", ADVANTAGES),
    (advantages, "prefix_credit", "base / 2", "base", ADVANTAGES),
    (advantages, "_literal", "float(b.mean())", "float(root.mean())", ADVANTAGES),
    (credit, "assign", "algo.advantage(tree, graded, algo)", "algo.advantage(tree, graded, algo)[:1]", CREDIT),
    (credit, "assign", "rollouts += len(graded)", "rollouts += len(credits)", CREDIT),
    (credit, "assign", "for c in credits)", "for c in signal)", CREDIT),
    (credit, "assign", "rows += len(credits)", "rows += len(signal)", CREDIT),
    (credit, "assign", "leaf.reward is not None", "leaf.is_root", CREDIT),
    (credit, "_check_credits", "len(set(leaves)) < len(leaves)", "len(leaves) < 0", CREDIT),
    (credit, "token_credit", "mask[:trained_from] = False", "pass", CREDIT),
    (credit, "token_credit", "np.where(mask, advantage, 0.0)", "np.where(mask, 0.0, advantage)", CREDIT),
    (credit, "reward_of", "return reward", "return 1.0 - reward", CREDIT),
    (grpo, "group_credit", 'std="sample"', 'std="population"', CREDIT),
    (appo, "dual_group_credit", "[_split(tree, i) for i in branches]", "[0 for i in branches]", CREDIT),
    (appo, "dual_group_credit", "if algo.train_branches", "if True", CREDIT),
    (appo, "dual_group_credit", "trained_from=split", "trained_from=0", CREDIT),
    (appo, "_parent", "return parent", "return 1 - parent", CREDIT),
    (appo, "_split", "return split", "return split + 1", CREDIT),
    (branching, "plan_branches", 'algo.branch_by == "score"', "True", BRANCHING),
    (branching, "plan_branches", "(root, i - base,", "(root, i,", BRANCHING),
    (branching, "eligible_positions", "(used < room)", "(used <= room)", BRANCHING),
    (branching, "eligible_positions", "& ~closes_call", "", BRANCHING),
    (branching, "_random", "Philox(seed)", "Philox(0)", BRANCHING),
    (objective, "make_objective", "rows.advantage * weight", "rows.advantage", OBJECTIVE),
    (objective, "make_objective", "torch.where(fresh, 0.0,", "torch.where(~fresh, 0.0,", OBJECTIVE),
    (objective, "importance_weight", "math.log(cap)", "cap", OBJECTIVE),
    (objective, "_metrics", '"clip_fraction": fused.clipped', '"clip_fraction": fused.tokens', OBJECTIVE),
    (appo_released, "released_scale", "d <= torch", "d <= 1e9 * torch", RELEASED),
    (appo_released, "released_scale", "f.clamp(0.8, 1.0)", "f", RELEASED),
    (appo_released, "sequence_filter", "<= 1", "<= 0", RELEASED),
    (appo_released, "kl_penalty", "0.5 * d * d", "d * d", RELEASED),
    (appo_released, "kl_penalty", "torch.exp(-d) - 1 + d", "torch.exp(d) - 1 - d", RELEASED),
]  # fmt: skip


def test_the_definitions_pass_as_they_are():
    assert who_fails([*ADVANTAGES, *CREDIT, *BRANCHING, *OBJECTIVE, *RELEASED]) is None


@pytest.mark.parametrize(
    "module", [advantages, credit, grpo, appo, branching, objective, appo_released]
)
def test_every_definition_has_a_planted_error(module):
    assert functions_of(module) == {name for m, name, *_ in ERRORS if m is module}


@pytest.mark.parametrize("error", ERRORS, ids=[f"{name}: {wrong}" for _, name, _, wrong, _ in ERRORS])  # fmt: skip
def test_a_planted_error_fails_a_test(error, monkeypatch):
    module, name, right, wrong, tests = error
    plant(monkeypatch, module, (name, right, wrong))
    assert who_fails(tests), f"no test noticed {wrong!r} in {name}"
