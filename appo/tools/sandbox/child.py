"""What runs in the sandboxed process: restrict yourself for good, then run the model's code.

This file is compiled once by the caller and handed to a bare interpreter as code, so it imports
nothing of appo. It takes every decision from the job on fd 0: header lines `key value…`, an empty
line, then the blobs bpf, stdin, code. One interpreter start serves two processes:

- the **supervisor** (unrestricted, trusted) forks the worker, waits for it, for the wall clock or
  for a hang-up of the control socket, kills all that descends from it (it is a subreaper: `setsid`
  and double forks do not help), reports;
- the **worker** gives up user, limits, file system and system calls, and only then sees the code.

Lines written to the control socket: `ready` | `failed <why>` (worker, before any code runs),
`done <exit> <reason>`.
"""

import ctypes
import io
import os
import resource
import select
import sys
import time

SIGKILL, SIGSTOP = 9, 19
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_KEEPCAPS, PR_SET_SECCOMP = 1, 4, 8, 22
PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 36, 38
SYS_LANDLOCK_RESTRICT_SELF = 446
CAP_DAC_READ_SEARCH = 1 << 2
ONLY_AST = 0x400  # ast.PyCF_ONLY_AST; importing ast would cost milliseconds
SETUP_FAILED = 125


def read_job(fd: int = 0) -> dict:
    """The job as {key: [words]}, the blobs as bytes, rlimits as [(resource, soft, hard)]."""
    data = b""
    while chunk := os.read(fd, 1 << 20):
        data += chunk
    head, _, blob = data.partition(b"\n\n")
    job: dict = {"rlimits": []}
    for line in os.fsdecode(head).split("\n"):
        key, *words = line.split(" ")
        if key == "rlimit":
            job["rlimits"].append(tuple(map(int, words)))
        else:
            job[key] = words
    for key in ("bpf", "stdin", "code"):
        end = int(job[key][0])
        job[key], blob = blob[:end], blob[end:]
    return job


def checked(value: int, what: str) -> None:
    """Raise OSError when a system call returned `value` < 0; `what` names it."""
    if value < 0:
        raise OSError(ctypes.get_errno(), f"{what}: {os.strerror(ctypes.get_errno())}")


def drop_user(libc: ctypes.CDLL, uids: list, keep_read: bool) -> int | None:
    """Become the first of `uids` that this user namespace knows and give up all capabilities.

    Returns it or None.

    With `keep_read` CAP_DAC_READ_SEARCH stays: the interpreter lies in a directory that others may
    not enter (a root-owned home), and Landlock, not the mode bits, says what can be read.
    """
    chosen = None
    for uid in uids:
        checked(libc.prctl(PR_SET_KEEPCAPS, 1, 0, 0, 0), "keepcaps")
        try:
            os.setgroups([])
            os.setresgid(uid, uid, uid)
            os.setresuid(uid, uid, uid)
        except OSError:
            # not mapped here, or no CAP_SETUID: the next one; with none left, the user we are
            continue
        chosen = uid
        break
    keep = CAP_DAC_READ_SEARCH if keep_read and chosen is not None else 0
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    checked(libc.capset(header, (ctypes.c_uint32 * 6)(keep, keep, 0, 0, 0, 0)), "capset")
    return chosen


def restrict(libc: ctypes.CDLL, job: dict, supervisor: int) -> None:
    """All restrictions, ordered so that none stands in the way of the next.

    Raises OSError; no code has run then.
    """
    os.setsid()
    if job["proc"] == ["1"]:
        checked(libc.prctl(PR_SET_DUMPABLE, 1, 0, 0, 0), "dumpable")  # or the next file is root's
        with open("/proc/self/oom_score_adj", "w") as score:
            score.write(
                "1000"
            )  # short of memory, the kernel takes this process and not the trainer
    stdin = os.memfd_create("stdin")
    os.write(stdin, job["stdin"])
    os.lseek(stdin, 0, os.SEEK_SET)
    os.dup2(stdin, 0)
    os.chdir(" ".join(job["work"]))

    uids = [int(u) for u in job["uids"]]
    chosen = drop_user(libc, uids, job["keep_read"] == ["1"]) if job["drop"] == ["1"] else None
    own, shared = map(int, job["nproc"])  # a user id of our own can be counted exactly
    for which, soft, hard in job["rlimits"]:
        resource.setrlimit(which, (soft, hard))
    count = own if chosen is not None and chosen == uids[0] else shared
    resource.setrlimit(resource.RLIMIT_NPROC, (count, count))

    checked(libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "no_new_privs")
    if "ruleset" in job:
        checked(libc.syscall(SYS_LANDLOCK_RESTRICT_SELF, int(job["ruleset"][0]), 0), "landlock")
    checked(
        libc.prctl(PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0), "pdeathsig"
    )  # after setresuid, which clears it
    if os.getppid() != supervisor:
        raise OSError("the supervisor is gone")


