"""Start one sandboxed interpreter, read what it writes within bounds, and end it.

No process is left behind.

The parent never forks itself (`subprocess` uses vfork here): it starts `python -c child.py` with
the job on fd 0, two pipes and a control socket. It stops reading when the supervisor reports, not
when the pipes close, so an orphan that holds a pipe cannot hang the caller.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import subprocess
import time
from collections.abc import Iterator

from appo.errors import SandboxError, ToolError
from appo.tools.sandbox import files, job, proc
from appo.tools.sandbox.limits import MB, SandboxLevel, SandboxLimits, SandboxResult

TICK_S = 0.05  # how often the limits on the whole tree are sampled
START_S = 10.0  # an interpreter that takes longer to start is not going to
GRACE_S = 2.0  # for the supervisor to clean up and report
FLOOD = 16  # × output_bytes: then nobody is going to read it
DEFAULT = SandboxLimits()


def run_python(
    code: str,
    *,
    level: SandboxLevel,
    limits: SandboxLimits = DEFAULT,
    stdin: str = "",
    show_last: bool = False,
) -> SandboxResult:
    """Run `code` as a Python program behind the walls of `level` and return what came of it.

    With `show_last` the value of a last expression is printed if nothing else was, as in a
    notebook. The hash seed is fixed, so that sets print in the same order each time. Safe to call
    from several threads at once.

    Raises ToolError("unavailable") when the walls could not be put up: the code has not run then.
    """
    if level == "remote":
        raise SandboxError("tools.python.level = remote: run_python runs code on this machine only")
    with _slot(level) as slot:
        try:
            return _Run(code, level, limits, stdin, show_last, slot).result()
        except OSError as error:
            raise ToolError(
                f"sandbox level {level}: cannot start: {error}", "unavailable"
            ) from error


@contextlib.contextmanager
def _slot(level: SandboxLevel) -> Iterator[files.Slot | None]:
    """A working directory for the levels that have none of their own.

    One that may still be in use is not reused.
    """
    if level == "strict":
        yield None
        return
    try:
        slot = files.SLOTS.take(with_landlock=level == "landlock")
    except OSError as error:
        raise ToolError(f"sandbox level {level}: {error}", "unavailable") from error
    try:
        yield slot
    except BaseException:
        files.SLOTS.drop(slot)
        raise
    files.SLOTS.give_back(slot)


class _Run:
    """One call: the process, its pipes, and the clock."""

    def __init__(
        self,
        code: str,
        level: SandboxLevel,
        limits: SandboxLimits,
        stdin: str,
        show_last: bool,
        slot: files.Slot | None,
    ) -> None:
        self.level, self.limits, self.slot = level, limits, slot
        self.kept = {"stdout": bytearray(), "stderr": bytearray()}
        self.seen = {"stdout": 0, "stderr": 0}
        self.report = b""
        self.over: str | None = None  # the limit on the whole tree that was passed
        self.control, theirs = socket.socketpair()
        fds = [theirs.fileno(), job.child_code()]
        if slot and slot.ruleset is not None:
            fds.append(slot.ruleset)
        sheet = os.memfd_create("job")
        try:
            os.write(sheet, job.sheet(level, limits, slot, theirs.fileno(), code, stdin, show_last))
            os.lseek(sheet, 0, os.SEEK_SET)
            self.process = subprocess.Popen(
                job.command(level, limits, slot),
                stdin=sheet,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env=job.environment(slot),
                pass_fds=fds,
                cwd="/",
                start_new_session=True,
            )
            assert self.process.stdout is not None and self.process.stderr is not None
            self.pipes = {"stdout": self.process.stdout, "stderr": self.process.stderr}
        except OSError:
            self.control.close()
            raise
        finally:
            os.close(sheet)
            theirs.close()

    def result(self) -> SandboxResult:
        """Wait for the end and take stock. Raises ToolError when the code was never started."""
        started = time.monotonic()
        try:
            self._read_until_report(started + START_S + self.limits.wall_s)
            self.control.close()
            self._end_process()
            self._drain()
        finally:
            for pipe in self.pipes.values():
                pipe.close()
            self.control.close()
        wall_ms = (time.monotonic() - started) * 1000
        out, err = (bytes(self.kept[k]).decode("utf-8", "replace") for k in ("stdout", "stderr"))
        lines = self.report.decode("utf-8", "replace").splitlines()
        if "ready" not in lines:
            why = next((x for x in lines if x.startswith("failed ")), "") or err.strip()[-300:]
            raise ToolError(
                f"sandbox level {self.level}: not set up, no code was run: {why}", "unavailable"
            )
        done = next((x.split() for x in lines if x.startswith("done ")), ["done", "-9", "killed"])
        exit_status, reason = int(done[1]), done[2]
        if exit_status == -signal.SIGXCPU:
            reason = "cpu"
        elif reason in ("stopped", "killed"):
            reason = self.over or reason
        truncated = any(self.seen[k] > len(self.kept[k]) for k in self.kept)
        return SandboxResult(
            out, err, exit_status, reason in ("wall", "cpu"), truncated, wall_ms, reason
        )

    def _read_until_report(self, deadline: float) -> None:
        """Read pipes and control socket until the supervisor says `done`.

        Or until it hangs up, or a limit is passed.
        """
        poller = select.poll()
        names = {pipe.fileno(): name for name, pipe in self.pipes.items()}
        for fd in (*names, self.control.fileno()):
            poller.register(fd, select.POLLIN)
        tick = time.monotonic() + TICK_S
        while True:
            for fd, _ in poller.poll(TICK_S * 1000):
                if fd in names:
                    if not self._read(fd, names[fd]):
                        poller.unregister(fd)
                    continue
                data = self.control.recv(4096)
                self.report += data
                if not data or b"done " in self.report or b"failed " in self.report:
                    return
            now = time.monotonic()
            if now >= tick:
                self.over = self.over or self._passed_limit()
                tick = now + TICK_S
            if now > deadline:
                self.over = self.over or "wall"
            if self.over:
                self._stop()
                return

    def _stop(self) -> None:
        """Ask the supervisor to kill its tree, and wait for its report.

        Output is not read any more.

        At level strict the process namespace is killed as a whole: nothing in it need be asked.
        """
        if self.level == "strict":
            self.process.kill()
            return
        self.control.shutdown(socket.SHUT_WR)
        self.control.settimeout(GRACE_S)
        with contextlib.suppress(TimeoutError):
            while b"done " not in self.report:
                data = self.control.recv(4096)
                if not data:
                    return
                self.report += data

    def _read(self, fd: int, name: str) -> bool:
        """One read; keeps the first output_bytes. False at the end of the stream."""
        data = os.read(fd, 65536)
        self.seen[name] += len(data)
        room = int(self.limits.output_bytes) - len(self.kept[name])
        self.kept[name] += data[: max(0, room)]
        if self.seen[name] > FLOOD * self.limits.output_bytes:
            self.over = self.over or "output"
        return bool(data)

    def _passed_limit(self) -> str | None:
        """The first limit on the whole process tree that is passed now."""
        below = proc.tree(self.process.pid)
        walls = 2 if self.level == "strict" else 0  # bubblewrap's init and the supervisor
        if len(below) - walls > self.limits.processes:
            return "processes"
        if len(below) - walls > 1 and proc.resident_bytes(below) > self.limits.memory_mb * MB:
            return "memory"
        if self.slot and files.disk_bytes(self.slot.work) > self.limits.file_mb * MB:
            return "disk"
        return None

    def _end_process(self) -> None:
        """Reap what we started; kill it, and what is left below it, if it does not end by itself."""
        try:
            self.process.wait(0.05 if self.level == "strict" else GRACE_S)
        except subprocess.TimeoutExpired:
            # At level strict the process namespace goes with it. Otherwise what is below dies
            # first: a stuck supervisor has not reaped it, so the ids are still theirs.
            for pid in proc.tree(self.process.pid) if self.level != "strict" else ():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self.process.kill()
            self.process.wait()

    def _drain(self) -> None:
        """Read what is still in the pipes.

        Their writers are dead or dying, so this ends; a deadline makes sure.
        """
        deadline = time.monotonic() + GRACE_S
        for name, pipe in self.pipes.items():
            os.set_blocking(pipe.fileno(), False)
            while time.monotonic() < deadline:
                try:
                    if not self._read(pipe.fileno(), name):
                        break
                except BlockingIOError:
                    time.sleep(0.0005)
