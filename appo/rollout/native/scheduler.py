"""What runs in the next forward: continuous batching with chunked prefill over the tree.

Every decoding sequence gets its token in every step; on top of them at most `prefill_chunk` prefill tokens are run, in
order of submission. Missing KV of ancestors is prefilled on demand and once, whoever asks first: a prompt shared by N
forks costs its tokens once, and a finished prefix serves its forks in the same forward.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from appo.errors import EngineError
from appo.rollout.engine import SamplingParams
from appo.rollout.native.batch import Unit
from appo.rollout.native.kv import KVStore
from appo.rollout.native.tree import Node

# One attention call over a small segment costs about as much as this many (row, token) pairs in the padded call
# (measured on one core: 60 us against 0.17 us); below that a segment with few readers is cheaper inside the slot.
CALL_IN_ROW_TOKENS = 350
FEW_READERS = 2


@dataclass
class Run:
    """A submitted sequence and what it has sampled since."""

    seq: int
    node: Node
    params: SamplingParams
    seed: int
    start: int  # length at submit
    end: int  # length at which it must stop
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    entropy: list[float] = field(default_factory=list)


class Scheduler:
    """Waiting and active runs; `plan` turns them into units of work."""

    def __init__(self, store: KVStore, max_batch: int, prefill_chunk: int, kv_tokens: int | None):
        self.store = store
        self.max_batch, self.prefill_chunk, self.kv_tokens = max_batch, prefill_chunk, kv_tokens
        self.waiting: deque[Run] = deque()
        self.active: list[Run] = []
        self.by_seq: dict[int, Run] = {}
        self.changed = True  # the set of active runs differs from the one last planned

    def add(self, run: Run) -> None:
        self.waiting.append(run)
        self.by_seq[run.seq] = run
        if len(self.active) < self.max_batch:
            self.changed = True

    def remove(self, run: Run) -> None:
        del self.by_seq[run.seq]
        run.node.running = False
        if run in self.active:
            self.active.remove(run)
            self.changed = True
        else:
            self.waiting.remove(run)

    def plan(self) -> list[Unit]:
        """Admit what fits, then list the work of one forward (addresses are settled when this returns)."""
        self._admit()
        self.changed = False
        budget = self.prefill_chunk
        units: dict[int, Unit] = {}
        for run in self.active:
            ready = True
            for node, count in reversed(list(run.node.chain())):
                budget = self._extend(units, node, count, budget)
                if _planned(units, node) < count:
                    ready = False
                    break
            if not ready:
                continue
            node, count = run.node, len(run.node.tokens)
            if count - _planned(units, node) == 1 and node.id not in units:
                units[node.id] = Unit(node, node.kv, 1)  # decode: never waits for the budget
            else:
                budget = self._extend(units, node, count, budget)
            if _planned(units, node) == count:
                units[node.id].sampled = True
        for unit in units.values():
            # prompts get their final size at once; a slot grows by doubling
            need = unit.start + unit.count if unit.node.slot >= 0 else len(unit.node.tokens)
            self.store.room(unit.node, need)
        for unit in units.values():
            unit.single = unit.count == 1 and unit.node.slot >= 0
        return list(units.values())

    def _extend(self, units: dict[int, Unit], node: Node, count: int, budget: int) -> int:
        """Plan own positions of `node` up to `count` as far as the budget goes; returns what is left of it."""
        done = _planned(units, node)
        take = min(count - done, budget)
        if take <= 0:
            return budget
        if node.id in units:
            units[node.id].count += take
        else:
            units[node.id] = Unit(node, done, take)
        return budget - take

    def _admit(self) -> None:
        while self.waiting and len(self.active) < self.max_batch:
            run = self.waiting[0]
            need = self._need(run)
            free = None if self.kv_tokens is None else self.kv_tokens - self.store.tokens
            if free is not None and need > free:
                if not self.active:
                    raise EngineError(
                        f"sequence {run.seq} needs {need} tokens of KV but only {free} of kv_tokens={self.kv_tokens} "
                        "are free and nothing is running; release sequences or raise kv_tokens"
                    )
                return
            self.active.append(self.waiting.popleft())
            run.node.running = True
            placed = self.store.to_slot(run.node)
            assert placed, "a slot per running sequence"
        self.store.compact(len(self.active))

    def _need(self, candidate: Run) -> int:
        """KV tokens still to be written by the active runs and this one if each decodes as long as it may."""
        need: dict[int, int] = {}
        for run in (*self.active, candidate):
            need[run.node.id] = max(
                need.get(run.node.id, 0), run.end - 1 - run.node.base - run.node.kv
            )
            for node, count in run.node.chain():
                need[node.id] = max(need.get(node.id, 0), count - node.kv)
        return sum(need.values())

    def localise(self) -> None:
        """Copy short ancestor segments with few readers into the readers' slots where that saves attention calls.

        The padded call grows to the longest slot, so candidates are taken shortest first up to the best total.
        """
        readers: dict[int, int] = {}
        nearest: list[tuple[Run, Node, int]] = []
        for run in self.active:
            first = True
            for node, count in run.node.chain():
                if node.base >= run.node.local:
                    continue
                readers[node.id] = readers.get(node.id, 0) + 1
                if first and node.kv >= count:
                    nearest.append((run, node, count))
                first = False
        few = [c for c in nearest if readers[c[1].id] <= FEW_READERS]
        if len(few) < 4:
            return
        size = {id(run): run.node.off + run.node.kv + count for run, _, count in few}
        few.sort(key=lambda c: size[id(c[0])])
        width = max(run.node.off + run.node.kv for run in self.active)
        gain, best, take = 0.0, 0.0, 0
        for i, (run, node, _) in enumerate(few):
            gain += CALL_IN_ROW_TOKENS / readers[node.id]
            net = gain - len(self.active) * max(0, size[id(run)] - width)
            if net > best:
                best, take = net, i + 1
        for run, node, count in few[:take]:
            self.store.localise(run.node, node, count)


def _planned(units: dict[int, Unit], node: Node) -> int:
    unit = units.get(node.id)
    return node.kv if unit is None else unit.start + unit.count
