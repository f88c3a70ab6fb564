"""Which host files a sandboxed interpreter may read, and the working directories it may write."""

from __future__ import annotations

import atexit
import errno
import itertools
import os
import shutil
import stat
import sys
import sysconfig
import tempfile
import threading
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from appo.tools.sandbox import landlock

HIDDEN = {
    "site-packages",
    "dist-packages",
}  # installed packages are no part of the standard library
DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom")
SMALL = ("/etc/ld.so.cache", "/etc/localtime", "/usr/share/zoneinfo")


@cache
def interpreter() -> str:
    """Path of the base interpreter: the one behind the virtual environment we may run in."""
    return os.path.realpath(getattr(sys, "_base_executable", None) or sys.executable)


@cache
def stdlib_dirs() -> tuple[str, ...]:
    """Real paths of this Python's standard library, each one once."""
    base = {"base": sys.base_prefix, "platbase": sys.base_exec_prefix}
    return tuple(
        dict.fromkeys(
            os.path.realpath(sysconfig.get_path(k, vars=base)) for k in ("stdlib", "platstdlib")
        )
    )


@cache
def library_paths() -> tuple[str, ...]:
    """Directories of the system's shared libraries, and the interpreter's own library files."""
    multiarch = sysconfig.get_config_var("MULTIARCH") or ""
    dirs = [f"/lib/{multiarch}", f"/usr/lib/{multiarch}"] if multiarch else []
    if not any(map(os.path.isdir, dirs)):
        dirs = ["/lib", "/usr/lib"]
    own = sorted(str(p) for p in Path(sys.base_prefix, "lib").glob("*.so*") if p.is_file())
    return tuple(p for p in [*dirs, "/lib64", "/usr/lib64", *own] if os.path.exists(p))


@cache
def others_may_enter() -> bool:
    """Whether a user without privileges can reach the standard library.

    Not so below a root-owned home.
    """
    paths = [Path(d) for d in stdlib_dirs()]
    return all(os.stat(p).st_mode & stat.S_IXOTH for path in paths for p in (path, *path.parents))


@cache
def read_rules() -> tuple[tuple[str, int], ...]:
    """Landlock rules for everything but the working directory."""
    rules = [(p, landlock.READ) for p in (*library_paths(), *SMALL)]
    rules += [(d, landlock.READ_FILE | landlock.WRITE_FILE) for d in DEVICES]
    for top in stdlib_dirs():
        rules.append((top, landlock.READ_DIR))  # the import system lists it
        rules += [(e.path, landlock.READ) for e in os.scandir(top) if e.name not in HIDDEN]
    return tuple(rules)


@dataclass(frozen=True)
class Slot:
    """A working directory with the user id and the Landlock ruleset that belong to it.

    None: not in use.
    """

    work: str
    uid: int
    ruleset: int | None


class Slots:
    """Slots are made once and used again.

    So a call pays for neither 250 rules nor a directory.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._forget()
        os.register_at_fork(after_in_child=self._forget)

    def _forget(self) -> None:
        self._free: dict[bool, list[Slot]] = {True: [], False: []}
        self._base: str | None = None
        self._numbers = itertools.count()
        self._lock = threading.Lock()

    def take(self, with_landlock: bool) -> Slot:
        """A clean slot that nobody else uses. Raises OSError when Landlock refuses."""
        with self._lock:
            if self._free[with_landlock]:
                return self._free[with_landlock].pop()
            if self._base is None:
                self._base = tempfile.mkdtemp(prefix="appo-sandbox-")
                os.chmod(self._base, 0o711)
                atexit.register(_remove_base, self._base, os.getpid())
            number = next(self._numbers)
        work = os.path.join(self._base, str(number))
        os.mkdir(work, 0o700)
        uid = (
            1_900_000_000 + os.getpid() % 100_000 * 512 + number % 512
        )  # nobody else's, on this machine
        if os.getuid() == 0:
            os.chown(work, uid, uid) if _mapped(uid) else os.chmod(work, 0o777)
        rules = [(work, landlock.WORK), *read_rules()]
        return Slot(work, uid, landlock.ruleset(rules) if with_landlock else None)

    def drop(self, slot: Slot) -> None:
        """Never use the slot again; its directory goes with the others when this process ends."""
        if slot.ruleset is not None:
            os.close(slot.ruleset)

    def give_back(self, slot: Slot) -> None:
        """Empty the slot and keep it for the next call.

        One that cannot be emptied is not used again.
        """
        try:
            empty(slot.work)
        except OSError:
            self.drop(slot)
            return
        with self._lock:
            self._free[slot.ruleset is not None].append(slot)


@cache
def _mapped(uid: int) -> bool:
    """Whether a user id exists in our user namespace (rootless containers map few)."""
    for line in Path("/proc/self/uid_map").read_text().splitlines():
        first, _, length = map(int, line.split())
        if first <= uid < first + length:
            return True
    return False


def empty(top: str) -> None:
    """Remove everything below `top`, however deep.

    Directories are first lifted to the top, so that no path grows.

    The content is hostile, but whoever wrote it is dead; links are removed, never followed.
    """
    fresh = (
        f".{os.urandom(8).hex()}-{n}" for n in itertools.count()
    )  # names that cannot be there already
    while entries := list(os.scandir(top)):
        for entry in entries:
            if not entry.is_dir(follow_symlinks=False):
                os.unlink(entry.path)
                continue
            os.chmod(entry.path, 0o700)
            for inner in list(os.scandir(entry.path)):
                if inner.is_dir(follow_symlinks=False):
                    os.chmod(inner.path, 0o700)
                    os.rename(inner.path, os.path.join(top, next(fresh)))
                else:
                    os.unlink(inner.path)
            os.rmdir(entry.path)


def disk_bytes(top: str, most_entries: int = 2000) -> float:
    """Bytes of the files below `top`.

    Infinite with more than `most_entries` entries or a folder we cannot look into.
    """
    total, count = 0.0, 0
    hidden: list[OSError] = []
    for folder, _, names in os.walk(top, onerror=hidden.append):
        for name in names:
            try:
                total += os.lstat(os.path.join(folder, name)).st_blocks * 512
            except OSError as error:
                hidden.append(error)
        count += 1 + len(names)
        if count > most_entries or any(
            e.errno != errno.ENOENT for e in hidden
        ):  # ENOENT: removed meanwhile
            return float("inf")
    return total


def _remove_base(base: str, owner: int) -> None:
    if os.getpid() == owner:
        shutil.rmtree(base, ignore_errors=True)


SLOTS = Slots()
