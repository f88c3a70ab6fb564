"""Landlock by ctypes: a ruleset says which files a process may use from now on.

All else is denied, for good.

ABI differences are met by asking for what the kernel knows: 1 files (5.13), 2 moving between
directories, 3 truncate, 4 TCP, 5 device ioctl, 6 signals and abstract Unix sockets (6.12). What an
older ABI leaves open is closed by the system-call filter (seccomp.py), so the level holds from ABI
1 on. Source: the kernel's userspace-api/landlock.
"""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Iterable

SYS_CREATE_RULESET, SYS_ADD_RULE = 444, 445
CREATE_RULESET_VERSION, RULE_PATH_BENEATH = 1, 1

EXECUTE, WRITE_FILE, READ_FILE, READ_DIR, REMOVE_DIR, REMOVE_FILE = (1 << n for n in range(6))
MAKE_DIR, MAKE_REG, MAKE_SYM = 1 << 7, 1 << 8, 1 << 12
REFER, TRUNCATE, IOCTL_DEV = 1 << 13, 1 << 14, 1 << 15
ON_FILES = EXECUTE | WRITE_FILE | READ_FILE | TRUNCATE | IOCTL_DEV

READ = READ_FILE | READ_DIR
WORK = (
    READ | WRITE_FILE | REMOVE_DIR | REMOVE_FILE | MAKE_DIR | MAKE_REG | MAKE_SYM | REFER | TRUNCATE
)

_libc = ctypes.CDLL(None, use_errno=True)


def abi() -> int:
    """Landlock ABI version of the running kernel; 0 when Landlock is absent or switched off."""
    version = _libc.syscall(SYS_CREATE_RULESET, None, ctypes.c_size_t(0), CREATE_RULESET_VERSION)
    return max(0, version)


def handled(version: int) -> int:
    """Bits of all file-system rights that ABI `version` can restrict."""
    return (1 << (13 + (version >= 2) + (version >= 3) + (version >= 5))) - 1


def ruleset(rules: Iterable[tuple[str, int]]) -> int:
    """File descriptor of a ruleset that grants `(path, rights)` and nothing else.

    Missing paths are skipped.

    TCP, signals and abstract Unix sockets to the outside are denied too where the ABI knows them.
    Raises OSError.
    """
    version = abi()
    mask = handled(version)
    fields = [mask, *([0b11] if version >= 4 else []), *([0b11] if version >= 6 else [])]
    attr = struct.pack(f"={len(fields)}Q", *fields)
    fd = _checked(_libc.syscall(SYS_CREATE_RULESET, attr, ctypes.c_size_t(len(attr)), 0))
    os.set_inheritable(fd, False)
    try:
        for path, rights in rules:
            _grant(fd, path, rights & mask)
    except OSError:
        os.close(fd)
        raise
    return fd


def _grant(fd: int, path: str, rights: int) -> None:
    try:
        target = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        return
    try:
        if not os.path.isdir(path):
            rights &= ON_FILES
        rule = struct.pack("=Qi", rights, target)
        _checked(_libc.syscall(SYS_ADD_RULE, fd, RULE_PATH_BENEATH, rule, 0))
    finally:
        os.close(target)


def _checked(value: int) -> int:
    if value < 0:
        raise OSError(ctypes.get_errno(), f"landlock: {os.strerror(ctypes.get_errno())}")
    return value
