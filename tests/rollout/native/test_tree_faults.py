"""Faults planted in the segment tree: `check_tree` sees them, and so do random operations that know
nothing of its inside.

Faults in the C++ are planted in its sources, by bench/evidence/seeded_faults.py.
"""

import sys
from array import array
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test
from support import tree_shadow
from support.tree_machine import Operations
from support.tree_shadow import TREES

from appo.errors import EngineError, StaleWeightsError
from appo.rollout.native.tree import native_tree, segment_tree
from appo.rollout.native.tree.block_list import BlockList, blocks_for
from appo.rollout.native.tree.integrity import check_tree
from appo.rollout.native.tree.layout import lay_out
from appo.rollout.native.tree.native_tree import NativeTree
from appo.rollout.native.tree.segment_tree import SegmentTree

if sys.platform == "linux":
    import resource

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="memory is limited with RLIMIT_AS")
native_only = pytest.mark.skipif(NativeTree not in TREES, reason="the native library is not there")


def planted(tree=SegmentTree):
    """A prompt with two forks, all with KV: blocks 0 1 2 · 3 · 4, 40 + 1 + 1 positions."""
    tree = tree()
    prompt = tree.add(range(40))
    seqs = [prompt, tree.fork(prompt, 40), tree.fork(prompt, 20)]
    tree.commit(tree.plan(seqs, 1000))
    check_tree(tree)
    return tree, seqs


# -- what check_tree sees --------------------------------------------------------------------------


def test_check_sees_a_block_freed_early():
    tree, (_prompt, *_) = planted()
    tree.blocks.give_back([1], 0, defer=False)
    with pytest.raises(EngineError, match="block 1 of node 0 is free: it was given back too early"):
        check_tree(tree)
    layout = tree.plan([tree.add([5])], 10)  # and somebody else gets it
    assert layout.blocks.tolist() == [1]
    with pytest.raises(EngineError, match="block 1 of node 0 is of node 3"):
        check_tree(tree)


def test_a_block_freed_twice_raises():
    tree, _ = planted()
    tree.blocks.give_back([1], 0, defer=False)
    with pytest.raises(EngineError, match="block 1 is given back by node 0 but belongs to -1"):
        tree.blocks.give_back([1], 0, defer=False)


def test_check_sees_a_block_with_two_writers():
    tree, _ = planted()
    parent, child = tree.nodes[0], tree.nodes[2]
    child.blocks[0] = parent.blocks[1]  # the tail block shared instead of a fresh one
    with pytest.raises(
        EngineError, match="block 1 of node 2 is of node 0|block 1 is held by nodes"
    ):
        check_tree(tree)


@pytest.mark.parametrize("tree", TREES)
def test_check_sees_a_slot_that_would_be_overwritten(tree):
    tree, (prompt, _child, _) = planted(tree)
    tree.truncate(prompt, 40)
    layout = tree.layout([(0, 30, 10), (1, 0, 1)])  # all rows have KV
    check_tree(tree)
    layout.slots[3] = 2 * 16 + 1
    with pytest.raises(EngineError, match="position 33 of node 0 has KV and would be overwritten"):
        check_tree(tree)


@pytest.mark.parametrize("tree", TREES)
def test_check_sees_a_row_that_writes_elsewhere_or_where_another_does(tree):
    tree, (_prompt, child, other) = planted(tree)
    tree.extend(child, [1])
    tree.extend(other, [1])
    layout = tree.plan([child, other], 0)
    check_tree(tree)
    right = layout.slots.clone()
    layout.slots[0] = 0  # the prompt's
    with pytest.raises(EngineError, match="row 0 writes to slot 0, not its own"):
        check_tree(tree)
    layout.slots[:] = right[0]
    with pytest.raises(EngineError, match="two rows of the open layout write to one slot"):
        check_tree(tree)
    layout.slots[:] = right
    check_tree(tree)


