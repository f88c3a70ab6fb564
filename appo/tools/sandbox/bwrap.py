"""The strict level's walls.

Bubblewrap gives the call its own root, processes, network, users and IPC.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from functools import cache

from appo.tools.sandbox.files import DEVICES, HIDDEN, SMALL, interpreter, library_paths, stdlib_dirs

WORK = "/work"
NOBODY = "65534"


@cache
def path() -> str | None:
    """Where bubblewrap is installed; None when it is not."""
    return shutil.which("bwrap")


@cache
def _knows_disable_userns(bwrap: str) -> bool:
    """bubblewrap has --disable-userns since 0.8.

    before, the system-call filter alone forbids nested namespaces.
    """
    text = subprocess.run([bwrap, "--help"], capture_output=True, text=True, timeout=10)
    return "--disable-userns" in text.stdout + text.stderr


@cache
def arguments(file_mb: int) -> tuple[str, ...]:
    """The bubblewrap command up to the program to run.

    An empty read-only root with the interpreter and /work.

    No /proc: nothing needs it, and mounting one is what containers forbid most often.
    """
    bwrap = path()
    assert bwrap is not None, "asked for bubblewrap without looking for it first"
    args = [bwrap, "--unshare-all", "--unshare-user", "--cap-drop", "ALL", "--die-with-parent"]
    args += ["--new-session", "--uid", NOBODY, "--gid", NOBODY, "--hostname", "sandbox"]
    if _knows_disable_userns(bwrap):
        args.append("--disable-userns")
    for p in library_paths():
        args += ["--symlink", os.readlink(p), p] if os.path.islink(p) else ["--ro-bind", p, p]
    exe = interpreter()
    args += ["--ro-bind", exe, exe]
    for top in stdlib_dirs():
        args += ["--ro-bind", top, top]
        for name in sorted(HIDDEN):
            if os.path.isdir(os.path.join(top, name)):
                args += [
                    "--tmpfs",
                    os.path.join(top, name),
                    "--remount-ro",
                    os.path.join(top, name),
                ]
    for p in SMALL:
        args += ["--ro-bind-try", p, p]
    for p in DEVICES:
        args += ["--dev-bind", p, p]
    args += ["--size", str(file_mb << 20), "--tmpfs", WORK, "--remount-ro", "/", "--chdir", WORK]
    return (*args, "--clearenv")
