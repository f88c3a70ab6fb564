"""Random operations on segment trees.

All implementations against each other, and against a shadow of sets.

After every operation all facts agree and every invariant is recomputed (`check`). A pool is
simulated: committing a layout writes the origin of each row into its slot, and every row must read
exactly the origins of its own path, written under the weights of now. So a freed block read, a slot
overwritten or an old version read would be seen.
"""

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)
from support.tree_shadow import Both, Shadow, rows_read

from appo.errors import EngineError, StaleWeightsError
from appo.rollout.native.tree.layout import Layout

MAX_SEQS, MAX_TOKENS = 12, 150
NUMBER = st.integers(0, 10**6)  # taken modulo what there is
TOKENS = st.lists(st.integers(0, 99), min_size=1, max_size=40)


class Operations(RuleBasedStateMachine):
    @initialize(limit=st.sampled_from([None, 3, 10, 40]))
    def start(self, limit):
        self.tree, self.shadow = Both(limit), Shadow()
        self.limit = limit
        self.open: Layout | None = None
        self.rows: list[int] = []  # origin of each row of the open layout
        self.paths: list[list[int]] = []  # origins each row must read
        self.used_when_opened = 0
        self.version = self.version_when_opened = 0
        self.released: list[int] = []

    def seq(self, number):
        live = sorted(self.shadow.seqs)
        return live[-1 - number % len(live)]  # small numbers: the newest, so that trees get deep

    some = precondition(lambda self: self.shadow.seqs)
    closed = precondition(lambda self: self.open is None)
    is_open = precondition(lambda self: self.open is not None)
    below_limit = precondition(lambda self: len(self.shadow.seqs) < MAX_SEQS)

    # -- sequences ---------------------------------------------------------------------------------

    @below_limit
    @rule(tokens=TOKENS)
    def add(self, tokens):
        self.shadow.add(self.tree.add(tokens), tokens)

    @some
    @below_limit
    @rule(number=NUMBER, at=NUMBER, last=st.booleans())
    def fork(self, number, at, last):
        seq = self.seq(number)
        length = len(self.shadow.seqs[seq])
        at = length if last else 1 + at % length
        if self.shadow.stale(self.shadow.seqs[seq][: at - 1]):
            with pytest.raises(StaleWeightsError, match="fork.*score"):
                self.tree.fork(seq, at)
        else:
            self.shadow.fork(self.tree.fork(seq, at), seq, at)

    @some
    @below_limit
    @rule(number=NUMBER, back=st.lists(st.integers(0, 17), min_size=1, max_size=4))
    def fork_of_a_fork(self, number, back):
        """A chain of forks.

        Each is a fork of the one before, `back` tokens from its end, with some tokens of its own.
        """
        seq = self.seq(number)
        for n in back:
            length = len(self.shadow.seqs[seq])
            if self.tree.stale(seq) or length + 20 > MAX_TOKENS:
                return
            at = max(1, length - n)
            child = self.tree.fork(seq, at)
            self.shadow.fork(child, seq, at)
            self.tree.extend(child, range(20))
            self.shadow.extend(child, range(20))
            seq = child

    @some
    @rule(number=NUMBER, tokens=TOKENS)
    def extend(self, number, tokens):
        seq = self.seq(number)
        if len(self.shadow.seqs[seq]) + len(tokens) <= MAX_TOKENS:
            self.tree.extend(seq, tokens)
            self.shadow.extend(seq, tokens)

    @some
    @rule(number=NUMBER, length=NUMBER)
    def truncate(self, number, length):
        seq = self.seq(number)
        length = 1 + length % len(self.shadow.seqs[seq])
        self.tree.truncate(seq, length)
        self.shadow.truncate(seq, length)

    @some
    @rule(number=NUMBER, length=NUMBER)
    def truncate_under_children(self, number, length):
        """To a length within what others inherit of the sequence's own."""
        parents = {
            seq: [o for o in origins[self.shadow.base[seq] :] if o in self.shadow.others(seq)]
            for seq, origins in self.shadow.seqs.items()
        }
        parents = {seq: inherited for seq, inherited in parents.items() if inherited}
        if parents:
            seq = list(parents)[number % len(parents)]
            length = self.shadow.base[seq] + 1 + length % len(parents[seq])
            self.tree.truncate(seq, length)
            self.shadow.truncate(seq, length)

    @some
    @rule(number=NUMBER)
    def release(self, number):
        seq = self.seq(number)
        self.tree.release(seq)
        self.shadow.release(seq)
        self.released.append(seq)

    @some
    @rule(number=NUMBER)
    def evict(self, number):
        seq, used = self.seq(number), self.tree.used
        freed = self.tree.evict(seq)
        self.shadow.evict(seq)
        assert self.tree.used == (used if self.open else used - freed)

    @some
    @rule(number=NUMBER, others=st.lists(NUMBER, max_size=3))
    def evict_path(self, number, others):
        seq, going_on = self.seq(number), [self.seq(n) for n in others]
        keep: dict[int, int] = {}
        for other in going_on:
            for node, count in self.tree.path(other):
                keep[node] = max(keep.get(node, 0), count)
        self.tree.evict(seq, keep)
        self.shadow.evict_path(seq, going_on)

    @precondition(lambda self: self.shadow.covered)
    @rule(now=st.sampled_from([False, False, True]))
    def new_version(self, now):
        if not now:
            return
        self.version += 1
        self.tree.new_version(self.version)
        self.shadow.new_version()
        assert self.tree.tokens_held == 0

    # -- forward passes ----------------------------------------------------------------------------

    def opened(self, layout):
        """Note what the rows stand for; ids and positions tell whether that is right."""
        seq_of = {node: seq for seq in self.shadow.seqs for node, _ in self.tree.path(seq)}
        positions = layout.positions.tolist()
        self.rows, self.paths = [0] * len(positions), [[]] * len(positions)
        for node, (row, _, count) in layout.rows_of.items():
            # of the sequences with this node on their path one has all its rows
            holders = [s for s in self.shadow.seqs if node in dict(self.tree.path(s))]
            longest = max(holders, key=lambda s: dict(self.tree.path(s))[node])
            origins = self.shadow.seqs[longest]
            for i in range(row, row + count):
                self.rows[i] = origins[positions[i]]
                self.paths[i] = origins[: positions[i] + 1]
        assert set(layout.rows_of) <= set(seq_of)
        assert [self.shadow.token[o] for o in self.rows] == layout.ids.tolist()
        assert layout.decode_rows + layout.prefill_rows == len(self.rows)
        written = [slot for slot in layout.slots.tolist() if slot >= 0]
        assert len(set(written)) == len(written)
        self.shadow.planned = set(self.rows) - self.shadow.covered
        assert len(written) == len(self.shadow.planned)
        self.open, self.used_when_opened = layout, self.tree.used
        self.version_when_opened = self.version

    @some
    @closed
    @rule(numbers=st.lists(NUMBER, max_size=6), budget=st.sampled_from([0, 1, 7, 16, 33, 1000]))
    def plan(self, numbers, budget):
        live = {self.seq(n): None for n in numbers}
        seqs = [s for s in live if not self.tree.stale(s)]
        for seq in set(live) - set(seqs):
            with pytest.raises(StaleWeightsError, match="score"):
                self.tree.plan([seq], budget)
        self.plan_these(seqs, budget)

    def plan_these(self, seqs, budget):
        before = self.tree.facts(sorted(self.shadow.seqs))
        layout = self.tree.plan(seqs, budget)
        run, sampled = self.shadow.plan(seqs, budget)
        if isinstance(layout, int):
            assert self.limit is not None and 0 < layout <= len(run)
            assert self.tree.facts(sorted(self.shadow.seqs)) == before
            return
        self.opened(layout)
        assert sorted(run) == sorted(self.rows)
        assert sorted(sampled) == sorted(layout.seqs)
        for row, seq in zip(layout.out_rows.tolist(), layout.seqs):
            assert self.rows[row] == self.shadow.seqs[seq][-1]

    @some
    @closed
    @rule(steps=st.integers(1, 20))
    def decode(self, steps):
        """All sequences that may, a token each per step."""
        seqs = [s for s in self.shadow.seqs if not self.tree.stale(s)]
        for _ in range(steps):
            self.plan_these(seqs, 1000)
            if self.open is None:
                return
            sampled = self.open.seqs
            self.commit()
            for seq in sampled:
                if len(self.shadow.seqs[seq]) < MAX_TOKENS:
                    self.tree.extend(seq, [seq])
                    self.shadow.extend(seq, [seq])

    @some
    @closed
    @rule(numbers=st.lists(NUMBER, min_size=1, max_size=3))
    def score(self, numbers):
        """All positions but the last of each, whether they have KV or not.

        Stale ones get theirs anew.
        """
        want: dict[int, int] = {}
        seqs = {self.seq(n) for n in numbers}
        for seq in seqs:
            *above, (leaf, own) = self.tree.path(seq)
            for node, count in (*above, (leaf, own - 1)):
                want[node] = max(want.get(node, 0), count)
        layout = self.tree.layout([(node, 0, n) for node, n in sorted(want.items()) if n])
        if isinstance(layout, int):
            assert self.limit is not None
            return
        self.opened(layout)
        assert layout.seqs == [] and layout.decode_rows == 0
        self.commit()
        assert not any(self.tree.stale(s) for s in seqs)
        assert all(self.tree.kv(s) >= len(self.shadow.seqs[s]) - 1 for s in seqs)

    @some
    @closed
    @rule(number=NUMBER, end=NUMBER)
    def score_the_beginning(self, number, end):
        """Positions before `end` of a sequence; what stands on later ones stays as stale."""
        seq = self.seq(number)
        end, ranges = 1 + end % len(self.shadow.seqs[seq]), []
        for node, count in self.tree.path(seq):
            ranges.append((node, 0, min(count, end)))
            end -= ranges[-1][2]
            if not end:
                break
        layout = self.tree.layout(ranges)
        if not isinstance(layout, int):
            self.opened(layout)
            self.commit()

    @is_open
    @rule()
    def commit(self):
        layout, memory = self.open, self.shadow.memory
        for slot, origin in zip(layout.slots.tolist(), self.rows):
            if slot >= 0:
                memory[slot] = origin, self.version_when_opened
        for path, slots in zip(self.paths, rows_read(layout)):
            found = [memory[slot] for slot in slots]
            assert found == [(origin, self.version_when_opened) for origin in path]
        self.close("commit")
        self.shadow.commit()

    @is_open
    @rule()
    def abort(self):
        self.close("abort")
        self.shadow.planned = set()

    def close(self, how):
        assert self.tree.used == self.used_when_opened  # frees were deferred, nothing was taken
        for tree in self.tree.trees:
            with pytest.raises(EngineError, match=f"{how}: this layout is not open"):
                getattr(tree, how)(None)
        self.tree.close(how)
        self.open = None

    # -- wrong calls -------------------------------------------------------------------------------

    @rule(number=NUMBER, name=st.sampled_from(["release", "tokens", "evict", "kv", "path"]))
    def use_a_released_handle(self, number, name):
        seq = self.released[number % len(self.released)] if self.released else 10**6
        with pytest.raises(EngineError, match="was released|is unknown"):
            getattr(self.tree, name)(seq)

    @some
    @rule(number=NUMBER, beyond=st.sampled_from([-3, 0, 1, 50]))
    def fork_or_truncate_outside(self, number, beyond):
        seq = self.seq(number)
        at = beyond if beyond < 1 else len(self.shadow.seqs[seq]) + beyond
        for name in ("fork", "truncate"):
            with pytest.raises(EngineError, match="must be in 1 …"):
                getattr(self.tree, name)(seq, at)

    @is_open
    @rule()
    def plan_twice(self):
        for call in (lambda: self.tree.plan([], 1), lambda: self.tree.layout([])):
            with pytest.raises(EngineError, match="commit or abort it first"):
                call()

    # -- what always holds -------------------------------------------------------------------------

    @invariant()
    def all_is_as_the_shadow_says(self):
        if not hasattr(self, "tree"):
            return
        tree, shadow = self.tree, self.shadow
        tree.facts(sorted(shadow.seqs))
        for seq in shadow.seqs:
            assert tree.tokens(seq) == shadow.tokens(seq)
            assert tree.base(seq) == shadow.base[seq]
            assert tree.kv(seq) == shadow.kv(seq)
            assert tree.stale(seq) == shadow.stale(shadow.seqs[seq])
        assert tree.tokens_held == len(shadow.covered)
        assert tree.live_sequences == len(shadow.seqs)
        assert tree.used + tree.free == tree.capacity
        if shadow.seqs:
            ends = [len(origins) + 20 for origins in shadow.seqs.values()]
            assert tree.need(list(shadow.seqs), ends) > 0
        tree.check()

    def teardown(self):
        if not hasattr(self, "tree"):
            return
        if self.open is not None:
            self.tree.close("abort")
        for seq in self.shadow.seqs:
            self.tree.release(seq)
        assert (
            self.tree.used == self.tree.live_nodes == self.tree.tokens_held == self.tree.span == 0
        )
        self.tree.check()
