"""The segment tree, both implementations: forks, tables, budgets, blocks, versions, errors."""

import numpy as np
import pytest
import torch
from support.tree_shadow import TREES, rows_read

from appo._kernels.common import native
from appo.errors import EngineError, StaleWeightsError
from appo.rollout.native.tree.integrity import check_tree
from appo.rollout.native.tree.layout import Layout
from appo.rollout.native.tree.native_tree import NativeTree, make_tree
from appo.rollout.native.tree.segment_tree import SegmentTree


@pytest.fixture(params=TREES)
def make(request):
    return request.param


class Pool:
    """What a slot holds: (position, token).

    `run` does what a forward pass does and checks what each row reads.
    """

    def __init__(self, tree):
        self.tree = tree
        self.held: dict[int, tuple[int, int]] = {}

    def run(self, layout: Layout, of: dict[int, list[int]]) -> None:
        """`of`: node → the tokens of a sequence through it."""
        node_of = [0] * len(layout.ids)
        for node, (row, _, count) in layout.rows_of.items():
            node_of[row : row + count] = [node] * count
        rows = list(zip(layout.positions.tolist(), layout.ids.tolist(), layout.slots.tolist()))
        for position, token, slot in rows:
            if slot >= 0:
                self.held[slot] = position, token
        for node, (position, _, _), slots in zip(node_of, rows, rows_read(layout)):
            assert [self.held[slot] for slot in slots] == list(enumerate(of[node]))[: position + 1]
        check_tree(self.tree)
        self.tree.commit(layout)

    def step(self, seqs, budget=10**6) -> Layout:
        layout = self.tree.plan(seqs, budget)
        assert isinstance(layout, Layout)
        self.run(layout, through(self.tree, seqs))
        return layout


def through(tree, seqs) -> dict[int, list[int]]:
    """Node → the tokens of the sequence that has most of it on its path."""
    steps = [(count, node, tree.tokens(s)) for s in seqs for node, count in tree.path(s)]
    return {node: tokens for _, node, tokens in sorted(steps)}


def rows(layout: Layout) -> list[tuple[int, int]]:
    return list(zip(layout.positions.tolist(), layout.ids.tolist()))


# -- forks and what is read ------------------------------------------------------------------------


@pytest.mark.parametrize("at", range(1, 35))
def test_forks_of_forks_at_every_position_of_a_block_read_their_own_path(make, at):
    tree = make()
    pool = Pool(tree)
    seqs = [tree.add(range(100, 134))]
    for level in range(1, 5):  # the fork, its fork, …, each `at` tokens into the one before it
        parent = seqs[-1]
        child = tree.fork(parent, tree.base(parent) + min(at, 34))
        assert tree.tokens(child) == tree.tokens(parent)[: tree.length(child)]
        tree.extend(child, range(1000 * level, 1000 * level + 33))
        seqs.append(child)
    pool.step(seqs)
    for seq in seqs:  # all go on, parents with children below them too
        tree.extend(seq, [7 + seq])
    layout = pool.step(seqs)
    assert len(layout.ids) == layout.decode_rows == len(seqs)
    assert [tree.kv(s) for s in seqs] == [tree.length(s) for s in seqs]


def test_a_fork_at_the_last_token_runs_that_token_again_and_takes_no_block_before(make):
    tree = make()
    parent = tree.add(range(32))
    Pool(tree).step([parent])
    used = tree.used
    child = tree.fork(parent, 32)
    assert tree.used == used == 2
    assert rows(tree.plan([child], 0)) == [(31, 31)]


def test_a_fork_within_what_the_parent_inherits_is_its_sibling(make):
    tree = make()
    root = tree.add(range(20))
    child = tree.fork(root, 10)
    tree.extend(child, [50, 51])
    below = tree.fork(child, 10)  # inherits nothing of the child
    first = tree.fork(child, 1)  # inherits nothing at all
    assert [n for n, _ in tree.path(below)][:-1] == [n for n, _ in tree.path(child)][:-1]
    assert tree.path(below)[0] == (0, 9) and len(tree.path(first)) == 1
    assert tree.tokens(below) == list(range(10)) and tree.tokens(first) == [0]


