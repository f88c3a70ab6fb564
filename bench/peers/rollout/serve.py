"""The far end of the pipe: a peer loads once, then answers one JSON line per request line.

    python peer_NAME.py '{"model": "folder", "threads": 1, …}'

Requests: {"do": "tree", "work": {…}}, {"do": "trunk", "depth": n, "vocab": v} and then {"do":
"forks", "repeats": k}; peer_ours also answers {"do": "hold", "work": {…}}, peer_quickstart only
{"do": "phases", "step": k}. Every answer carries "error" (null or a traceback). The end of the
input ends the peer.
"""

from __future__ import annotations

import gc
import json
import os
import re
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

sys.path.append(str(Path(__file__).resolve().parents[3]))  # the checkout, for `bench`

from bench.peers.rollout.grow import Backend, Drawn, Fork, Trunk, grow
from bench.peers.rollout.workload import Workload


class Peer(Protocol):
    """What is worked out for each drawn token (`computes`), and the engine's version."""

    computes: str
    version: str
    rows: int

    def grow(self, work: Workload) -> list[Drawn]: ...

    def trunk(self, ids: Sequence[int]) -> float:
        """Compute a sequence for `fork` to fork at its end, in place of the one before.

        → milliseconds.
        """

    def fork(self) -> Fork: ...


class Stepwise:
    """A peer made of a `Backend`."""

    def __init__(self, backend: Backend, computes: str, version: str):
        self.backend, self.computes, self.version = backend, computes, version
        self._trunk: Trunk | None = None

    @property
    def rows(self) -> int:
        return self.backend.rows

    def grow(self, work: Workload) -> list[Drawn]:
        return grow(self.backend, work)

    def trunk(self, ids: Sequence[int]) -> float:
        if self._trunk is not None:
            self._trunk.release()
        self._trunk = Trunk(self.backend, ids)
        return self._trunk.prefill_ms

    def fork(self) -> Fork:
        assert self._trunk is not None
        return self._trunk.fork()


def serve(make: Callable[[dict[str, Any]], Peer]) -> None:
    """Load with `make(settings)`, then answer until the input ends."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints must not land between the answers
    begin = time.perf_counter()
    peer: Peer | None = None

    def load() -> dict[str, Any]:
        nonlocal peer
        peer = make(json.loads(sys.argv[1]))
        return {
            "computes": peer.computes,
            "version": peer.version,
            "load_seconds": time.perf_counter() - begin,
        }

    _reply(replies, load)
    for line in sys.stdin:
        request = json.loads(line)
        assert peer is not None  # the parent sends nothing to a peer that failed to load
        _reply(replies, lambda: ANSWERS[request.pop("do")](peer, **request))  # noqa: B023
    os._exit(0)  # some engines leave threads behind that would keep the process alive


def _reply(replies: Any, answer: Callable[[], dict[str, Any]]) -> None:
    try:
        out = answer() | {"error": None}
    except Exception:
        # Whatever a foreign engine raises is a result of the benchmark; the parent writes it down.
        out = {"error": traceback.format_exc()}
    replies.write(json.dumps(out) + "\n")
    replies.flush()


def _tree(peer: Peer, work: dict[str, Any]) -> dict[str, Any]:
    workload = Workload(**work)
    gc.collect()
    rows, wall, cpu = peer.rows, time.perf_counter(), time.process_time()
    drawn = peer.grow(workload)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    for index, (line, got) in enumerate(zip(workload.rollouts(), drawn, strict=True)):
        if len(got.tokens) != line.new:
            raise RuntimeError(
                f"rollout {index} drew {len(got.tokens)} tokens instead of {line.new}"
            )
    return {
        "wall": wall,
        "cpu": cpu,
        "rows": peer.rows - rows,
        "peak_bytes": _peak_bytes(),
        # One rollout without a tool call, for a check of its log-probs against another
        # implementation.
        "sample": vars(drawn[1]) if len(drawn) > 1 else None,
    }


def _peak_bytes() -> int:
    """The most physical memory that this process has held.

    0 where the kernel does not tell (not Linux).

    Not ru_maxrss, which starts at what the parent held.
    """
    status = Path("/proc/self/status")
    found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text()) if status.exists() else None
    return int(found[1]) * 1024 if found else 0


def _trunk(peer: Peer, depth: int, vocab: int) -> dict[str, Any]:
    work = Workload(prompt=depth, vocab=vocab, round=depth)
    return {"prefill_ms": peer.trunk(work.prompt_ids())}


def _forks(peer: Peer, repeats: int) -> dict[str, Any]:
    return {"forks": [peer.fork()._asdict() for _ in range(repeats)]}


def _hold(peer: Any, work: dict[str, Any]) -> dict[str, Any]:
    return peer.hold(Workload(**work))


def _phases(peer: Any, step: int) -> dict[str, Any]:
    return peer.phases(step)


ANSWERS: dict[str, Callable[..., dict[str, Any]]] = {
    "tree": _tree,
    "trunk": _trunk,
    "forks": _forks,
    "hold": _hold,
    "phases": _phases,
}