def test_kv_of_old_weights_is_never_read():
    tree, (prompt, *_) = planted()
    tree.version += 1  # new weights, and nothing was dropped
    with pytest.raises(EngineError, match="block 0 of node 0 holds KV of version 0, not 1"):
        check_tree(tree)
    with pytest.raises(StaleWeightsError, match="block 0 of node 0 holds KV of version 0, the wei"):
        tree.plan([prompt], 10)


def test_check_sees_counts_that_are_wrong():
    for attribute, wrong, message in (
        ("refs", 2, "node 1 counts 2 references, 1 are there"),
        ("kv", 5, "node 1 has KV of positions it has not"),
        ("blocks", [], "node 1 has 0 blocks, 1 positions need 1"),
        ("handle", None, "node 1 counts 1 references, 0 are there"),
    ):
        tree, _ = planted()
        setattr(tree.nodes[1], attribute, wrong)
        with pytest.raises(EngineError, match=message):
            check_tree(tree)
    for attribute, wrong, message in (
        ("planned", 2, "node 1 is planned for 2 positions, the open layout runs others"),
        ("lost", 2, "node 1 has lost KV of positions it has not"),
        ("handle", 7, "handle 7 is not of node 1"),
    ):
        tree, (_, child, _) = planted()
        tree.extend(child, [1])
        tree.nodes[1].tokens.pop() if attribute == "lost" else None
        setattr(tree.nodes[1], attribute, wrong)
        with pytest.raises(EngineError, match=message):
            check_tree(tree)
    tree, _ = planted()
    tree.tokens_held += 1
    with pytest.raises(EngineError, match="tokens_held is 43, nodes hold 42"):
        check_tree(tree)


@pytest.mark.parametrize("list_of", ["blocks", "free_ids", "deferred"])
def test_check_sees_a_block_that_was_never_made(list_of):
    for block in (99, -1):
        tree, _ = planted()
        blocks = tree.nodes[1].blocks if list_of == "blocks" else getattr(tree.blocks, list_of)
        blocks[:] = [block]
        with pytest.raises(EngineError, match=f"there is no block {block}, only 5"):
            check_tree(tree)


def test_check_sees_more_blocks_than_there_may_be():
    tree, _ = planted()
    tree.blocks.limit = 4
    with pytest.raises(EngineError, match="more blocks are used than there may be"):
        check_tree(tree)


@pytest.mark.parametrize("tree", TREES)
def test_check_sees_a_row_that_writes_to_somebody_elses_block_when_its_own_went(tree):
    tree, (_prompt, child, _other) = planted(tree)
    tree.extend(child, [1])
    layout = tree.plan([child], 10)
    tree.release(child)
    check_tree(tree)
    layout.slots[0] = 16  # the prompt's
    with pytest.raises(EngineError, match="row 0 of node 1 writes to block 1, which is of node 0"):
        check_tree(tree)
    layout.slots[0] = 16 * 99
    with pytest.raises(EngineError, match="there is no block 99, only 5"):
        check_tree(tree)


@pytest.mark.parametrize("tree", TREES)
def test_check_sees_slots_that_are_not_one_for_each_row(tree):
    tree = tree()
    layout = tree.plan([tree.add(range(40))], 100)
    for slots in (layout.slots[:0], layout.slots[:39], layout.slots.repeat(2)):
        layout.slots = slots
        with pytest.raises(EngineError, match=f"has {len(slots)} slots for 40 rows"):
            check_tree(tree)


