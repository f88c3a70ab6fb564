"""The system-call filter: an allow-list, as classic BPF, for x86_64 and aarch64.

An allow-list because Landlock leaves much open (chmod, utimes, setxattr, signals before ABI 6,
System V IPC, UDP and Unix sockets, other processes' limits and priorities) and because new kernels
bring new calls. What is not listed fails with EPERM; calls younger than this table fail with
ENOSYS, as they would on an older kernel, and so does `clone3`, whose flags a filter cannot see (the
C library then falls back to `clone`). A foreign architecture kills the process.
"""

from __future__ import annotations

import errno
import os
import struct

AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
SELF = 0xDEADCAFE  # stands for the worker's process id, filled in by the worker (child.py)
NEWER_THAN_TABLE = 442

# name: (x86_64, aarch64); None where an architecture lacks the call.
ALLOWED: dict[str, tuple[int | None, int | None]] = {
    # files: Landlock or the mount namespace says which
    "read": (0, 63), "write": (1, 64), "close": (3, 57), "stat": (4, None), "fstat": (5, 80),
    "lstat": (6, None), "lseek": (8, 62), "pread64": (17, 67), "pwrite64": (18, 68), "readv": (19, 65),
    "writev": (20, 66), "access": (21, None), "dup": (32, 23), "dup2": (33, None), "sendfile": (40, 71),
    "flock": (73, 32), "fsync": (74, 82), "fdatasync": (75, 83), "ftruncate": (77, 46), "getcwd": (79, 17),
    "chdir": (80, 49), "fchdir": (81, 50), "rename": (82, None), "mkdir": (83, None), "rmdir": (84, None),
    "link": (86, None), "unlink": (87, None), "symlink": (88, None), "readlink": (89, None), "umask": (95, 166),
    "statfs": (137, 43), "fstatfs": (138, 44), "getdents64": (217, 61), "fadvise64": (221, 223),
    "mkdirat": (258, 34), "newfstatat": (262, 79), "unlinkat": (263, 35), "renameat": (264, 38),
    "linkat": (265, 37), "symlinkat": (266, 36), "readlinkat": (267, 78), "faccessat": (269, 48),
    "fallocate": (285, 47), "dup3": (292, 24), "preadv": (295, 69), "pwritev": (296, 70),
    "renameat2": (316, 276), "copy_file_range": (326, 285), "preadv2": (327, 286), "pwritev2": (328, 287),
    "statx": (332, 291), "close_range": (436, 436), "faccessat2": (439, 439),
    # memory, time, randomness
    "mmap": (9, 222), "mprotect": (10, 226), "munmap": (11, 215), "brk": (12, 214), "mremap": (25, 216),
    "msync": (26, 227), "mincore": (27, 232), "madvise": (28, 233), "nanosleep": (35, 101),
    "getitimer": (36, 102), "alarm": (37, None), "setitimer": (38, 103), "gettimeofday": (96, 169),
    "times": (100, 153), "time": (201, None), "clock_gettime": (228, 113), "clock_getres": (229, 114),
    "clock_nanosleep": (230, 115), "getrandom": (318, 278),
    # what a process may know of itself and do to itself
    "rt_sigaction": (13, 134), "rt_sigprocmask": (14, 135), "rt_sigreturn": (15, 139), "sched_yield": (24, 124),
    "pause": (34, None), "getpid": (39, 172), "exit": (60, 93), "wait4": (61, 260), "uname": (63, 160),
    "getrlimit": (97, 163), "getrusage": (98, 165), "sysinfo": (99, 179), "getuid": (102, 174),
    "getgid": (104, 176), "geteuid": (107, 175), "getegid": (108, 177), "setpgid": (109, 154),
    "getppid": (110, 173), "getpgrp": (111, None), "setsid": (112, 157), "getgroups": (115, 158),
    "getresuid": (118, 148), "getresgid": (120, 150), "getpgid": (121, 155), "getsid": (124, 156),
    "rt_sigpending": (127, 136), "rt_sigtimedwait": (128, 137), "rt_sigsuspend": (130, 133),
    "sigaltstack": (131, 132), "getpriority": (140, 141), "arch_prctl": (158, None), "setrlimit": (160, 164),
    "gettid": (186, 178), "futex": (202, 98), "sched_getaffinity": (204, 123), "set_tid_address": (218, 96),
    "restart_syscall": (219, 128), "exit_group": (231, 94), "waitid": (247, 95), "set_robust_list": (273, 99),
    "getcpu": (309, 168), "membarrier": (324, 283), "rseq": (334, 293), "fork": (57, None), "vfork": (58, None),
    # waiting, and pipes and stream pairs within the process tree (asyncio needs them)
    "poll": (7, None), "pipe": (22, None), "select": (23, None), "sendto": (44, 206), "recvfrom": (45, 207),
    "sendmsg": (46, 211), "recvmsg": (47, 212), "shutdown": (48, 210), "getsockname": (51, 204),
    "getpeername": (52, 205), "getsockopt": (55, 209), "epoll_create": (213, None), "epoll_wait": (232, None),
    "epoll_ctl": (233, 21), "pselect6": (270, 72), "ppoll": (271, 73), "epoll_pwait": (281, 22),
    "eventfd2": (290, 19), "epoll_create1": (291, 20), "pipe2": (293, 59), "epoll_pwait2": (441, 441),
}  # fmt: skip

