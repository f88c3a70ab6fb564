"""Doing again what an engine was asked, from its event log (events.py).

engine = NativeEngine(folder, deterministic=True, record="events.jsonl")
...
stopped = replay(other_engine, read_events("events.jsonl"))  # same tokens at any batch size
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from appo.errors import EngineError
from appo.rollout.engine import SamplingParams, SequenceStopped
from appo.rollout.native.engine import NativeEngine
from appo.rollout.native.events import Event

_RECORD = "record to a file from the start, record=FILE"


def read_events(path: Path | str) -> Iterator[Event]:
    """The events of a recorded file, in order."""
    with Path(path).open() as f:
        for line in f:
            facts = json.loads(line)
            yield Event(facts.pop("step"), facts.pop("kind"), facts.pop("seq"), facts)


def replay(
    engine: NativeEngine,
    events: Iterable[Event],
    weights: Callable[[int], Iterable[tuple[str, object]]] | None = None,
) -> dict[int, list[SequenceStopped]]:
    """Ask a fresh engine the same things in the same order.

    Returns what stopped, under the handles of the recording.

    In deterministic mode tokens and statistics are those of the recording, bit by bit, even if
    batch size, chunk or pool
    differ: nothing is taken from the recorded steps, only from the order of events.
    weights(version) → named tensors for each recorded update. Raises EngineError where the log
    lacks what it refers to, or has it in an order that cannot be (an incomplete or damaged log).
    """
    return _Replay(engine, list(events), weights).run()


class _Replay:
    """One method per kind of event.

    `stop` is where it waits, so that what follows finds the sequence as it was then.
    """

    def __init__(
        self,
        engine: NativeEngine,
        events: list[Event],
        weights: Callable[[int], Iterable[tuple[str, object]]] | None,
    ):
        self.engine, self.events, self.weights = engine, events, weights
        self.here: dict[int, int] = {}  # handle in the recording → handle here
        self.there: dict[int, int] = {}
        self.begun: dict[int, int] = {}  # submitted and not stopped: handle → length at submit
        self.cut: set[int] = set()  # of these, what did not stop by itself in the recording
        self.stopped: dict[int, list[SequenceStopped]] = {}

    def run(self) -> dict[int, list[SequenceStopped]]:
        for at, event in enumerate(self.events):
            act = getattr(self, f"_{event.kind}", None)
            if act is not None:
                act(event.seq, event.facts, at)
        return self.stopped

    def _step(self) -> None:
        for event in self.engine.step():
            if event.seq not in self.cut:  # here it may come to its end before it is cancelled
                del self.begun[event.seq]
                self.stopped.setdefault(self.there[event.seq], []).append(event)

    def _name(self, seq: int, handle: int) -> None:
        self.here[seq], self.there[handle] = handle, seq

    def _handle(self, seq: int) -> int:
        if seq not in self.here:
            raise EngineError(
                f"replay: sequence {seq} is used but not introduced, so the log is not complete; {_RECORD}"
            )
        return self.here[seq]

    def _prompt(self, seq: int, facts: dict[str, Any], at: int) -> None:
        self._name(seq, self.engine.add_prompt(_ids(facts)))

    def _fork(self, seq: int, facts: dict[str, Any], at: int) -> None:
        parent = self._handle(facts["parent"])
        while self.engine.length(parent) < facts["at"] and self.engine.has_work():
            self._step()
        self._name(seq, self.engine.fork(parent, facts["at"]))

    def _append(self, seq: int, facts: dict[str, Any], at: int) -> None:
        self.engine.append(self._handle(seq), _ids(facts))

    def _submit(self, seq: int, facts: dict[str, Any], at: int) -> None:
        handle = self._handle(seq)
        params = {**facts, "stop_token_ids": frozenset(facts["stop_token_ids"])}
        seed = params.pop("seed")
        end = self._end(seq, at)
        if end is None or end.kind != "stop":
            self.cut.add(handle)
        elif end.facts["reason"] == "stop":
            params["stop"] = _after(len(_ids(end.facts)))
        self.begun[handle] = self.engine.length(handle)
        self.engine.submit(handle, SamplingParams(**params), seed)

    def _end(self, seq: int, at: int) -> Event | None:
        """How the submission at index `at` ended."""
        kinds = ("stop", "cancel", "release")
        later = self.events[at + 1 :]
        return next((e for e in later if e.seq == seq and e.kind in kinds), None)

    def _stop(self, seq: int, facts: dict[str, Any], at: int) -> None:
        while self._handle(seq) in self.begun:
            if not self.engine.has_work():
                raise EngineError(
                    f"replay: sequence {seq} stops in the log and goes on here, where nothing is left to do; the log is "
                    f"damaged; {_RECORD}"
                )
            self._step()

    def _cancel(self, seq: int, facts: dict[str, Any], at: int) -> None:
        handle = self._handle(seq)
        self.engine.cancel(handle)
        if handle in self.begun:
            length = self.begun.pop(handle)
        else:  # it had stopped, and was cancelled before anybody was told
            length = self.engine.length(handle) - facts["sampled"]
            self.stopped[seq].pop()
        self.engine.rewind(handle, length)
        self.cut.discard(handle)

    def _rewind(self, seq: int, facts: dict[str, Any], at: int) -> None:
        self.engine.rewind(self._handle(seq), facts["length"])

    def _release(self, seq: int, facts: dict[str, Any], at: int) -> None:
        handle = self._handle(seq)
        self.engine.release(handle)
        self.begun.pop(handle, None)

    def _score(self, seq: int, facts: dict[str, Any], at: int) -> None:
        self.engine.score([self._handle(s) for s in facts["seqs"]], facts["temperature"])

    def _version(self, seq: int, facts: dict[str, Any], at: int) -> None:
        if self.weights is None:
            raise EngineError(
                f"replay: the log loads weights of version {facts['version']}; pass weights=, which returns them"
            )
        self.engine.load_weights(self.weights(facts["version"]), facts["version"])


def _ids(facts: dict[str, Any]) -> list[int]:
    if "ids" not in facts:
        raise EngineError(f"replay: the log has no token ids, so it is not complete; {_RECORD}")
    ids: list[int] = facts["ids"]
    return ids


def _after(count: int) -> Callable[[int], bool]:
    """A stop callback that says yes to the count-th token."""
    seen = iter(range(1, count + 1))
    return lambda token: next(seen) == count
