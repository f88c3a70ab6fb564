"""Which submitted sequences run next, and what gives way when the pool is full.

    WAITING → PREFILL → DECODE → TOOL_WAIT | FORK_READY | CANCELLED → (submit) WAITING … → (release) DONE

Continuous batching: every decoding sequence gets its token in every step; on top of them at most
`prefill_chunk` rows of prefill are run, oldest submission first. A sequence is admitted when the
pool could hold all that the admitted ones may still grow to, so none of them has to stop for room.
Nobody overtakes: if the oldest does not fit, it waits for a running one to end, and the younger
wait behind it.

Room is made when it is lacking, not when it is promised. KV is dropped in this order: of sequences
that do not decode, least recently used first (their private spans, then what only they stood on);
of sequences that wait; of the youngest running one, which goes back to waiting; for a score, of
what it has done and reads no more. Tokens are never dropped: lost KV is prefilled again when it is
next needed.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterable, Mapping, Sequence

from appo.errors import PoolTooSmallError
from appo.rollout.engine import SamplingParams
from appo.rollout.native.events import EventLog
from appo.rollout.native.requests import Request, SequenceState
from appo.rollout.native.tree.block_list import BLOCK
from appo.rollout.native.tree.layout import Layout
from appo.rollout.native.tree.native_tree import Tree

Path = list[tuple[int, int]]  # (node, how many of its own positions), root first


class Scheduler:
    """Waiting and running requests, and idle sequences.

    Requests stand oldest first, idle sequences least recently used first.
    """

    def __init__(
        self,
        tree: Tree,
        limit: int | None,
        max_batch: int,
        prefill_chunk: int,
        log: EventLog,
    ):
        self.tree, self.limit, self.log = tree, limit, log  # limit: blocks
        self.max_batch, self.prefill_chunk = max_batch, prefill_chunk
        self.waiting: list[Request] = []
        self.active: list[Request] = []
        self.by_seq: dict[int, Request] = {}
        self.idle: dict[int, SequenceState] = {}
        self.preemptions = self.evicted_tokens = 0
        self._submitted = 0
        self._newest = -1  # handle
        self._full = False  # the oldest waiting request does not fit beside the active ones

    # -- sequences come and go ---------------------------------------------------------------------

    def rest(self, seq: int, state: SequenceState = SequenceState.FORK_READY) -> None:
        """The sequence does nothing now; it was used just now."""
        self.idle.pop(seq, None)
        self.idle[seq] = state
        self._newest = max(self._newest, seq)

    def touch(self, seq: int) -> None:
        """An idle sequence was forked or scored: it is now the one used most recently."""
        if seq in self.idle:
            self.rest(seq, self.idle[seq])

    def submit(self, seq: int, params: SamplingParams, seed: int, start: int, end: int) -> Request:
        """Queue a sequence. Raises PoolTooSmallError if the pool could not hold it even alone."""
        request = Request(seq, params, seed, start, end, self._submitted)
        alone = _blocks(self._whole([request]).values())
        if self.limit is not None and alone > self.limit:
            raise PoolTooSmallError(
                f"submit(seq={seq}): to grow to {end} tokens it needs {alone} blocks of KV ({BLOCK} tokens each), the pool "
                f"has {self.limit}; raise kv_tokens to {alone * BLOCK} or lower max_new_tokens={params.max_new_tokens}"
            )
        self._submitted += 1
        self.idle.pop(seq, None)
        self.by_seq[seq] = request
        self.waiting.append(request)
        return request

    def remove(self, request: Request, state: SequenceState) -> None:
        """The request is over."""
        del self.by_seq[request.seq]
        if request in self.active:
            self.active.remove(request)
            self._full = False
        else:
            self._full &= request is not self.waiting[0]
            self.waiting.remove(request)
        self.rest(request.seq, state)

    def forget(self, seq: int) -> None:
        """The handle was given back."""
        self.idle.pop(seq, None)

    def preempt(self, request: Request) -> int:
        """Send a running sequence back to the queue without its private KV.

        Returns the blocks freed.

        What it has sampled stays. Its place in the queue is that of its submission, so before all
        that came later.
        """
        self.active.remove(request)
        insort(self.waiting, request, key=lambda r: r.order)
        self._full = False
        self.preemptions += 1
        self.log.write("preempt", request.seq, sampled=len(request.tokens))
        return self._evict(request.seq, None)

    def state(self, seq: int) -> SequenceState:
        """Where a sequence stands; the tree's EngineError for a handle that never was."""
        request = self.by_seq.get(seq)
        if request is None:
            return self.idle[seq] if seq in self.idle else self._gone(seq)
        if request not in self.active:
            return SequenceState.WAITING
        lacking = request.length - self.tree.kv(seq)
        return SequenceState.PREFILL if lacking > 1 else SequenceState.DECODE

    def _gone(self, seq: int) -> SequenceState:
        """DONE for a released handle; the tree's error for one that never was."""
        if isinstance(seq, int) and 0 <= seq <= self._newest:
            return SequenceState.DONE
        self.tree.length(seq)
        raise AssertionError(f"sequence {seq} is live but neither idle nor submitted")

    # -- one step ----------------------------------------------------------------------------------

    def plan(self) -> Layout:
        """Admit what fits, then lay out one forward. There must be work."""
        self._admit()
        while True:
            seqs = [request.seq for request in self.active]
            layout = self.tree.plan(seqs, self.prefill_chunk)
            if isinstance(layout, Layout):
                return layout
            if self._evict_idle(layout, ()) < layout:
                assert self.active[1:], "submit refuses what does not fit alone"
                self.preempt(self.active[-1])

    def make_room(self, blocks: int, scored: Sequence[int], keep: Mapping[int, int]) -> bool:
        """Drop KV so that a score gets so many more blocks, or send a running sequence back.

        Then ask again.

        scored   the idle sequences it is about: they give way last
        keep     node → own positions that it will still read: these do not give way
        False: there is nothing left to drop.
        """
        freed = self._evict_idle(blocks, scored)
        if freed < blocks and self.active:
            self.preempt(self.active[-1])
            return True
        for seq in scored:
            if freed >= blocks:
                break
            freed += self._evict(seq, keep)
        return freed > 0

    def _admit(self) -> None:
        while self.waiting and len(self.active) < self.max_batch and not self._full:
            request = self.waiting[0]
            if not self._reserve(request):
                assert self.active, "submit refuses what does not fit alone"
                self._full = True
                return
            self.active.append(self.waiting.pop(0))
            self.active.sort(key=lambda r: r.order)
            self.log.write("admit", request.seq)

    def _reserve(self, candidate: Request) -> bool:
        """Whether the pool can hold the active requests and this one at their ends.

        All other KV can give way.
        """
        if self.limit is None:
            return True
        return _blocks(self._whole([*self.active, candidate]).values()) <= self.limit

    def _whole(self, requests: Iterable[Request]) -> dict[int, int]:
        """Node → own positions the requests have on their paths at their ends.

        The last token is not run.
        """
        whole: dict[int, int] = {}
        for request in requests:
            path = self.tree.path(request.seq)
            path[-1] = path[-1][0], request.end - 1 - self.tree.base(request.seq)
            _merge(whole, path)
        return whole

    # -- giving way --------------------------------------------------------------------------------

    def _evict_idle(self, blocks: int, wanted: Sequence[int]) -> int:
        """Drop KV of sequences that neither run nor are wanted; → blocks freed.

        It ends when `blocks` are freed or no such sequence is left.
        """
        keep: dict[int, int] = {}
        for seq in {*wanted, *(request.seq for request in self.active)}:
            _merge(keep, self.tree.path(seq))
        freed = 0
        for seq in [*self.idle, *(request.seq for request in reversed(self.waiting))]:
            if freed >= blocks:
                break
            if seq not in wanted:
                freed += self._evict(seq, keep)
        return freed

    def _evict(self, seq: int, keep: Mapping[int, int] | None) -> int:
        before = self.tree.tokens_held
        freed = self.tree.evict(seq, keep)
        lost = before - self.tree.tokens_held
        if lost:
            self.evicted_tokens += lost
            self.log.write("evict", seq, tokens=lost)
        return freed


def _merge(into: dict[int, int], path: Path) -> None:
    for node, count in path:
        into[node] = max(into.get(node, 0), count)


def _blocks(counts: Iterable[int]) -> int:
    return sum(-(-count // BLOCK) for count in counts)
