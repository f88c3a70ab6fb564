"""From rewarded trees to credits, and from statistics to branch points."""

from dataclasses import replace

import numpy as np
import pytest

from appo.algo.advantages import prefix_credit
from appo.algo.branching import eligible_positions, plan_branches
from appo.algo.credit import assign
from appo.algo.presets import ALGORITHMS
from appo.errors import ConfigError
from appo.types import Leaf, Node, RolloutTree, Task

TASK = Task("t", [{"role": "user", "content": "q"}], "1")
APPO, GRPO = ALGORITHMS["appo"], ALGORITHMS["grpo"]


def model(parent, fork_at, n, path):
    return Node(parent, "model", fork_at, list(range(n)), [-0.5] * n, [1.0] * n, 0, path)


def tree(root_rewards=(1.0, 0.0), branches=((0, 2, 1.0), (1, 3, 0.0))):
    """Two roots of 4 + tool(2) + 3 tokens; branches (root, split inside the first turn, reward) of
    5 tokens.
    """
    t = RolloutTree(TASK, [Node(None, "prompt", 0, [7, 8, 9])])
    for r, reward in enumerate(root_rewards):
        t.nodes += [model(0, 3, 4, (r,)), Node(len(t.nodes), "tool", 4, [90, 91], path=(r,))]
        t.nodes.append(model(len(t.nodes) - 1, 2, 3, (r,)))
        t.leaves.append(Leaf(len(t.nodes) - 1, r, reward=reward))
    for k, (root, split, reward) in enumerate(branches):
        t.nodes.append(model(1 + 3 * root, split, 5, (root, k)))
        t.leaves.append(
            Leaf(len(t.nodes) - 1, root, branch=k, parent_leaf=root, split=split, reward=reward)
        )
    return t


def test_roots_carry_prefix_credit_and_branches_none():
    out = assign([tree()], APPO)
    (credits,) = out.credits
    assert [c.leaf for c in credits] == [0, 1]
    want = prefix_credit([1.0, 0.0], [1.0, 0.0], [0, 1], [2, 3], [9, 9])
    mask = np.array([1, 1, 1, 1, 0, 0, 1, 1, 1], bool)
    for c, base in zip(credits, want, strict=True):
        assert np.array_equal(c.loss_mask, mask)
        np.testing.assert_array_equal(c.advantage, np.where(mask, base, 0))
    # Denominators: 7 trained tokens a root; 2 rows; all 4 leaves (the 1/M of the paper).
    assert (out.counts.tokens, out.counts.rows, out.counts.rollouts) == (14, 2, 4)


def test_branches_are_trained_from_their_split_on_only_if_asked():
    out = assign([tree()], replace(APPO, train_branches=True))
    branch = [c for c in out.credits[0] if c.leaf == 2]
    assert len(branch) == 1 and not branch[0].loss_mask[:2].any() and branch[0].loss_mask[2:].all()
    assert np.unique(branch[0].advantage[2:]).size == 1 and branch[0].advantage[2] > 0


def test_groups_without_signal_leave_no_rows_but_stay_in_the_denominators():
    same = tree((0.5, 0.5), ((0, 2, 0.3), (1, 3, 0.3)))
    out = assign([same, tree()], APPO)
    assert out.credits[0] == [] and len(out.credits[1]) == 2 and out.zero_groups == 1
    assert (out.counts.tokens, out.counts.rows, out.counts.rollouts) == (28, 4, 8)


def test_equal_roots_with_unequal_branches_still_teach():
    out = assign([tree((0.5, 0.5), ((0, 2, 1.0), (1, 3, 0.0)))], APPO)
    first, second = out.credits[0]
    assert (first.advantage[:2] > 0).all() and not first.advantage[2:].any()
    assert (second.advantage[:3] < 0).all() and not second.advantage[3:].any()


def test_an_ungraded_leaf_is_left_out_and_counted():
    t = tree()
    t.leaves[3].reward = None
    out = assign([t], APPO)
    assert out.ungraded == 1 and out.counts.rollouts == 3
    t.leaves[0].reward = None  # its branch has nobody to speak for any more
    out = assign([t], APPO)
    assert out.ungraded == 2 and out.credits == [[]]