def seal(libc: ctypes.CDLL, job: dict, control: int) -> None:
    """The last two steps.

    Say that all is in place, drop every descriptor but 0-2, and load the system-call filter.
    """
    bpf = job["bpf"]
    if bpf:
        pid = os.getpid()
        bpf = bpf.replace(
            b"\xfe\xca\xad\xde", pid.to_bytes(4, "little")
        )  # the filter lets us signal ourselves only
        code = ctypes.create_string_buffer(bpf, len(bpf))

        class Program(ctypes.Structure):  # struct sock_fprog
            _fields_ = [("len", ctypes.c_ushort), ("filter", ctypes.c_void_p)]

        program = Program(len(bpf) // 8, ctypes.addressof(code))
        # Loaded before `ready` is said: write and close are in the filter, so a failure can still
        # be told.
        checked(libc.prctl(PR_SET_SECCOMP, 2, ctypes.byref(program), 0, 0), "seccomp")
    os.write(control, b"ready\n")
    os.closerange(3, 4096)


class Output(io.FileIO):
    """fd 1, remembering whether anything was written to it."""

    used = False

    def write(self, data) -> int:  # type: ignore[no-untyped-def]
        """Write as FileIO does, and remember it."""
        self.used = True
        return super().write(data)


def run(code: str, show_last: bool) -> int:
    """Execute `code` as `__main__`; → exit status.

    With `show_last`, a last expression is shown if nothing was printed.
    """
    main = type(sys)("__main__")
    main.__dict__["__builtins__"] = __builtins__
    sys.modules["__main__"] = main
    sys.argv = ["<python>"]
    raw = Output(1, "wb", closefd=False)
    sys.stdout = io.TextIOWrapper(io.BufferedWriter(raw), "utf-8", "backslashreplace")
    out, show_error = sys.stdout, sys.__excepthook__
    try:
        tree = compile(code, "<python>", "exec", ONLY_AST)
        last = tree.body[-1] if show_last and tree.body else None
        if last is not None and type(last).__name__ == "Expr":
            tree.body.pop()
            exec(compile(tree, "<python>", "exec"), main.__dict__)
            import _ast  # built in

            value = eval(compile(_ast.Expression(last.value), "<python>", "eval"), main.__dict__)
            out.flush()
            if value is not None and not raw.used:
                out.write(repr(value) + "\n")
        else:
            exec(compile(tree, "<python>", "exec"), main.__dict__)
    except SystemExit as stop:
        if stop.code is None or isinstance(stop.code, int):
            return stop.code or 0
        print(stop.code, file=sys.stderr)
        return 1
    except BaseException as error:
        out.flush()  # what was printed before the error comes first
        trace = error.__traceback__.tb_next if error.__traceback__ else None  # without our frame
        show_error(type(error), error.with_traceback(trace), trace)
        return 1
    return 0


def descendants(root: int) -> list:
    """Process ids below `root`, from /proc/<pid>/stat."""
    children: dict = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                with open(f"/proc/{name}/stat", "rb") as file:
                    parent = int(file.read().rpartition(b")")[2].split()[1])
            except (FileNotFoundError, ProcessLookupError):
                continue  # gone meanwhile
            children.setdefault(parent, []).append(int(name))
    found, queue = [], [root]
    while queue:
        below = children.get(queue.pop(), [])
        found += below
        queue += below
    return found


def send(pid: int, number: int) -> None:
    """Send a signal to a process that may be gone already."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return  # gone meanwhile


def sweep() -> None:
    """Kill and reap everything below this process.

    A fork bomb is first stopped as a whole, so that it cannot outrun us.
    """
    stopped: set = set()
    while True:
        try:
            if os.waitpid(-1, os.WNOHANG)[0]:
                continue
        except ChildProcessError:
            return  # no child left: orphans come to us, so there is no descendant either
        fresh = set(descendants(os.getpid())) - stopped
        for pid in fresh:
            send(pid, SIGSTOP)
        if not fresh:
            for pid in stopped:
                send(pid, SIGKILL)
            stopped = set()
            time.sleep(0.001)
        stopped |= fresh


def supervise(worker: int, job: dict, control: int) -> None:
    """Wait for the worker to end, the wall clock, or the caller to hang up; leave nothing behind.

    report.
    """
    waiting = select.poll()
    waiting.register(os.pidfd_open(worker), select.POLLIN)
    waiting.register(control, select.POLLIN)
    ready = [fd for fd, _ in waiting.poll(float(job["wall"][0]) * 1000)]
    reason = "stopped" if control in ready else "exited" if ready else "wall"
    if reason != "exited":
        os.kill(worker, SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(worker, 0)[1])
    if job["proc"] == ["1"]:
        sweep()  # without /proc we are in a process namespace of our own, which ends with us
    os.write(control, b"done %d %s\n" % (status, reason.encode()))


def main() -> None:
    """The sandbox's child process: it reads its job, shuts itself in and runs the program."""
    job = read_job()
    control = int(job["control"][0])
    libc = ctypes.CDLL(None, use_errno=True)
    checked(libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0), "subreaper")
    checked(
        libc.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0), "dumpable"
    )  # nobody reads the supervisor's memory
    supervisor = os.getpid()
    worker = os.fork()
    if worker:
        supervise(worker, job, control)
        os._exit(0)
    try:
        restrict(libc, job, supervisor)
        seal(libc, job, control)
    except BaseException as error:
        os.write(control, b"failed " + repr(error).encode().replace(b"\n", b" ") + b"\n")
        os._exit(SETUP_FAILED)
    status = run(job["code"].decode(), job["show_last"] == ["1"])
    if "threading" in sys.modules:
        sys.exit(status)  # let Python join the threads and run atexit
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status & 0xFF)


main()