# -- what goes wrong from outside ------------------------------------------------------------------


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
@pytest.mark.parametrize("tree", TREES)
def test_a_plan_whose_tables_are_not_finished_is_not_open(monkeypatch, tree, error):
    def fail(*_, **__):
        raise error

    module, name = (segment_tree, "lay_out") if tree is SegmentTree else (native_tree, "Layout")
    tree, (prompt, *_) = planted(tree)
    tree.extend(prompt, range(50))
    with monkeypatch.context() as patch:
        patch.setattr(module, name, fail)
        with pytest.raises(error):
            tree.plan([prompt], 1000)
    check_tree(tree)
    assert (tree.open, tree.used, tree.kv(prompt)) == (None, 5, 40)
    layout = tree.plan([prompt], 1000)
    with monkeypatch.context() as patch:  # refused, and the open one stays
        patch.setattr(module, name, fail)
        with pytest.raises(EngineError, match="a layout is open"):
            tree.plan([prompt], 1000)
    assert tree.open is layout
    tree.commit(layout)
    assert tree.kv(prompt) == 90
    check_tree(tree)


@native_only
@pytest.mark.parametrize("how", ["commit", "abort"])
def test_a_layout_closed_as_ctrl_c_comes_is_closed(monkeypatch, how):
    tree, (prompt, *_) = planted(NativeTree)
    layout, close = tree.plan([prompt], 10), getattr(tree._call, how)

    def interrupted(*args):
        close(*args)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(tree._call, how, interrupted)
        with pytest.raises(KeyboardInterrupt):
            getattr(tree, how)(layout)
    assert tree.open is None
    with pytest.raises(EngineError, match=f"{how}: this layout is not open"):
        getattr(tree, how)(layout)
    check_tree(tree)
    tree.abort(tree.plan([prompt], 10))


@native_only
def test_the_interpreter_lock_is_held_while_the_tree_changes():
    calls = vars(NativeTree()._call)
    assert len(calls) > 20 and not any(call.release_gil for call in calls.values())


class Short:
    """Little memory within: what is there now and so many bytes more."""

    def __init__(self, more: int):
        self.more = more

    def __enter__(self):
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        self.limits = resource.getrlimit(resource.RLIMIT_AS)
        limit = pages * resource.getpagesize() + self.more
        resource.setrlimit(resource.RLIMIT_AS, (limit, self.limits[1]))

    def __exit__(self, *_):
        resource.setrlimit(resource.RLIMIT_AS, self.limits)


@native_only
@linux_only
def test_an_operation_for_which_there_is_no_memory_is_not_done():
    tree, (prompt, *_) = planted(NativeTree)
    many = bytes(8 << 23)  # 8M tokens, 64 MiB
    for call in (
        lambda: tree._call.add(tree._tree, many),
        lambda: tree._call.extend(tree._tree, prompt, many),
    ):
        failed = 0
        for more in range(0, 512 << 20, 16 << 20):
            facts = tree.live_nodes, tree.live_sequences, tree.length(prompt)
            try:
                with Short(more):
                    call()
                break
            except (RuntimeError, MemoryError):
                failed += 1
            assert (tree.live_nodes, tree.live_sequences, tree.length(prompt)) == facts
            check_tree(tree)
        assert 2 < failed < 31


@native_only
@linux_only
def test_a_plan_for_whose_tables_there_is_no_memory_is_not_open():
    tree, (_, seq, _) = planted(NativeTree)
    for _ in range(100):
        tree.extend(seq, [1])
        seq = tree.fork(seq, tree.length(seq))
    tree.extend(seq, range(100_000))  # 100 levels of limits for each: 80 MB
    used = tree.used
    with Short(48 << 20), pytest.raises((RuntimeError, MemoryError)):
        tree._call.plan(tree._tree, array("q", [seq]).tobytes(), 10**6)  # without Python's help
    assert (tree._counts()[8], tree.used) == (0, used)
    check_tree(tree)
    tree.commit(tree.plan([seq], 10**6))
    check_tree(tree)


# -- what random operations see, without check_tree ------------------------------------------------


class FreesEarly(SegmentTree):
    """A node that only children need is trimmed to one position less than they inherit."""

    def _keep(self, node, count):
        return super()._keep(node, count - 1 if node.handle is None and count else count)


class DoesNotDefer(SegmentTree):
    """Blocks are free while a forward pass may still read them."""

    def _keep(self, node, count):
        freed = super()._keep(node, count)
        self.blocks.settle()
        return freed