def test_the_tables_of_a_small_tree(make):
    """A prompt of 18 tokens, a fork at 18 and one at 5, and a fork of the first: four rows, three
    segments read.
    """
    tree = make()
    prompt = tree.add(range(18))
    a, b = tree.fork(prompt, 18), tree.fork(prompt, 5)
    tree.extend(a, [30, 31])
    tree.commit(tree.plan([a, b], 100))
    c = tree.fork(a, 19)
    for seq, token in ((a, 32), (b, 40)):
        tree.extend(seq, [token])

    layout = tree.plan([c, a, b], 0)
    blocks = {"prompt": [0, 1], "a": [2], "b": [3], "c": [4]}  # b leaves the prompt before a does
    assert rows(layout) == [(5, 40), (20, 32), (18, 30)]
    assert layout.out_rows.tolist() == [0, 1, 2] and layout.seqs == [b, a, c]
    assert layout.segments.tolist() == [[0, 17], [2, 2], [3, 4], [4, 1]]
    assert layout.blocks.tolist() == [*blocks["prompt"], *blocks["b"], *blocks["a"], *blocks["c"]]
    assert layout.reads.tolist() == [[0, 0, 3, 0], [1, 0, 1, 3], [2, 1, 3, 4], [3, 2, 3, 6]]
    assert layout.limits.tolist() == [4, 17, 17, 2, 4, 1, 1]
    assert layout.slots.tolist() == [3 * 16 + 1, 2 * 16 + 3, 4 * 16]
    assert layout.rows_of == {2: (0, 1, 1), 1: (1, 3, 1), 3: (2, 0, 1)}
    assert (layout.decode_rows, layout.prefill_rows) == (3, 0)
    for table in (layout.ids, layout.slots, layout.blocks, layout.limits, layout.reads):
        assert table.dtype == torch.int64 and table.is_contiguous()


def test_rows_of_an_ancestor_stand_before_those_of_its_descendants_in_one_layout(make):
    tree = make()
    root = tree.add(range(40))
    child = tree.fork(root, 20)
    tree.extend(child, [1] * 10)
    below = tree.fork(child, 25)
    late, early = tree.fork(root, 31), tree.fork(root, 7)
    layout = tree.plan([below, late, early, root, child], 1000)
    nodes = [tree.path(seq)[-1][0] for seq in (root, early, child, below, late)]
    assert list(layout.rows_of) == nodes
    Pool(tree).run(layout, through(tree, (root, child, below, late, early)))


# -- budget ----------------------------------------------------------------------------------------


def test_missing_ancestors_are_run_once_by_whoever_asks_first_and_within_the_budget(make):
    tree = make()
    prompt = tree.add(range(50))
    seqs = [tree.fork(prompt, 50) for _ in range(4)]
    counts = []
    while True:
        layout = tree.plan(seqs, 20)
        counts.append((layout.prefill_rows, layout.decode_rows, layout.seqs))
        tree.commit(layout)
        if layout.seqs:
            break
    assert counts == [(20, 0, []), (20, 0, []), (9, 4, seqs)]  # the forks need one row each


def test_a_sequence_that_lacks_one_row_is_in_whatever_the_budget(make):
    tree = make()
    long, short = tree.add(range(40)), tree.add([5])
    layout = tree.plan([long, short], 0)
    assert layout.seqs == [short] and rows(layout) == [(0, 5)]
    tree.commit(layout)
    tree.extend(short, [6])
    layout = tree.plan([long, short], 13)
    assert (layout.prefill_rows, layout.decode_rows) == (13, 1) and layout.seqs == [short]


def test_the_last_row_is_run_again_without_writing_where_it_has_kv(make):
    tree = make()
    seq = tree.add(range(20))
    tree.commit(tree.layout([(0, 0, 20)]))
    layout = tree.plan([seq], 0)
    assert rows(layout) == [(19, 19)] and layout.slots.tolist() == [-1]
    assert layout.limits.tolist() == [20] and layout.seqs == [seq]


def test_planning_nothing_gives_an_empty_layout(make):
    tree = make()
    tree.add(range(5))
    layout = tree.plan([0], 0)
    assert len(layout.ids) == 0 and layout.segments.shape == (0, 2) and layout.reads.shape == (0, 4)
    tree.commit(layout)
    assert tree.used == 0


# -- blocks ----------------------------------------------------------------------------------------


