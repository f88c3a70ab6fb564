"""Ten thousand random operations on a tree that is often full leave no block, no node and no memory
behind.
"""

from pathlib import Path

import pytest
from support.tree_shadow import TREES

from appo.rollout.native.tree.integrity import check_tree


@pytest.fixture(scope="module")
def soak():
    """bench/engine/tree_soak.py."""
    from bench.engine import tree_soak

    return tree_soak


@pytest.mark.parametrize("make", TREES)
def test_nothing_is_left_after_ten_thousand_operations(soak, make):
    tree = make(soak.MAX_BLOCKS)
    done = soak.life(tree, 10_000, seed=1)
    assert all(count > 20 for count in done.values()), done
    assert tree.peak == soak.MAX_BLOCKS  # it was full, and exhausted, on the way
    assert tree.used == tree.live_nodes == tree.live_sequences == tree.tokens_held == tree.span == 0
    assert tree.free == tree.capacity == soak.MAX_BLOCKS
    check_tree(tree)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="resident memory is read there")
def test_memory_is_flat(soak):
    assert soak.growth(5_000, lives=6) < 1 << 20


def test_both_trees_live_the_same_life(soak):
    lives = [soak.life(make(soak.MAX_BLOCKS), 2_000, seed=2) for make in TREES]
    assert all(life == lives[0] for life in lives)
