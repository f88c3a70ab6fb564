"""Other processes: they can be neither read, nor signalled, traced, slowed down nor joined by new privileges."""

import os

import pytest

LIBC = "import ctypes, os, time\nlibc = ctypes.CDLL(None, use_errno=True)\n"


def test_our_environment(attack, monkeypatch):
    monkeypatch.setenv("APPO_TEST_KEY", "hunter2")
    attack("import os\nif 'hunter2' in os.environ.values(): print('ESCAPED')")


def test_environment_of_another_process(attack, victim):
    attack(f"if b'hunter2' in open('/proc/{victim.pid}/environ', 'rb').read(): print('ESCAPED')")


def test_environment_of_this_process(attack):
    attack(f"if open('/proc/{os.getpid()}/environ', 'rb').read(): print('ESCAPED')")


def test_our_file_descriptors(boxed, tmp_path):
    with open(tmp_path / "open", "w") as file:
        os.set_inheritable(file.fileno(), True)
        code = "import os\nfor fd in range(3, 256):\n    try: os.fstat(fd)\n    except OSError: continue\n    print(fd)"
        assert boxed(code).stdout == ""


def test_kill(boxed, bare, victim):
    code = f"import os\nprint('TRIED', flush=True)\nos.kill({victim.pid}, 15)\nprint('ESCAPED')"
    result = boxed(code)
    assert "TRIED" in result.stdout and "ESCAPED" not in result.stdout
    assert victim.poll() is None
    assert "ESCAPED" in bare(code)
    assert victim.wait(5) == -15


@pytest.mark.parametrize(
    "call",
    [
        "libc.tgkill({pid}, {pid}, 0)",
        "libc.sigqueue({pid}, 0, None)",
        "libc.syscall(424, libc.syscall(434, {pid}, 0), 0, None, 0)",  # pidfd_open, pidfd_send_signal
    ],
)
def test_other_ways_to_signal(attack, victim, call):
    needs = "this call in the C library" if "tgkill" in call else None
    attack(f"{LIBC}if {call.format(pid=victim.pid)} == 0: print('ESCAPED')", needs)


def test_signal_by_file_owner(attack, victim):
    """F_SETOWN + O_ASYNC lets the kernel send a signal in our name."""
    attack(f"import fcntl\nfcntl.fcntl(0, fcntl.F_SETOWN, {victim.pid})\nprint('ESCAPED')")


def test_kill_the_supervisor(boxed):
    result = boxed("import os\nos.kill(os.getppid(), 9)")
    assert result.exit == 1 and "PermissionError" in result.stderr, result


def test_ptrace(attack, victim):
    attack(
        f"{LIBC}if libc.ptrace(16, {victim.pid}, None, None) == 0: print('ESCAPED')\n"
        f"time.sleep(0.1)\nlibc.ptrace(17, {victim.pid}, None, None)",
        "ptrace (see /proc/sys/kernel/yama/ptrace_scope)",
    )
    assert victim.poll() is None


def test_read_memory(attack, victim):
    attack(
        f"{LIBC}import re\nlocal = ctypes.create_string_buffer(8)\n"
        f"text = open('/proc/{victim.pid}/maps').read() if os.path.exists('/proc/{victim.pid}/maps') else '10-0'\n"
        "class Vec(ctypes.Structure): _fields_ = [('base', ctypes.c_void_p), ('len', ctypes.c_size_t)]\n"
        "here, there = Vec(ctypes.addressof(local), 8), Vec(int(text.split('-')[0], 16), 8)\n"
        f"n = libc.process_vm_readv({victim.pid}, ctypes.byref(here), 1, ctypes.byref(there), 1, 0)\n"
        "if n == 8: print('ESCAPED')",
        "process_vm_readv (see /proc/sys/kernel/yama/ptrace_scope)",
    )


def test_priority_and_limits_of_others(attack, victim):
    attack(f"import os\nos.setpriority(os.PRIO_PROCESS, {victim.pid}, 5)\nprint('ESCAPED')")
    attack(
        f"import resource\nresource.prlimit({victim.pid}, resource.RLIMIT_CORE, (0, 0))\nprint('ESCAPED')"
    )


def test_user_namespace(attack):
    attack(f"{LIBC}if libc.unshare(0x10000000) == 0: print('ESCAPED')", "user namespaces")


def test_user_namespace_by_clone(attack):
    """clone(CLONE_NEWUSER | SIGCHLD): the number is that of x86_64."""
    if os.uname().machine != "x86_64":
        pytest.skip("written for x86_64")
    attack(
        f"{LIBC}pid = libc.syscall(56, 0x10000000 | 17, 0, 0, 0, 0)\n"
        "if pid == 0: os._exit(0)\nif pid > 0: print('ESCAPED')",
        "user namespaces",
    )


@pytest.mark.parametrize(
    "call", ["libc.syscall(425, 4, buffer)", "libc.memfd_create(b'x', 0)", "libc.inotify_init()"]
)
def test_calls_that_programs_need_not(attack, call):
    """io_uring_setup, memfd_create (memory beyond the limit), inotify (sees what others do with files)."""
    attack(
        f"{LIBC}buffer = ctypes.create_string_buffer(256)\nif {call} >= 0: print('ESCAPED')",
        "io_uring" if "425" in call else None,
    )


def test_new_programs(attack):
    attack("import subprocess\nsubprocess.run(['/bin/sh', '-c', 'echo ESCAPED'])")


def test_ld_preload(boxed, bare, monkeypatch):
    """A library that our environment asks every program to load is loaded by the plain child and not by the boxed."""
    monkeypatch.setenv("LD_PRELOAD", "libresolv.so.2")
    code = "import ctypes\nprint('TRIED')\nctypes.CDLL('libresolv.so.2', mode=4)\nprint('ESCAPED')"
    if "ESCAPED" not in bare(code):
        pytest.skip("no libresolv.so.2 to preload on this C library")
    result = boxed(code)
    assert "TRIED" in result.stdout and "ESCAPED" not in result.stdout, result