def test_exhaustion_says_how_many_blocks_are_lacking_and_changes_nothing(make):
    tree = make(max_blocks=4)
    first, second = tree.add(range(40)), tree.add(range(50))
    tree.commit(tree.plan([first], 1000))
    facts = [tree.kv(second), tree.used, tree.free, tree.peak, tree.span]
    assert tree.plan([second], 1000) == 3 and tree.layout([(1, 0, 17)]) == 1
    assert [tree.kv(second), tree.used, tree.free, tree.peak, tree.span] == facts
    check_tree(tree)
    assert isinstance(tree.plan([second], 16), Layout)  # one block is left


def test_blocks_given_back_while_a_layout_is_open_are_free_when_it_is_closed(make):
    tree = make(max_blocks=4)
    first, second = tree.add(range(40)), tree.add([1])
    tree.commit(tree.plan([first], 1000))
    layout = tree.plan([second], 0)
    tree.release(first)
    check_tree(tree)
    assert (tree.used, tree.free, tree.tokens_held) == (4, 0, 0)
    tree.commit(layout)
    assert (tree.used, tree.free, tree.tokens_held) == (1, 3, 1)
    check_tree(tree)


def test_rows_of_a_sequence_that_went_or_was_cut_meanwhile_do_not_count(make):
    tree = make()
    gone, cut, lost = (tree.add(range(30)) for _ in range(3))
    layout = tree.plan([gone, cut, lost], 1000)
    tree.release(gone)
    tree.truncate(cut, 10)
    tree.extend(cut, [99] * 10)
    tree.evict(lost)
    check_tree(tree)
    tree.commit(layout)
    check_tree(tree)
    assert (tree.kv(cut), tree.kv(lost), tree.used, tree.tokens_held) == (9, 0, 1, 9)


def test_aborting_gives_back_what_was_taken(make):
    tree = make()
    seq = tree.add(range(40))
    tree.abort(tree.plan([seq], 1000))
    assert (tree.used, tree.kv(seq), tree.peak, tree.span) == (0, 0, 3, 0)
    check_tree(tree)


def test_a_layout_is_closed_once_and_the_next_waits_for_it(make):
    tree = make()
    seq = tree.add(range(4))
    layout = tree.plan([seq], 10)
    with pytest.raises(EngineError, match="plan: a layout is open; commit or abort it first"):
        tree.plan([seq], 10)
    tree.commit(layout)
    for close in (tree.commit, tree.abort):
        for closed in (layout, None):
            with pytest.raises(EngineError, match="this layout is not open; each one is committed"):
                close(closed)
    again = tree.plan([seq], 10)
    assert tree.open is again
    for wrong in (layout, None):
        with pytest.raises(EngineError, match="abort: this layout is not open"):
            tree.abort(wrong)
    tree.abort(again)
    assert tree.open is None


def test_need_is_what_growing_to_the_ends_takes(make):
    tree = make()
    prompt = tree.add(range(50))
    seqs = [tree.fork(prompt, 50) for _ in range(3)]
    ends = [60, 90, 66]
    need = tree.need(seqs, ends)
    while any(tree.length(s) < end for s, end in zip(seqs, ends)):
        going = [s for s, end in zip(seqs, ends) if tree.length(s) < end]
        layout = tree.plan(going, 1000)
        tree.commit(layout)
        for seq in layout.seqs:
            tree.extend(seq, [1])
    assert need == tree.used == 4 + 1 + 3 + 1
    assert tree.need(seqs, ends) == 0
    with pytest.raises(EngineError, match="need: 3 sequences and 1 ends"):
        tree.need(seqs, [1])


def test_blocks_of_a_tree_are_hardly_more_than_its_tokens(make):
    """Prompt 512, 4 roots, 3 branches each in the middle, 256 new tokens."""
    tree = make()
    prompt = tree.add(range(512))
    roots = [tree.fork(prompt, 512) for _ in range(4)]
    grow(tree, roots, 256)
    branches = [tree.fork(root, 512 + 128) for root in roots for _ in range(3)]
    grow(tree, branches, 256)
    assert tree.tokens_held == 511 + 4 * 256 + 12 * 256
    assert tree.used * 16 <= 1.02 * tree.tokens_held
    for seq in (prompt, *roots, *branches):
        tree.release(seq)
    assert tree.used == tree.live_nodes == tree.span == 0 and tree.free == tree.capacity


