"""Limits: time, memory, files, processes and output are bounded, and nothing is left behind."""

import os
import subprocess
import sys
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import appo
from appo.tools.sandbox import SandboxLimits, run_python
from appo.tools.sandbox.proc import tree


def name_me(name):
    """Code that gives its process (and the children it forks) a name that the test can look for."""
    return f"import ctypes, os, time\nctypes.CDLL(None).prctl(15, b'{name}', 0, 0, 0)\n"


@pytest.fixture
def name():
    return f"t-{uuid.uuid4().hex[:12]}"


def test_four_gigabytes(attack, boxed):
    attack("import mmap\nx = mmap.mmap(-1, 4 << 30)\nprint('ESCAPED')", "4 GB of address space")
    assert "MemoryError" in boxed("x = bytearray(4 << 30)").stderr


def test_memory_of_many_processes(boxed):
    code = "import os, time\nfor _ in range(3): os.fork()\nx = b'x' * (100 << 20)\ntime.sleep(5)"
    assert boxed(code, memory_mb=256).reason == "memory"


def test_endless_loop(bare, boxed):
    code = "while True: pass"
    with pytest.raises(subprocess.TimeoutExpired):
        bare(code, timeout=1.0)
    started = time.monotonic()
    result = boxed(code, wall_s=0.5)
    assert result.timed_out and result.reason == "wall" and result.exit == -9
    assert time.monotonic() - started < 4


def test_endless_loop_that_ignores_signals(boxed):
    code = (
        "import signal\nfor n in (1, 2, 15, 24): signal.signal(n, signal.SIG_IGN)\nwhile True: pass"
    )
    assert boxed(code, wall_s=0.5).timed_out


def test_cpu_time(boxed):
    result = boxed("while True: pass", cpu_s=1, wall_s=20)
    assert result.timed_out and result.reason == "cpu"


def test_sleeping_is_bounded_by_the_wall_clock(boxed):
    assert boxed("import time\ntime.sleep(30)", wall_s=0.3).reason == "wall"


def test_big_file(attack):
    result = attack(
        "f = open('big', 'wb')\nf.seek(200 << 20)\nf.write(b'x')\nf.flush()\nprint('ESCAPED')"
    )
    assert "File too large" in result.stderr or "No space" in result.stderr


def test_many_files(boxed):
    code = "for i in range(400): open(str(i), 'wb').write(bytes(1 << 20) + b'x')\nimport time\ntime.sleep(5)"
    result = boxed(code)
    assert result.reason == "disk" or "No space" in result.stderr, result


def test_setsid_orphan_holds_the_pipe(bare, boxed, name, alive):
    code = name_me(name) + (
        "if os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0: time.sleep(3)\n    os._exit(0)\n"
        "os.wait()\nprint('done', flush=True)"
    )
    with pytest.raises(subprocess.TimeoutExpired):
        bare(code.replace(name, "control"), timeout=1.5)  # hangs on a pipe that the orphan holds
    started = time.monotonic()
    result = boxed(code.replace("sleep(3)", "sleep(60)"))
    assert result.stdout == "done\n" and result.exit == 0
    assert time.monotonic() - started < 3
    assert alive(name) == 0


def test_fork_bomb(bare, boxed, name, alive):
    bounded = name_me(name) + (
        "pids = []\nfor _ in range(40):\n    pid = os.fork()\n    if pid == 0:\n        time.sleep(0.5)\n"
        "        os._exit(0)\n    pids.append(pid)\ntime.sleep(0.3)\nprint('ESCAPED')\n"
    )
    assert "ESCAPED" in bare(bounded)
    result = boxed(bounded, processes=8)
    assert "ESCAPED" not in result.stdout, result
    started = time.monotonic()
    result = boxed(
        name_me(name) + "while True:\n    try: os.fork()\n    except OSError: pass",
        processes=8,
        wall_s=2.0,
    )
    assert (
        result.reason in ("processes", "wall", "cpu", "memory") and time.monotonic() - started < 15
    )
    assert alive(name) == 0


def test_output_flood(bare, boxed):
    assert len(bare("print('x' * 3_000_000)")) > 3_000_000
    result = boxed("while True: print('x' * 1000)")
    assert result.truncated and len(result.stdout) == 65536 and result.reason == "output"
    result = boxed("import sys\nprint('y' * 100_000)\nsys.stderr.write('z' * 100_000)")
    assert result.exit == 0 and result.truncated
    assert len(result.stdout) == len(result.stderr) == 65536


def test_killed_process_tree_on_timeout(boxed, name, alive):
    code = (
        name_me(name)
        + "for _ in range(3): os.fork()\nos.getpgid(0) == os.getpid() or os.setsid()\ntime.sleep(60)"
    )
    assert boxed(code, wall_s=0.5).timed_out
    assert alive(name) == 0


def test_nothing_outlives_the_caller(level, name, named, alive, tmp_path):
    """Killed in the middle of a call, the caller takes the sandbox with it."""
    inner = name_me(name) + "if os.fork() == 0: os.setsid()\ntime.sleep(60)"
    outer = (
        "from appo.tools.sandbox import run_python, SandboxLimits\n"
        f"run_python({inner!r}, level={level!r}, limits=SandboxLimits(wall_s=30.0))"
    )
    root = str(Path(appo.__file__).parents[1])
    caller = subprocess.Popen(
        [sys.executable, "-c", outer],
        env={**os.environ, "PYTHONPATH": root, "TMPDIR": str(tmp_path)},
    )
    until = time.monotonic() + 10
    while len(named(name)) < 2 and time.monotonic() < until:
        time.sleep(0.02)
    assert len(named(name)) == 2
    caller.kill()
    caller.wait()
    assert alive(name) == 0


def resident_mb():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def open_files():
    return len(os.listdir("/proc/self/fd"))


def test_two_hundred_runs_leave_nothing(level, name, alive):
    def once(i):
        return run_python(f"{name_me(name)}print({i})", level=level, limits=SandboxLimits()).stdout

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(once, range(20)))  # slots, caches and threads are made
        before = (open_files(), threading.active_count())
        memory, children = resident_mb(), tree(os.getpid())
        assert list(pool.map(once, range(200))) == [f"{i}\n" for i in range(200)]
        assert (open_files(), threading.active_count()) == before
        assert resident_mb() - memory < 8
    assert alive(name) == 0
    assert tree(os.getpid()) == children  # nor a zombie
