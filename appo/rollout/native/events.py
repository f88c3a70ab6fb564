"""What an engine was asked and what it decided, in order.

For reading after the fact, and for replay.py.

Kinds and their facts:
    prompt   ids                          append   ids
    fork     parent, at                   submit   seed and the sampling parameters
    cancel   sampled (tokens dropped)     rewind   length
    release
    score    seqs, temperature            version  version
    admit                                 preempt  sampled (tokens kept)
    evict    tokens (KV given up)         stop     reason, ids
The last two rows are the engine's decisions, and `stop` its answer; `replay` makes its own. Without
a file nothing keeps the token ids: `ids` is then `count`, how many there are.
"""

from __future__ import annotations

import json
from collections import deque
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from appo.errors import EngineError
from appo.rollout.engine import SamplingParams

KEPT = 1024  # events in memory


@dataclass(frozen=True, slots=True)
class Event:
    """`step`: how many forwards had been run when it happened.

    `seq` is -1 where no single sequence is meant.
    """

    step: int
    kind: str
    seq: int
    facts: dict[str, Any] = field(default_factory=dict)


class EventLog:
    """The last events in `events`.

    All of them in the file `path` if one is given (JSON lines, an existing one is replaced).
    """

    def __init__(self, path: Path | str | None = None, kept: int = KEPT):
        self.events: deque[Event] = deque(maxlen=kept)
        self.path = None if path is None else Path(path)
        self.step = 0
        if self.path is not None:
            try:
                self.path.write_text("")
            except OSError as e:
                raise EngineError(
                    f"record={str(path)!r}: cannot be written ({e.strerror or e}); name a file in an existing folder"
                ) from e

    def write(self, kind: str, seq: int = -1, **facts: Any) -> None:
        """Note an event of the step under way; ids are kept in full only in the file."""
        if "ids" in facts:
            ids = facts.pop("ids")  # of the caller, who may go on with the list
            facts |= {"count": len(ids)} if self.path is None else {"ids": [*ids]}
        self.events.append(Event(self.step, kind, seq, facts))
        if self.path is not None:
            line = {"step": self.step, "kind": kind, "seq": seq} | facts
            with self.path.open("a") as f:
                f.write(json.dumps(line, default=lambda number: number.item()) + "\n")  # NumPy

    def submit(self, seq: int, params: SamplingParams, seed: int) -> None:
        """A submission; its stop callback is not kept, as `stop` says when it said yes."""
        facts = {f.name: getattr(params, f.name) for f in fields(params) if f.name != "stop"}
        facts["stop_token_ids"] = sorted(params.stop_token_ids)
        self.write("submit", seq, seed=seed, **facts)