def grow(tree, seqs, count):
    for _ in range(count):
        layout = tree.plan(seqs, 10**6)
        tree.commit(layout)
        for seq in layout.seqs:
            tree.extend(seq, [seq])


def test_the_lowest_free_block_is_taken_first(make):
    tree = make()
    seqs = [tree.add(range(17)) for _ in range(3)]  # two blocks each
    tree.commit(tree.plan(seqs, 1000))
    tree.release(seqs[1])
    tree.release(seqs[2])
    assert (tree.used, tree.span, tree.capacity, tree.free) == (2, 2, 6, 4)
    tree.commit(tree.plan([tree.add(range(50))], 1000))
    assert (tree.blocks_of(0), tree.blocks_of(3)) == ([0, 1], [2, 3, 4, 5])
    tree.release(seqs[0])
    assert tree.free_blocks() == [0, 1] and tree.span == 6


# -- what children keep ----------------------------------------------------------------------------


def test_releasing_a_parent_trims_it_to_what_children_inherit(make):
    tree = make()
    parent = tree.add(range(100))
    tree.commit(tree.plan([parent], 1000))
    far, near = tree.fork(parent, 60), tree.fork(parent, 20)
    tree.release(parent)
    assert (tree.tokens_held, tree.used, tree.live_nodes) == (59, 4, 3)
    tree.release(far)
    assert (tree.tokens_held, tree.used, tree.live_nodes) == (19, 2, 2)
    assert tree.tokens(near) == list(range(20)) and tree.kv(near) == 19
    tree.release(near)
    assert (tree.used, tree.live_nodes, tree.live_sequences) == (0, 0, 0)
    check_tree(tree)


def test_truncating_drops_tokens_and_the_kv_of_the_last_one_left(make):
    tree = make()
    seq = tree.add(range(40))
    tree.commit(tree.plan([seq], 1000))
    tree.truncate(seq, 40)
    assert (tree.length(seq), tree.kv(seq)) == (40, 40)
    tree.truncate(seq, 17)
    assert (tree.length(seq), tree.kv(seq), tree.used) == (17, 16, 1)
    tree.extend(seq, [77])
    assert rows(tree.plan([seq], 100)) == [(16, 16), (17, 77)]
    check_tree(tree)


def test_truncating_under_children_leaves_them_what_they_stand_on(make):
    tree = make()
    seq = tree.add(range(40))
    tree.commit(tree.plan([seq], 1000))
    child = tree.fork(seq, 30)
    tree.truncate(seq, 10)
    assert tree.tokens(seq) == list(range(10)) and tree.kv(seq) == tree.base(seq) == 9
    assert tree.tokens(child) == list(range(30)) and tree.kv(child) == 29
    assert tree.path(seq)[0] == tree.path(child)[0][:1] + (9,) and tree.tokens_held == 29
    tree.truncate(child, 5)  # within what it inherits
    assert tree.tokens(child) == list(range(5)) and tree.kv(child) == 4
    check_tree(tree)


def test_evicting_frees_the_private_span_and_it_is_run_again(make):
    tree = make()
    seq = tree.add(range(100))
    tree.commit(tree.plan([seq], 1000))
    child = tree.fork(seq, 40)
    assert tree.evict(seq) == 7 - 3 and tree.kv(seq) == 39 and tree.evict(seq) == 0
    assert tree.length(seq) == 100 and not tree.stale(seq) and tree.kv(child) == 39
    layout = tree.plan([seq], 1000)
    assert layout.positions.tolist() == list(range(39, 100))
    tree.commit(layout)
    check_tree(tree)


def test_evicting_a_path_frees_ancestors_that_nobody_with_kv_needs(make):
    tree = make()
    prompt = tree.add(range(64))
    a, b = tree.fork(prompt, 64), tree.fork(prompt, 33)
    tree.release(prompt)
    tree.commit(tree.plan([a, b], 1000))
    assert tree.evict(a, dict(tree.path(b))) == 1 + 2  # its own block, and the prompt's beyond 32
    assert (tree.kv(a), tree.kv(b), tree.used) == (32, 33, 3)
    assert tree.evict(b, {}) == 3 and tree.used == 0
    check_tree(tree)
    layout = tree.plan([a, b], 1000)
    assert (layout.prefill_rows, layout.decode_rows) == (63, 2)


