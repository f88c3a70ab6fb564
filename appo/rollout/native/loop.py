"""The one loop of the engine: plan → forward → sample → commit.

The tree changes only in commit, so whatever goes wrong before it leaves every sequence as it was.
What goes wrong in commit can only be a stop callback: by then all tokens are drawn, and all of them
are kept.

An event belongs to its sequence until `step` has returned it. If a callback of the same step
raises, it waits for the next step; a cancel or release of its sequence meanwhile takes it back.
"""

from __future__ import annotations

from appo.errors import EngineError
from appo.rollout.engine import SequenceStopped
from appo.rollout.native.counters import Counters
from appo.rollout.native.events import EventLog
from appo.rollout.native.requests import Request, SequenceState
from appo.rollout.native.runner import Runner
from appo.rollout.native.sampling.sampler import Results, TokenSampler
from appo.rollout.native.scheduler import Scheduler
from appo.rollout.native.tree.layout import Layout
from appo.rollout.submission import Reason


class Loop:
    """Steps over the submissions of a scheduler."""

    def __init__(
        self, scheduler: Scheduler, sampler: TokenSampler, log: EventLog, counters: Counters
    ):
        self.scheduler, self.tree, self.sampler = scheduler, scheduler.tree, sampler
        self.log, self.counters = log, counters
        self._requests: list[Request] = []  # whose rows the sampler is set up for
        self._late: list[SequenceStopped] = []  # events that an exception kept from being returned

    @property
    def decoding(self) -> int:
        """Sequences whose SequenceStopped event was not returned yet."""
        return len(self.scheduler.by_seq) + len(self._late)

    def has_work(self) -> bool:
        """Whether a submitted sequence has still to stop."""
        return self.decoding > 0

    def step(self, runner: Runner, version: int) -> list[SequenceStopped]:
        """One forward; → what stopped in it, and what stopped in one that raised."""
        if self.scheduler.by_seq:
            try:
                layout = self.scheduler.plan()
                requests, sampled = self._run(layout, runner)
                self.tree.commit(layout)
            except BaseException:
                if self.tree.open is not None:  # neither before a plan nor after commit
                    self.tree.abort(self.tree.open)
                raise
            self.counters.forward(len(layout.ids), requests)
            self.log.step += 1
            self._commit(requests, sampled, version)
        events, self._late = self._late, []
        return events

    def is_late(self, seq: int) -> bool:
        """It has stopped, but nobody was told yet."""
        return any(event.seq == seq for event in self._late)

    def take_back(self, seq: int) -> int:
        """Drop the event of a sequence that was not returned yet.

        → how many tokens it was about.
        """
        dropped = [event for event in self._late if event.seq == seq]
        self._late = [event for event in self._late if event.seq != seq]
        return sum(len(event.token_ids) for event in dropped)

    def _run(self, layout: Layout, runner: Runner) -> tuple[list[Request], Results]:
        """Forward and sample; → whose rows were sampled, and what."""
        requests = [self.scheduler.by_seq[seq] for seq in layout.seqs]
        runner.pool.ensure(self.tree.span)
        hidden = runner.forward(layout, layout.out_rows)
        if not requests:
            return requests, ([], [], [])
        if requests != self._requests:
            self.sampler.rows([request.params for request in requests], layout.seqs)
            self._requests = requests
        seeds = [request.seed for request in requests]
        positions = [request.length for request in requests]
        return requests, self.sampler.sample(hidden, seeds, positions)

    def _commit(self, requests: list[Request], sampled: Results, version: int) -> None:
        """Every token into its sequence; what stops goes to `_late`.

        The first callback that raised is reported after.
        """
        failed: tuple[int, BaseException] | None = None
        for request, token, logprob, entropy in zip(requests, *sampled):
            if self.scheduler.by_seq.get(request.seq) is not request:
                continue  # a callback of this step cancelled it
            request.take(token, logprob, entropy)
            self.tree.extend(request.seq, [token])
            try:
                reason = request.reason_to_stop(token)
            except BaseException as e:  # raised again below
                failed, reason = failed or (request.seq, e), request.at_end(token)
            if reason is not None and self.scheduler.by_seq.get(request.seq) is request:
                self._stop(request, reason, version)
        if failed is None:
            return
        seq, error = failed
        if not isinstance(error, Exception):
            raise error
        raise EngineError(
            f"the stop callback of sequence {seq} raised {error!r}; the token it saw was kept. Go on with step(), or cancel "
            "the sequence"
        ) from error

    def _stop(self, request: Request, reason: Reason, version: int) -> None:
        state = SequenceState.TOOL_WAIT if reason == "stop" else SequenceState.FORK_READY
        self.scheduler.remove(request, state)
        self.log.write("stop", request.seq, reason=reason, ids=request.tokens)
        self._late.append(
            SequenceStopped(
                request.seq, request.tokens, request.logprobs, request.entropy, reason, version
            )
        )
