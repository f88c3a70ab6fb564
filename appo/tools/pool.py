"""Tool calls run here while the engine decodes other nodes.

Threads, a deadline per call, and results by key.

Threads, since tools wait (for a child process, for a network). A thread cannot be killed: when a
call passes its deadline the pool reports a timeout, leaves the thread to itself and starts another,
so a tool that never returns costs a thread and not the run. All threads are daemons: none keeps the
interpreter from ending.
"""

from __future__ import annotations

import threading
import time
import warnings
from collections import Counter, deque
from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace
from typing import Any

from appo.errors import ConfigError, ToolError
from appo.tools.base import Tool, ToolResult
from appo.tools.escape import escape_tags, shorten

Key = Any  # hashable; sortable for wait_all
ERROR_CHARS = 512  # of what the model reads of an exception


@dataclass(eq=False)
class _Call:
    key: Hashable
    tool: str
    argument: str
    submitted: float
    started: float | None = None
    thread: threading.Thread | None = None
    settled: bool = False  # delivered, timed out or cancelled: a later result is dropped


class ToolPool:
    """Runs calls of `tools` on `workers` threads.

    Each call may take `timeout_s` seconds from when it starts.

    Results come from `poll`, `wait` or `wait_all`, each exactly once. To be used from one thread.

    >>> pool = ToolPool({"python": PythonTool()}, workers=4, timeout_s=10.0)
    >>> pool.submit((0, 1), "python", "print(6*7)")
    >>> pool.wait_all()
    [((0, 1), ToolResult(output='42', ok=True, …))]
    """

    def __init__(self, tools: dict[str, Tool], workers: int, timeout_s: float) -> None:
        if workers < 1:
            raise ConfigError(f"tools.workers = {workers}: must be 1 or more")
        if not timeout_s > 0:
            raise ConfigError(f"tools.timeout_s = {timeout_s}: must be greater than 0")
        self.tools, self.workers, self.timeout_s = tools, workers, timeout_s
        self._changed = threading.Condition()
        self._queue: deque[_Call] = deque()
        self._open: dict[
            Hashable, _Call
        ] = {}  # submitted, not yet finished, timed out or cancelled
        self._done: list[tuple[Key, ToolResult]] = []
        self._threads: set[threading.Thread] = set()
        self._closed = False
        self._calls = 0
        self._failures: Counter[str] = Counter()
        self._queued_s = self._run_s = self._waited_s = 0.0

    def submit(self, key: Key, tool: str, argument: str) -> None:
        """Queue a call.

        Raises ToolError("bad_request") on a closed pool or a key that is still out.
        """
        with self._changed:
            if self._closed:
                raise ToolError("the tool pool is closed", "bad_request")
            if key in self._open or any(k == key for k, _ in self._done):
                raise ToolError(f"key {key!r} is still in use by another call", "bad_request")
            self._calls += 1
            call = _Call(key, tool, argument, time.monotonic())
            if tool not in self.tools:
                known = ", ".join(self.tools) or "none"
                self._finish(
                    call,
                    ToolResult(
                        f"no tool named {tool!r}; there is: {known}", False, 0.0, "bad_request"
                    ),
                )
                return
            self._open[key] = call
            self._queue.append(call)
            self._fill_threads()
            self._changed.notify_all()

    def poll(self) -> list[tuple[Key, ToolResult]]:
        """What has finished since the last time, in order of completion. Does not wait."""
        with self._changed:
            self._expire()
            return self._take()

    def wait(self, timeout: float | None = None) -> list[tuple[Key, ToolResult]]:
        """Like `poll`, but waits up to `timeout` seconds for a first result.

        At once if no call is out.
        """
        until = float("inf") if timeout is None else time.monotonic() + timeout
        return self._wait(until, lambda: bool(self._done) or not self._open)

    def wait_all(self) -> list[tuple[Key, ToolResult]]:
        """All results that are still out, sorted by key: the same order whatever finished first."""
        return sorted(self._wait(float("inf"), lambda: not self._open), key=lambda item: item[0])

    def cancel(self, key: Key) -> None:
        """Forget a call: a result of `key`, finished or not, is not delivered.

        Unknown keys are ignored.
        """
        with self._changed:
            self._done = [(k, r) for k, r in self._done if k != key]
            call = self._open.pop(key, None)
            if call is None:
                return
            call.settled = True
            if call.started is None:
                self._queue.remove(call)
            else:
                self._give_up(call)
            self._changed.notify_all()

    def stats(self) -> dict[str, float]:
        """Counts and seconds so far.

        Calls, failed_<kind>, queued_s, run_s (finished calls), waited_s (of the caller).
        """
        with self._changed:
            out = {f"failed_{kind}": float(n) for kind, n in sorted(self._failures.items())}
            times = {"queued_s": self._queued_s, "run_s": self._run_s, "waited_s": self._waited_s}
            return {"calls": float(self._calls), "failures": sum(out.values()), **out, **times}

    def describe(self) -> str:
        """Calls that are out, one per line.

        Takes no lock: a watchdog asks while everything else stands still.
        """
        now = time.monotonic()
        return "\n".join(
            f"{c.tool} {c.key}: "
            + (f"queued for {now - c.submitted:.0f} s" if c.started is None else
               f"running for {now - c.started:.0f} s of {self.timeout_s:g} s")
            for c in list(self._open.values())
        )  # fmt: skip

    def close(self) -> None:
        """Drop what is queued and let idle threads end.

        Does not wait for calls that run. Closes the tools.
        """
        with self._changed:
            if self._closed:
                return
            self._closed = True
            self._queue.clear()
            for call in self._open.values():
                call.settled = True
            self._open.clear()
            self._changed.notify_all()
        for name, tool in self.tools.items():
            try:
                tool.close()
            except Exception as error:  # a tool of the user: what was trained is not lost with it
                warnings.warn(
                    f"tool {name!r} could not be closed: {type(error).__name__}: {error}",
                    stacklevel=2,
                )

    def __enter__(self) -> ToolPool:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # Below, `_changed` is held, but for `_wait` and `_work`.

    def _wait(self, until: float, enough: Callable[[], bool]) -> list[tuple[Key, ToolResult]]:
        entered = time.monotonic()
        with self._changed:
            while True:
                self._expire()
                now = time.monotonic()
                if enough() or now >= until:
                    self._waited_s += now - entered
                    return self._take()
                wake = min(until, self._next_deadline())
                self._changed.wait(None if wake == float("inf") else max(0.0, wake - now))

    def _take(self) -> list[tuple[Key, ToolResult]]:
        done, self._done = self._done, []
        return done

    def _next_deadline(self) -> float:
        starts = [c.started for c in self._open.values() if c.started is not None]
        return min(starts, default=float("inf")) + self.timeout_s

    def _expire(self) -> None:
        """Report a timeout for each call past its deadline."""
        now = time.monotonic()
        for call in list(self._open.values()):
            if call.started is not None and now >= call.started + self.timeout_s:
                text = f"the {call.tool} tool did not answer within {self.timeout_s:g} s"
                self._finish(call, ToolResult(text, False, now - call.started, "timeout"))
                self._give_up(call)

    def _finish(self, call: _Call, result: ToolResult) -> None:
        if call.settled:
            return
        call.settled = True
        self._open.pop(call.key, None)
        self._done.append((call.key, result))
        self._run_s += result.wall_s
        if result.error_kind is not None:
            self._failures[result.error_kind] += 1
        self._changed.notify_all()

    def _fill_threads(self) -> None:
        """As many threads as there is work for, within `workers`."""
        while len(self._threads) < min(self.workers, len(self._open)):
            thread = threading.Thread(target=self._work, name="appo-tool", daemon=True)
            self._threads.add(thread)
            thread.start()

    def _give_up(self, call: _Call) -> None:
        """Leave the thread of a call to itself (it ends when its tool returns) and fill its place."""
        if call.thread is not None:
            self._threads.discard(call.thread)
        self._fill_threads()

    def _work(self) -> None:
        me = threading.current_thread()
        while True:
            with self._changed:
                self._changed.wait_for(
                    lambda: self._queue or self._closed or me not in self._threads
                )
                if self._closed or me not in self._threads:
                    return
                call = self._queue.popleft()
                call.started, call.thread = time.monotonic(), me
                self._queued_s += call.started - call.submitted
                self._changed.notify_all()  # a waiting caller has a new deadline to look at
            result = _guarded(self.tools[call.tool], call.argument, tuple(self.tools))
            with self._changed:
                self._finish(call, result)


def _guarded(tool: Tool, argument: str, tags: tuple[str, ...]) -> ToolResult:
    """The result of one call, with the tags of all tools escaped.

    A tool that raises has failed with kind "crash", or with the kind of its ToolError.
    """
    started = time.monotonic()
    try:
        result = tool(argument)
        return replace(result, output=escape_tags(result.output, tags))
    except (
        Exception,
        SystemExit,
    ) as error:  # a tool of the user may raise anything: one call fails
        kind = error.kind if isinstance(error, ToolError) else "crash"
        text = f"the {tool.name} tool failed: {type(error).__name__}: {error}"
        text, cut = shorten(escape_tags(text, tags), ERROR_CHARS)
        return ToolResult(text, False, time.monotonic() - started, kind, cut)