def test_grpo_trains_every_leaf_of_a_prompt():
    t = tree((1.0, 0.0), ())
    out = assign([t], GRPO)
    a = [c.advantage[0] for c in out.credits[0]]
    assert a == pytest.approx([2**-0.5, -(2**-0.5)], abs=1e-5) and out.counts.rows == 2


# -- branch points


def arrays(n=12, roots=2, seed=0):
    rng = np.random.default_rng(seed)
    entropy = [rng.random(n).astype(np.float32) for _ in range(roots)]
    ratio = [0.1 * rng.standard_normal(n).astype(np.float32) for _ in range(roots)]
    ones = [np.ones(n, bool) for _ in range(roots)]
    return entropy, ratio, ones


def test_unmoved_weights_rank_by_entropy_and_say_so():
    entropy, ratio, ones = arrays()
    plan = plan_branches(entropy, [0 * r for r in ratio], ones, ones, APPO, seed=0)
    assert plan.omega_uninformative == [True, True] and {p.rule for p in plan.points} == {"entropy"}
    for root in range(2):
        got = [p.position for p in plan.points if p.root == root]
        above = np.flatnonzero(entropy[root] > entropy[root].mean())
        assert got == sorted(above, key=lambda i: -entropy[root][i])[: APPO.branches]


def test_strict_points_are_positive_in_both_and_come_first():
    entropy, ratio, ones = arrays(40)
    plan = plan_branches(entropy, ratio, ones, ones, APPO, seed=0)
    assert not any(plan.omega_uninformative) and plan.shortfall == 0
    for p in plan.points:
        assert p.z_entropy > 0 and (p.rule != "strict" or (p.z_omega > 0 and p.score > 0))


def test_a_shortfall_is_reported_not_padded():
    entropy, ratio, ones = arrays()
    one = [np.arange(12) == int(entropy[r].argmax()) for r in range(2)]
    plan = plan_branches(entropy, ratio, ones, one, APPO, seed=0)
    assert len(plan.points) == 2 and plan.shortfall == 2 * APPO.branches - 2


def test_random_branching_is_seeded_and_distinct():
    entropy, ratio, ones = arrays()
    algo = replace(APPO, branch_by="random")
    a, b, c = (plan_branches(entropy, ratio, ones, ones, algo, seed=s).points for s in (1, 1, 2))
    assert a == b != c
    assert len({(p.root, p.position) for p in a}) == len(a) == 6


def test_entropy_branching_ignores_omega():
    entropy, ratio, ones = arrays(40)
    algo = replace(APPO, branch_by="entropy")
    plan = plan_branches(entropy, ratio, ones, ones, algo, seed=0)
    zero = plan_branches(entropy, [0 * r for r in ratio], ones, ones, APPO, seed=0)
    assert [(p.root, p.position) for p in plan.points] == [
        (p.root, p.position) for p in zero.points
    ]


def test_positions_past_the_budget_are_not_eligible():
    view = tree().trajectory(0)
    drawable, none = np.ones(100, bool), np.zeros(len(view), bool)
    assert eligible_positions(view, none, drawable, room=7).sum() == 7
    assert eligible_positions(view, none, drawable, room=5).tolist() == [True] * 4 + [
        False,
        False,
        True,
        False,
        False,
    ]
    closing = np.arange(9) == 3
    assert not eligible_positions(view, closing, drawable, 7)[3]


@pytest.mark.parametrize(
    ("rule", "said"),
    [
        (lambda *_: None, "'mine' returned NoneType"),
        (lambda tree, graded, algo: [1.0 for _ in graded], "returned a list of float"),
        (lambda *given: 2 * ALGORITHMS["grpo"].advantage(*given), "at most one Credit"),
        (lambda tree, _, algo: ALGORITHMS["grpo"].advantage(tree, [0, 1], algo)[:1], ""),
    ],
)
def test_what_an_advantage_rule_returns_is_checked(rule, said):
    mine = replace(ALGORITHMS["grpo"], name="mine", advantage=rule)
    if said:
        with pytest.raises(ConfigError, match=said):
            assign([tree()], mine)
    else:  # fewer credits than leaves: the others are not trained
        assert assign([tree()], mine).counts.rows == 1
