"""Every attack is run twice: by a plain interpreter, where it must succeed (the live control), and in the sandbox.

An attack prints TRIED when it starts and ESCAPED when it got what it wanted.
"""

import os
import subprocess
import time
from pathlib import Path

import pytest

from appo.tools.sandbox import SandboxLimits, probe, run_python
from appo.tools.sandbox.files import interpreter


@pytest.fixture(params=["strict", "landlock"])
def level(request):
    """Each level that works on this machine; the others are skipped and say why."""
    found = probe(request.param)
    if not found.works:
        pytest.skip(f"level {request.param} does not work here: {found.reason}")
    return request.param


@pytest.fixture
def bare(tmp_path):
    """Run code by a plain interpreter: no sandbox, our environment. → stdout"""

    def run(code, timeout=20):
        done = subprocess.run(
            [interpreter(), "-I", "-S", "-B", "-c", code],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            timeout=timeout,
        )
        return done.stdout

    return run


@pytest.fixture
def boxed(level):
    def run(code, **limits):
        return run_python(code, level=level, limits=SandboxLimits(**{"wall_s": 10.0, **limits}))

    return run


@pytest.fixture
def attack(bare, boxed):
    """Assert that `code` gets through without the sandbox and not with it."""

    def run(code, control_needs=None):
        code = f"print('TRIED', flush=True)\n{code}"
        control = bare(code)
        if "ESCAPED" not in control and control_needs is not None:
            pytest.skip(f"the control needs {control_needs}: the attack does not work here anyway")
        assert "ESCAPED" in control, f"the attack is broken: {control}"
        result = boxed(code)
        assert "TRIED" in result.stdout, result
        assert "ESCAPED" not in result.stdout, result
        return result

    return run


@pytest.fixture
def victim():
    """A process of ours to attack, with a secret in its environment."""
    env = {"PATH": os.environ.get("PATH", ""), "VICTIM_SECRET": "hunter2"}
    code = "import time; time.sleep(60)"
    process = subprocess.Popen([interpreter(), "-I", "-S", "-c", code], env=env)
    time.sleep(0.05)
    yield process
    process.kill()
    process.wait()


@pytest.fixture
def named():
    """Ids of all processes on the machine that gave themselves a name (at most 15 characters)."""

    def find(name):
        found = []
        for comm in Path("/proc").glob("[0-9]*/comm"):
            try:
                if comm.read_text().strip() == name:
                    found.append(int(comm.parent.name))
            except (FileNotFoundError, ProcessLookupError):
                continue  # ended meanwhile
        return found

    return find


@pytest.fixture
def alive(named):
    """How many processes of that name are left; waits up to 2 s for the dying."""

    def count(name):
        until = time.monotonic() + 2.0
        while named(name) and time.monotonic() < until:
            time.sleep(0.02)
        return len(named(name))

    return count
