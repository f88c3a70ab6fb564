"""What the caller hands to the sandboxed process.

Its command, its environment, and the job sheet it reads on fd 0.
"""

from __future__ import annotations

import marshal
import os
from functools import cache
from pathlib import Path

from appo.tools.sandbox import bwrap, files, seccomp
from appo.tools.sandbox.limits import SandboxLevel, SandboxLimits, rlimits, shared_process_wall


@cache
def child_code() -> int:
    """File descriptor (in memory) of child.py, compiled.

    Compiling it in each child would cost 5 ms a call.
    """
    source = Path(__file__).with_name("child.py").read_text()
    fd = os.memfd_create("child")
    os.write(fd, marshal.dumps(compile(source, "<sandbox>", "exec", optimize=2)))
    return fd


@cache
def system_call_filter() -> bytes:
    """The seccomp program of this machine, as the kernel loads it."""
    return seccomp.program()


def environment(slot: files.Slot | None) -> dict[str, str]:
    """All environment variables the code will see.

    The hash seed is fixed: sets print in the same order each time.
    """
    work = slot.work if slot else bwrap.WORK
    home = {"HOME": work, "TMPDIR": work, "PATH": "/usr/bin:/bin"}
    return {**home, "LANG": "C.UTF-8", "PYTHONHASHSEED": "0", "OPENBLAS_NUM_THREADS": "1"}


def command(level: SandboxLevel, limits: SandboxLimits, slot: files.Slot | None) -> list[str]:
    """The program to start.

    -s -P with an environment of ours isolate as -I does, and let us fix the hash seed.
    """
    start = f"import marshal, posix; exec(marshal.loads(posix.pread({child_code()}, 1 << 20, 0)))"
    python = [files.interpreter(), "-s", "-P", "-S", "-B", "-c", start]
    if level != "strict":
        return python
    env = [w for k, v in environment(slot).items() for w in ("--setenv", k, v)]
    return [*bwrap.arguments(int(limits.file_mb)), *env, *python]


def sheet(
    level: SandboxLevel,
    limits: SandboxLimits,
    slot: files.Slot | None,
    control: int,
    code: str,
    stdin: str,
    show_last: bool,
) -> bytes:
    """Header lines, an empty line, and the blobs, as read by child.read_job.

    `control`: descriptor of its socket.
    """
    bpf = b"" if level == "rlimit" else system_call_filter()
    blobs = [bpf, *(text.encode("utf-8", "replace") for text in (stdin, code))]
    root = os.getuid() == 0
    shared = limits.processes + 256 if root else shared_process_wall()
    lines = [
        f"control {control}",
        f"wall {limits.wall_s}",
        f"work {slot.work if slot else bwrap.WORK}",
        f"proc {int(level != 'strict')}",
        f"drop {int(level == 'landlock')}",
        f"uids {slot.uid if slot else 0} 65534" if root else "uids",
        f"keep_read {int(not files.others_may_enter())}",
        f"nproc {int(limits.processes)} {int(shared)}",
        f"show_last {int(show_last)}",
        *(f"rlimit {which} {soft} {hard}" for which, soft, hard in rlimits(limits)),
        *(f"{k} {len(b)}" for k, b in zip(("bpf", "stdin", "code"), blobs, strict=True)),
    ]
    if slot and slot.ruleset is not None:
        lines.append(f"ruleset {slot.ruleset}")
    return os.fsencode("\n".join(lines)) + b"\n\n" + b"".join(blobs)
