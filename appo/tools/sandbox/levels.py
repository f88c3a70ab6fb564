"""Which level of isolation works on this machine, found out by effect.

An escape is tried, and it must fail.

A kernel may have Landlock compiled in and switched off, bubblewrap may be installed where
namespaces are forbidden: only a child that tried to read, write and connect, and could not, counts
as proof.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from appo.errors import SandboxError, ToolError
from appo.tools.sandbox import bwrap, landlock, remote, seccomp
from appo.tools.sandbox.limits import SandboxLevel, SandboxLimits
from appo.tools.sandbox.runner import run_python

LEVELS: tuple[SandboxLevel, ...] = ("strict", "landlock", "rlimit", "remote")
SAFE: tuple[SandboxLevel, ...] = ("strict", "landlock")  # what "auto" tries, best first

FIX = (
    "install bubblewrap (apt install bubblewrap), or use a kernel with Landlock (5.13 or newer, `landlock` among the "
    "lsm= of the boot line), or, for development only, set tools.python.level: rlimit and "
    "tools.python.allow_unsafe: true"
)

# Each attempt prints `<name> done` or `<name> <exception>`; `benign` must be done, the others must
# not.
ATTEMPTS = """
import os, socket
def benign():
    import math, json
    with open("note.txt", "w") as file: file.write("x" * 10)
    assert open("note.txt").read() == "x" * 10 and math.sqrt(49) == 7
def read_secret(): open({secret!r}).read()
def write_outside(): open({outside!r}, "w").write("x")
def connect_tcp(): socket.create_connection(("127.0.0.1", {port}), 1)
def connect_unix():
    s = socket.socket(socket.AF_UNIX); s.settimeout(1); s.connect({unix!r})
def read_parent(): open("/proc/{pid}/environ", "rb").read()
def signal_parent(): os.kill({pid}, 0)
for attempt in (benign, read_secret, write_outside, connect_tcp, connect_unix, read_parent, signal_parent):
    try: attempt()
    except BaseException as error: print(attempt.__name__, type(error).__name__)
    else: print(attempt.__name__, "done")
"""


@dataclass(frozen=True)
class Probe:
    """What was found about one level.

    `details`: attempt → "done" or the exception that stopped it.
    """

    level: SandboxLevel
    works: bool
    reason: str
    details: dict[str, str] = field(default_factory=dict)


_probes: dict[SandboxLevel, Probe] = {}
_lock = threading.Lock()


def probe(level: SandboxLevel) -> Probe:
    """Try `level` out (once per process, some 50 ms).

    A level "works" if a benign program runs and all escapes fail.

    For rlimit, which does not isolate, it says only that programs run; `reason` lists what they can
    do.
    """
    with _lock:
        if level not in _probes:
            _probes[level] = _probe(level)
        return _probes[level]


def _probe(level: SandboxLevel) -> Probe:
    missing = _missing(level)
    if missing:
        return Probe(level, False, missing)
    if level == "remote":
        return Probe(level, *remote.probe())
    try:
        with _targets() as targets:
            limits = SandboxLimits(wall_s=10.0)
            result = run_python(ATTEMPTS.format(**targets), level=level, limits=limits)
    except (ToolError, OSError) as error:
        return Probe(level, False, str(error))
    details = dict(line.split(" ", 1) for line in result.stdout.splitlines() if " " in line)
    escapes = [name for name, what in details.items() if what == "done" and name != "benign"]
    if len(details) != 7 or details["benign"] != "done":
        why = result.stderr.strip().splitlines()[-1:] or [f"exit {result.exit}, {result.reason}"]
        return Probe(level, False, f"a harmless program does not run: {why[0]}", details)
    if level == "rlimit":
        return Probe(level, True, f"development only, no isolation: {', '.join(escapes)}", details)
    if escapes:
        return Probe(level, False, f"does not hold: {', '.join(escapes)}", details)
    return Probe(level, True, _praise(level), details)


def _missing(level: SandboxLevel) -> str | None:
    """What the level needs and this machine lacks, as far as it can be told without trying."""
    if level == "remote":
        return None
    if sys.platform != "linux":
        return f"needs Linux, this is {sys.platform}"
    if level != "rlimit" and not seccomp.supported():
        return f"the system-call filter knows x86_64 and aarch64, this is {os.uname().machine}"
    if level == "strict" and bwrap.path() is None:
        return "bubblewrap (bwrap) is not installed"
    if level == "landlock" and landlock.abi() == 0:
        return "this kernel has no Landlock, or it is switched off"
    return None


def _praise(level: SandboxLevel) -> str:
    if level == "strict":
        return "bubblewrap + system-call filter + limits; every escape that was tried failed"
    own = ", own user id" if os.getuid() == 0 else ""
    return f"Landlock ABI {landlock.abi()} + system-call filter + limits{own}; every escape that was tried failed"


@contextlib.contextmanager
def _targets() -> Iterator[dict[str, object]]:
    """Real things to attack, which the same program reaches without a sandbox.

    Files, listeners, this process.
    """
    # The path of a Unix socket may have 107 bytes; job schedulers hand out longer temporary
    # folders.
    base = None if len(tempfile.gettempdir().encode()) < 70 else "/tmp"
    with (
        tempfile.TemporaryDirectory(prefix="appo-probe-", dir=base) as name,
        socket.socket() as tcp,
    ):
        folder = Path(name)
        folder.chmod(0o777)  # the walls must hold, not the mode bits
        (folder / "secret").write_text("secret")
        (folder / "secret").chmod(0o644)
        tcp.bind(("127.0.0.1", 0))
        tcp.listen()
        with socket.socket(socket.AF_UNIX) as unix:
            unix.bind(str(folder / "unix"))
            (folder / "unix").chmod(0o777)
            unix.listen()
            yield {
                "secret": str(folder / "secret"),
                "outside": str(folder / "outside"),
                "unix": str(folder / "unix"),
                "port": tcp.getsockname()[1],
                "pid": os.getpid(),
            }


def choose_level(requested: str = "auto", allow_unsafe: bool = False) -> Probe:
    """The level to use: the requested one if it works, or the best safe one for "auto".

    Never silently a lower one.

    Raises SandboxError (with what was tried, why it failed, and the fix) when none works, for an
    unknown level, and for rlimit without `allow_unsafe`.
    """
    if requested != "auto" and requested not in LEVELS:
        raise SandboxError(
            f"tools.python.level = {requested!r}: must be one of auto, {', '.join(LEVELS)}"
        )
    if requested == "rlimit" and not allow_unsafe:
        raise SandboxError(
            "tools.python.level = rlimit: does not isolate, model-written code could read and write your files; "
            "set tools.python.allow_unsafe: true to use it for development, or level: auto"
        )
    tried = []
    for level in SAFE if requested == "auto" else [x for x in LEVELS if x == requested]:
        found = probe(level)
        if found.works:
            return found
        tried.append(f"{level}: {found.reason}")
    raise SandboxError(
        f"tools.python.level = {requested}: no sandbox works here ({'; '.join(tried)}). Fix: {FIX}"
    )