# -- weights ---------------------------------------------------------------------------------------


def test_new_weights_void_all_kv_until_it_is_scored(make):
    tree = make()
    root, untouched = tree.add(range(40)), tree.add(range(3))
    child = tree.fork(root, 20)
    tree.commit(tree.plan([child], 1000))
    tree.new_version(5)
    assert (tree.version, tree.used, tree.tokens_held) == (5, 0, 0)
    assert tree.stale(root) and tree.stale(child) and not tree.stale(untouched)
    message = rf"plan\(seq={child}\): its KV was computed before version 5; call score\(\[{child}\]\) first"
    with pytest.raises(StaleWeightsError, match=message):
        tree.plan([child], 1000)
    with pytest.raises(StaleWeightsError, match="fork"):
        tree.fork(root, 3)
    (top, inherited), (leaf, own) = tree.path(child)
    with pytest.raises(StaleWeightsError, match="reads 19 positions of node 0, which has KV of 0"):
        tree.layout([(leaf, 0, own)])
    tree.commit(tree.layout([(top, 0, inherited), (leaf, 0, own)]))
    assert not tree.stale(child) and tree.kv(child) == 20
    assert rows(tree.plan([tree.fork(child, 20)], 0)) == [(19, 19)]
    check_tree(tree)


def test_what_was_evicted_before_the_weights_changed_is_stale_as_well(make):
    tree = make()
    seq = tree.add(range(20))
    tree.commit(tree.plan([seq], 1000))
    tree.evict(seq)
    tree.new_version(1)
    assert tree.stale(seq)


def test_a_node_that_was_run_again_in_part_is_stale_beyond(make):
    tree = make()
    seq = tree.add(range(50))
    tree.commit(tree.plan([seq], 1000))
    near, far = tree.fork(seq, 10), tree.fork(seq, 11)
    tree.new_version(1)
    node = tree.path(seq)[0][0]
    tree.commit(tree.layout([(node, 0, 9)]))
    check_tree(tree)
    assert [tree.stale(s) for s in (seq, near, far)] == [True, False, True] and tree.kv(seq) == 9
    for refused in (lambda: tree.plan([seq], 99), lambda: tree.fork(seq, 11)):
        with pytest.raises(StaleWeightsError, match=r"call score\(\[0\]\) first"):
            refused()
    tree.release(tree.fork(seq, 10))  # stands on nothing that was lost
    tree.evict(near, {})
    assert not tree.stale(near) and tree.kv(near) == 0  # evicted is not lost
    tree.new_version(2)  # all 49 are lost still, though only 9 had KV since
    assert [tree.stale(s) for s in (seq, near, far)] == [True, True, True]
    tree.commit(tree.layout([(node, 0, 20)]))
    assert [tree.stale(s) for s in (seq, near, far)] == [True, False, False]
    tree.truncate(seq, 21)
    assert not tree.stale(seq)
    check_tree(tree)


def test_whether_the_last_token_of_a_sequence_had_kv_does_not_matter(make):
    tree = make()
    seq, single = tree.add(range(20)), tree.add([1])
    tree.commit(tree.plan([seq, single], 1000))
    assert (tree.kv(seq), tree.kv(single)) == (20, 1)
    tree.new_version(1)
    assert tree.stale(seq) and not tree.stale(single)
    tree.commit(tree.layout([(0, 0, 19)]))  # what score runs
    tree.extend(seq, [1, 2])
    assert not tree.stale(seq)
    assert rows(tree.plan([seq], 1000)) == [(19, 19), (20, 1), (21, 2)]


def test_rows_run_while_the_weights_changed_do_not_count(make):
    tree = make()
    seq = tree.add(range(20))
    layout = tree.plan([seq], 1000)
    tree.new_version(1)
    tree.commit(layout)
    assert (tree.kv(seq), tree.used, tree.stale(seq)) == (0, 0, False)
    check_tree(tree)