class Overwrites(SegmentTree):
    """A fork takes over its parent's last block."""

    def fork(self, seq, at):
        parent, child = self._get(seq), super().fork(seq, at)
        if parent.blocks:
            self._get(child).blocks = parent.blocks[-1:]
        return child

    def _keep(self, node, count):
        self.blocks.owner[:] = [
            node.id if b in node.blocks else o for b, o in enumerate(self.blocks.owner)
        ]
        return super()._keep(node, count)


class KeepsOldKV(SegmentTree):
    """New weights, and the KV of the old ones is read on."""

    def new_version(self, version):
        self.version = version
        self.blocks.version = [version] * len(self.blocks.version)


class TruncatesChildren(SegmentTree):
    """Truncation does not look at who stands on what it drops."""

    def truncate(self, seq, length):
        node = self._get(seq)
        if not node.base < length < node.length:
            return super().truncate(seq, length)
        del node.tokens[length - node.base :]
        self._keep(node, len(node.tokens) - 1)


class LeaksAborted(SegmentTree):
    """Blocks taken for rows that were not run stay taken."""

    def abort(self, layout):
        for row_range in self._closing(layout, "abort"):
            row_range.node.planned = 0
            del row_range.node.blocks[blocks_for(row_range.node.kv) :]
        self.blocks.settle()


class ReadsTooFar(SegmentTree):
    """Forks read one position more than they inherit."""

    def _settle(self, ranges, decode_rows):
        layout = super()._settle(ranges, decode_rows)
        if not isinstance(layout, int):
            for read in layout.reads.tolist():
                segment, first, last, start = read
                limits = layout.limits[start : start + last - first]
                limits[:-1][limits[:-1] < layout.segments[segment, 1]] += 1
        return layout


def caught(monkeypatch, tree, examples=300) -> bool:
    monkeypatch.setattr(tree_shadow, "TREES", [tree])
    monkeypatch.setattr(tree_shadow, "check_tree", lambda tree: None)
    quick = settings(
        max_examples=examples, stateful_step_count=40, deadline=None, derandomize=True, database=None,
        phases=[Phase.generate], suppress_health_check=list(HealthCheck), print_blob=False,
    )  # fmt: skip
    try:
        run_state_machine_as_test(Operations, settings=quick)
    except (Exception, pytest.fail.Exception):  # whatever a faulty tree runs into
        return True
    return False


@pytest.mark.parametrize(
    "fault",
    [
        FreesEarly,
        DoesNotDefer,
        Overwrites,
        KeepsOldKV,
        TruncatesChildren,
        LeaksAborted,
        ReadsTooFar,
    ],
)
def test_random_operations_see_the_fault(monkeypatch, fault):
    assert caught(monkeypatch, fault)


def test_random_operations_see_a_row_that_overwrites_kv(monkeypatch):
    def faulty(ranges, decode_rows):
        layout = lay_out(ranges, decode_rows)
        for row_range in ranges:
            row, start, count = layout.rows_of[row_range.node.id]
            layout.slots[row : row + count] = layout.slots.new_tensor(
                [row_range.node.slot(i) for i in range(start, start + count)]
            )
        return layout

    monkeypatch.setattr(segment_tree, "lay_out", faulty)
    assert caught(monkeypatch, SegmentTree)


def test_random_operations_find_nothing_wrong_without_a_fault(monkeypatch):
    assert not caught(monkeypatch, SegmentTree, examples=30)


def test_the_free_list_takes_back_what_it_gave():
    blocks = BlockList(limit=3)
    taken = blocks.take(2, owner=7, version=0)
    assert (taken, blocks.free, blocks.lacking(2)) == ([0, 1], 1, 1)
    blocks.give_back([0], 7, defer=True)
    assert (blocks.used, blocks.free, blocks.span) == (2, 1, 2)
    blocks.settle()
    assert (blocks.used, blocks.take(1, owner=8, version=1)) == (1, [0])
