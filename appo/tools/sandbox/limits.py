"""What a call may use, and what it returned: the two records that cross the sandbox's border."""

from __future__ import annotations

import os
import resource
import time
from dataclasses import dataclass, fields
from typing import Literal

from appo.errors import ConfigError

SandboxLevel = Literal["strict", "landlock", "rlimit", "remote"]

MB = 1 << 20


@dataclass(frozen=True)
class SandboxLimits:
    """Bounds of one call. Raises ConfigError for a value that is not positive.

    wall_s        seconds from the start of the code to its end
    cpu_s         CPU seconds of each process
    memory_mb     address space of each process, and resident memory of all of them together
                  (sampled)
    output_bytes  kept of stdout and of stderr, each; a flood of 16 times as much ends the call
    file_mb       size of a file, and of all files together (sampled; exact at level strict)
    processes     processes at a time (sampled; exact where the call has a user id of its own)
    """

    wall_s: float = 5.0
    cpu_s: float = 5
    memory_mb: int = 512
    output_bytes: int = 65536
    file_mb: int = 16
    processes: int = 16

    def __post_init__(self) -> None:
        for f in fields(self):
            value = getattr(self, f.name)
            if not isinstance(value, int | float) or not value > 0:
                raise ConfigError(
                    f"tools.python.limits.{f.name} = {value!r}: must be greater than 0"
                )
        if self.memory_mb < 64:
            raise ConfigError(
                f"tools.python.limits.memory_mb = {self.memory_mb}: Python itself needs 64 or more"
            )


@dataclass(frozen=True)
class SandboxResult:
    """Outcome of one call. `exit` is the exit status, negative for a signal (−9: killed).

    `reason` says why the call ended: exited (by itself or by a signal), wall, cpu, memory,
    processes, disk, output, or killed (from outside).
    """

    stdout: str
    stderr: str
    exit: int
    timed_out: bool
    truncated: bool
    wall_ms: float
    reason: str = "exited"


def rlimits(limits: SandboxLimits) -> list[tuple[int, int, int]]:
    """(resource, soft, hard) for setrlimit, all but RLIMIT_NPROC.

    SIGXCPU comes a second before SIGKILL.
    """
    cpu, memory, size = int(limits.cpu_s), int(limits.memory_mb * MB), int(limits.file_mb * MB)
    return [
        (resource.RLIMIT_CPU, cpu, cpu + 1),
        (resource.RLIMIT_AS, memory, memory),
        (resource.RLIMIT_FSIZE, size, size),
        (resource.RLIMIT_NOFILE, 64, 64),
        (resource.RLIMIT_CORE, 0, 0),
        (resource.RLIMIT_MEMLOCK, 0, 0),
        (resource.RLIMIT_MSGQUEUE, 0, 0),
    ]


_own_tasks: tuple[float, int] = (-1e9, 0)


def shared_process_wall() -> int:
    """RLIMIT_NPROC for a worker that shares our user id.

    What we run now plus 256, so that a fork bomb meets a wall.

    The kernel counts threads per user; the exact limit is kept by sampling (runner.py). Renewed
    every 5 s.
    """
    global _own_tasks
    when, count = _own_tasks
    if time.monotonic() - when > 5.0:
        count = sum(map(_tasks_if_own, filter(str.isdigit, os.listdir("/proc"))))
        _own_tasks = (time.monotonic(), count)
    return count + 256


def _tasks_if_own(pid: str) -> int:
    try:
        own = os.stat(f"/proc/{pid}").st_uid == os.getuid()
        return len(os.listdir(f"/proc/{pid}/task")) if own else 0
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return 0  # ended meanwhile, or not ours to look at
