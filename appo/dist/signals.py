"""Ctrl-C and SIGTERM: once means finish the step, save and leave; twice means now.

Signals are read by a thread from a wake-up socket and not handled in the main thread: that one may
sit in a collective that waits for a dead rank, where Python runs no handler, and a second signal
must end the process all the same.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any

from appo.errors import AppoError

SIGNALS = (signal.SIGINT, signal.SIGTERM)
STDERR, SHOW_CURSOR = 2, "\x1b[?25h"  # a live display may have hidden it
SAME_S = 0.5  # a launcher that forwards what the terminal has sent as well is not a second wish


class RunStopped(AppoError):
    """A run ended early because it was asked to.

    `exit_code` is 128 + the signal's number, as in a shell.
    """

    def __init__(self, message: str, signum: int):
        super().__init__(message)
        self.exit_code = 128 + signum


class StopRequest:
    """Whether the user or a scheduler has asked this process to stop.

    A context manager, for the main thread.

    say    tells the user what will happen after the first signal
    leave  ends the process at the second one; os._exit, since the main thread may be unable to
           unwind

    >>> with StopRequest(console.warn) as stop:
    ...     while not stop.asked:
    ...         one_step()

    Over ranks the signal must be agreed on before anything is decided by it:
    `ranks.reduce({"signal": stop.signum}, "max")` at the end of a step.
    """

    def __init__(
        self,
        say: Callable[[str], None] = lambda text: print(text, file=sys.stderr),
        leave: Callable[[int], object] = os._exit,
    ):
        self.signum = 0  # of the first signal; 0: nobody asked
        self._say, self._leave = say, leave
        self._before: dict[int, Any] = {}
        self._when = 0.0

    @property
    def asked(self) -> bool:
        return self.signum != 0

    def __enter__(self) -> StopRequest:
        self._read, self._write = socket.socketpair()
        self._write.setblocking(False)
        self._fd_before = signal.set_wakeup_fd(self._write.fileno(), warn_on_full_buffer=False)
        for signum in SIGNALS:
            # The wake-up socket is written only for signals that have a handler in Python.
            self._before[signum] = signal.signal(signum, lambda *_: None)
        self._thread = threading.Thread(target=self._listen, name="appo-signals", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)
        signal.set_wakeup_fd(self._fd_before)
        self._write.close()  # the listener reads the end of file
        self._thread.join()
        self._read.close()

    def _listen(self) -> None:
        while data := self._read.recv(64):
            for signum in data:
                if signum in SIGNALS:
                    self._take(signum)

    def _take(self, signum: int) -> None:
        name, now = signal.Signals(signum).name, time.monotonic()
        if not self.asked:
            self.signum, self._when = signum, now
            self._say(
                f"{name}: the step is finished and saved, then the run ends; once more ends it now"
            )
        elif now - self._when > SAME_S:
            cursor = SHOW_CURSOR if os.isatty(STDERR) else ""
            os.write(STDERR, f"{cursor}\n{name} again: leaving now; checkpoints stay\n".encode())
            self._leave(128 + signum)
