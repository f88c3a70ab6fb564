"""Prompts with a common beginning become forks of each other."""

import random

import pytest
from support.tree_shadow import TREES

from appo.rollout.native.prompts import MIN_SHARED, Prompts
from appo.rollout.native.tree.integrity import check_tree

COMMON = list(range(100, 140))


@pytest.fixture(params=TREES)
def prompts(request):
    return Prompts(request.param())


def run(prompts, *seqs) -> int:
    """Prefill; returns the number of rows that took."""
    layout = prompts.tree.plan(seqs, 10**6)
    prompts.tree.commit(layout)
    check_tree(prompts.tree)
    return len(layout.ids)


def test_the_kv_of_the_longest_common_prefix_is_shared(prompts):
    tree = prompts.tree
    first, _ = prompts.add([*COMMON[:20], 1, 2, 3])
    second, shared = prompts.add([*COMMON, 4])
    assert (
        shared == 19 and tree.base(second) == 19
    )  # the 20th is run again: it predicts the first own token
    assert run(prompts, first, second) == 23 + 22
    third, shared = prompts.add([*COMMON, 5, 6])
    assert shared == 39 and tree.tokens(third) == [*COMMON, 5, 6]
    assert run(prompts, third) == 3


def test_the_same_prompt_again_costs_one_row(prompts):
    first, _ = prompts.add(COMMON)
    run(prompts, first)
    again, shared = prompts.add(COMMON)
    assert shared == len(COMMON) - 1 and run(prompts, again) == 1


@pytest.mark.parametrize("length", [MIN_SHARED - 1, MIN_SHARED])
def test_short_prefixes_are_not_shared(prompts, length):
    prompts.add([*COMMON[:length], 1])
    _, shared = prompts.add([*COMMON[:length], 2])
    assert shared == (0 if length < MIN_SHARED else length - 1)


def test_sharing_can_be_left_out(prompts):
    prompts.add(COMMON)
    assert prompts.add(COMMON, share=False)[1] == 0


def test_what_was_forgotten_stale_or_cut_is_not_shared(prompts):
    tree = prompts.tree
    first, _ = prompts.add(COMMON)
    prompts.forget(first)
    tree.release(first)
    second, shared = prompts.add(COMMON)
    assert shared == 0
    run(prompts, second)
    tree.new_version(1)
    third, shared = prompts.add(COMMON)
    assert shared == 0 and not tree.stale(third)
    tree.truncate(third, 18)
    prompts.truncated(third, 18)
    prompts.forget(second)
    assert prompts.add(COMMON)[1] == 17  # no more than there still is


@pytest.mark.parametrize("left, shared", [(MIN_SHARED - 1, 0), (MIN_SHARED, 15), (20, 19)])
def test_a_prompt_that_was_cut_and_went_on_otherwise_shares_what_is_left(prompts, left, shared):
    tree = prompts.tree
    first, _ = prompts.add(COMMON)
    tree.truncate(first, left)
    prompts.truncated(first, left)
    tree.extend(first, [7] * 30)
    second, there = prompts.add(COMMON)
    assert (there, tree.tokens(second)) == (shared, COMMON)
    prompts.truncated(tree.fork(first, 3), 2)  # no prompt


def test_forgetting_any_sequence_is_harmless(prompts):
    first, _ = prompts.add(COMMON)
    fork = prompts.tree.fork(first, 3)
    for seq in (fork, first, first):
        prompts.forget(seq)
    assert not prompts._by_start and not prompts._start_of


def test_among_many_prompts_the_best_is_found(prompts):
    rng = random.Random(0)
    live: dict[int, list[int]] = {}
    for _ in range(60):
        ids = [
            *COMMON[: rng.randint(10, 40)],
            *(rng.randrange(3) for _ in range(rng.randint(1, 6))),
        ]
        best = max((prefix(ids, other) for other in live.values()), default=0)
        seq, shared = prompts.add(ids)
        assert shared == (best - 1 if best >= MIN_SHARED else 0)
        assert prompts.tree.tokens(seq) == ids
        live[seq] = ids
        if len(live) > 10:
            gone = rng.choice(list(live))
            prompts.forget(gone)
            prompts.tree.release(gone)
            del live[gone]
    check_tree(prompts.tree)


def prefix(a: list[int], b: list[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))