def test_scoring_in_chunks_runs_every_row_and_keeps_the_kv_there_is(make):
    tree = make()
    pool = Pool(tree)
    seq = tree.add(range(50))
    pool.step([seq], 30)
    node = tree.path(seq)[0][0]
    for start, count in ((0, 25), (25, 24)):
        layout = tree.layout([(node, start, count)])
        slots = layout.slots.tolist()
        assert slots == [-1] * min(count, max(0, 30 - start)) + [
            *range(max(30, start), start + count)
        ]
        assert layout.limits.tolist() == list(range(start + 1, start + count + 1))
        pool.run(layout, {node: tree.tokens(seq)})
    assert tree.kv(seq) == 49


# -- errors ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda t: t.add([]), "add: ids is empty; a sequence needs at least one token"),
        (lambda t: t.fork(0, 0), r"fork\(seq=0, at=0\): at must be in 1 … 10, the sequence's"),
        (lambda t: t.fork(0, 11), r"fork\(seq=0, at=11\): at must be in 1 … 10"),
        (lambda t: t.truncate(0, 0), r"truncate\(seq=0, length=0\): length must be in 1 … 10"),
        (lambda t: t.truncate(0, 11), r"truncate\(seq=0, length=11\)"),
        (lambda t: t.plan([0, 0], 1), "plan: sequence 0 is named twice; name it once"),
        (lambda t: t.plan([0, 7], 1), "sequence 7 is unknown; use a live handle"),
        (lambda t: t.length(1), "sequence 1 was released; use a live handle"),
        (lambda t: t.release(1), "sequence 1 was released; use a live handle"),
        (lambda t: t.extend(-1, [2]), "sequence -1 is unknown; use a live handle"),
        (lambda t: t.blocks_of(9), "blocks_of: node 9 is unknown; take ids from path"),
        (lambda t: t.layout([(9, 0, 1)]), r"layout: node 9 is unknown; take ids from path\(\)"),
        (lambda t: t.layout([(0, 0, 1), (0, 1, 1)]), "layout: node 0 is named twice"),
        (lambda t: t.layout([(0, 1, 2)]), "rows 1 … 2 of node 0; it has 10 tokens and KV of 0"),
        (lambda t: t.layout([(0, 0, 11)]), "rows 0 … 10 of node 0; it has 10 tokens"),
        (lambda t: t.layout([(2, 0, 1)]), "node 2 reads 4 positions of node 0, which has KV of 0"),
    ],
)  # fmt: skip
def test_wrong_calls_say_what_is_wrong_and_change_nothing(make, call, message):
    tree = make()
    tree.add(range(10))
    tree.release(tree.add([1]))
    tree.fork(0, 5)
    with pytest.raises(EngineError, match=message):
        call(tree)
    check_tree(tree)
    layout = tree.plan([0, 2], 100)  # nothing is open, nothing was noted down
    assert sorted(layout.seqs) == [0, 2] and tree.tokens(0) == list(range(10))


def test_a_pool_without_blocks_is_refused(make):
    with pytest.raises(EngineError, match="max_blocks=0: must be at least 1"):
        make(0)


@pytest.mark.parametrize(
    "call",
    [
        lambda t: t.length("a"),
        lambda t: t.tokens(None),
        lambda t: t.add([1.0]),
        lambda t: t.extend(0, [2, "x"]),
        lambda t: t.fork(0, 3.0),
        lambda t: t.truncate(0, 3.0),
    ],
)
def test_what_is_no_whole_number_is_a_type_error(make, call):
    tree = make()
    tree.add(range(10))
    with pytest.raises(TypeError):
        call(tree)
    assert tree.tokens(0) == list(range(10)) and tree.live_nodes == 1
    check_tree(tree)


def test_handles_are_never_used_again(make):
    tree = make()
    seen = set()
    for _ in range(5):
        seq = tree.add([1, 2])
        assert seq not in seen
        seen.add(seq)
        tree.release(seq)


def test_tokens_may_come_from_numpy(make):
    tree = make()
    seq = tree.add(np.arange(5))
    tree.extend(seq, np.array([9]))
    assert tree.tokens(seq) == [0, 1, 2, 3, 4, 9] and type(tree.tokens(seq)[0]) is int


def test_the_native_tree_is_used_where_the_library_is(monkeypatch):
    there = native.load()[0] is not None
    assert type(make_tree(3)) is (NativeTree if there else SegmentTree)
    monkeypatch.setattr(native, "load", lambda: (None, "not built"))
    assert type(make_tree(3)) is SegmentTree and make_tree(3).capacity == 3
