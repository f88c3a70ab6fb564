"""Advantages against the golden vectors, and what must hold beyond them."""

import numpy as np
import pytest
from support.golden_vectors import vector

from appo.algo.advantages import dual_group_advantage, group_advantage, prefix_credit, standardise


def close(v, got, want):
    np.testing.assert_allclose(
        np.asarray(got, float), np.asarray(want, float), rtol=0, atol=v["tol"]
    )


@pytest.mark.parametrize("name", ["D1", "D2", "D3", "D4"])
def test_dual_group_and_prefix_credit(name):
    v = vector(name)
    i, e = v["inputs"], v["expected"]
    a_root, a_branch = dual_group_advantage(i["root_rewards"], i["branch_rewards"])
    close(v, a_root, e["A_init"])
    close(v, a_branch, e["A_branch"])
    mask = np.array(i["mask"])
    # The vectors name the chosen token, which the published code keeps: the branch draws from the
    # next one on.
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


def test_constant_up_to_rounding_is_constant():
    tenths = np.full(3, 0.1)  # their mean in float64 is not 0.1
    assert np.std(tenths) > 0 and not standardise(tenths).any()
    assert not group_advantage(tenths, [0, 0, 0], std="none").any()
    rounded = np.array([1.0, 1.0 + 2e-7], np.float32)
    assert not standardise(rounded).any() and standardise(rounded.astype(float)).any()


def test_group_advantage_conventions():
    v = vector("H1")
    r, uid, e = v["inputs"]["rewards"], v["inputs"]["uid"], v["expected"]
    close(v, group_advantage(r, uid), e["grpo_verl"])
    close(v, group_advantage(r, uid, std="population"), e["grpo_population_std"])
    close(v, group_advantage(r, uid, std="none"), e["dr_grpo"])