CLONE_NAMESPACES = 0x7E020000  # CLONE_NEWNS | CGROUP | UTS | IPC | USER | PID | NET
O_ACCMODE_TRUNC, O_TRUNC = 0o1003, 0o1000

# Calls allowed for some arguments only: name -> (numbers, argument index, test, operands).
#   "in"      the argument is one of the operands
#   "no_bits" none of the bits is set
#   "not_masked" (argument & operand 0) != operand 1
CONDITIONAL: dict[str, tuple[tuple[int | None, int | None], list[tuple[int, str, list[int]]]]] = {
    # FIOCLEX FIONCLEX TCGETS TIOCGWINSZ FIONREAD FIONBIO
    "ioctl": ((16, 29), [(1, "in", [0x5451, 0x5450, 0x5401, 0x5413, 0x541B, 0x5421])]),
    # no F_SETOWN, F_SETSIG: they signal other processes. DUPFD..SETLKW, OFD locks, DUPFD_CLOEXEC,
    # GETPIPE_SZ
    "fcntl": ((72, 25), [(1, "in", [0, 1, 2, 3, 4, 5, 6, 7, 36, 37, 38, 1030, 1032])]),
    "clone": ((56, 220), [(0, "no_bits", [CLONE_NAMESPACES])]),
    # O_RDONLY|O_TRUNC empties a file that Landlock before ABI 3 lets us read
    "open": ((2, None), [(1, "not_masked", [O_ACCMODE_TRUNC, O_TRUNC])]),
    "openat": ((257, 56), [(2, "not_masked", [O_ACCMODE_TRUNC, O_TRUNC])]),
    # AF_UNIX, SOCK_STREAM (with or without CLOEXEC, NONBLOCK): a datagram pair could send to any
    # named socket
    "socketpair": (
        (53, 199),
        [(0, "in", [1]), (1, "in", [1, 0x80001, 0x801, 0x80801])],
    ),
    "kill": ((62, 129), [(0, "in", [SELF])]),
    "tgkill": ((234, 131), [(0, "in", [SELF])]),
    "tkill": ((200, 130), [(0, "in", [SELF])]),
    "prctl": ((157, 167), [(0, "in", [15, 16])]),  # PR_SET_NAME, PR_GET_NAME
    "prlimit64": ((302, 261), [(0, "in", [0])]),  # of this process only
}

BPF_LD_W_ABS, BPF_JEQ, BPF_JGE, BPF_JSET, BPF_AND, BPF_RET = 0x20, 0x15, 0x35, 0x45, 0x54, 0x06
ALLOW, KILL, ERRNO = 0x7FFF0000, 0x80000000, 0x00050000


def supported(machine: str | None = None) -> bool:
    """Whether there is a filter for this kind of machine (None: the one we run on)."""
    return (machine or os.uname().machine) in AUDIT_ARCH


def _op(code: int, k: int, jt: int = 0, jf: int = 0) -> bytes:
    return struct.pack("<HBBI", code, jt, jf, k)


def _tests(tests: list[tuple[int, str, list[int]]]) -> list[bytes]:
    """Instructions that return EPERM unless all tests hold, and ALLOW at the end."""
    deny = _op(BPF_RET, ERRNO | errno.EPERM)
    ops: list[bytes] = []
    for argument, test, operands in tests:
        ops.append(
            _op(BPF_LD_W_ABS, 16 + 8 * argument)
        )  # low word: all these arguments are 32 bits wide
        if test == "in":
            n = len(operands)
            ops += [_op(BPF_JEQ, value, jt=n - i) for i, value in enumerate(operands)]
        elif test == "no_bits":
            ops.append(_op(BPF_JSET, operands[0], jf=1))
        else:
            ops += [_op(BPF_AND, operands[0]), _op(BPF_JEQ, operands[1], jf=1)]
        ops.append(deny)
    return [*ops, _op(BPF_RET, ALLOW)]


def program(machine: str | None = None) -> bytes:
    """The filter as an array of `struct sock_filter` (8 bytes each).

    Raises KeyError for another architecture.
    """
    machine = machine or os.uname().machine
    column = {"x86_64": 0, "aarch64": 1}[machine]
    ops = [
        _op(BPF_LD_W_ABS, 4),
        _op(BPF_JEQ, AUDIT_ARCH[machine], jt=1),
        _op(BPF_RET, KILL),
        _op(BPF_LD_W_ABS, 0),
    ]
    for numbers in ALLOWED.values():
        if (number := numbers[column]) is not None:
            ops += [_op(BPF_JEQ, number, jf=1), _op(BPF_RET, ALLOW)]
    for numbers, tests in CONDITIONAL.values():
        if (number := numbers[column]) is not None:
            body = _tests(tests)
            ops += [_op(BPF_JEQ, number, jf=len(body)), *body]
    clone3 = 435
    ops += [
        _op(BPF_JEQ, clone3, jt=1),
        _op(BPF_JGE, NEWER_THAN_TABLE, jf=1),  # also the x32 calls of x86_64 (bit 30)
        _op(BPF_RET, ERRNO | errno.ENOSYS),
        _op(BPF_RET, ERRNO | errno.EPERM),
    ]
    return b"".join(ops)
