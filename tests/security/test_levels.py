"""Which level is chosen, and that no code runs when the walls are not up."""

import json
import os
import re
import struct
import subprocess
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from appo.errors import ConfigError, SandboxError, ToolError
from appo.tools.sandbox import (
    SandboxLimits,
    bwrap,
    choose_level,
    landlock,
    levels,
    probe,
    run_python,
    seccomp,
)
from appo.tools.sandbox.levels import Probe


def test_probe_says_what_it_tried(level):
    found = probe(level)
    assert found.details.pop("benign") == "done"
    assert len(found.details) == 6 and "done" not in found.details.values()


def test_probe_control():
    """The very attempts of the probe succeed where nothing isolates: the probe can tell the difference."""
    found = probe("rlimit")
    assert set(found.details.values()) == {"done"} and "no isolation" in found.reason


def test_rlimit_needs_allow_unsafe():
    with pytest.raises(SandboxError, match="allow_unsafe: true"):
        choose_level("rlimit")
    assert choose_level("rlimit", allow_unsafe=True).level == "rlimit"


def test_unknown_level():
    with pytest.raises(SandboxError, match="'docker'.*strict, landlock"):
        choose_level("docker")


def _with(monkeypatch, **works):
    found = {k: Probe(k, v, "here" if v else f"no {k} here") for k, v in works.items()}
    monkeypatch.setattr(levels, "_probes", found)


def test_auto_takes_the_best_that_works(monkeypatch):
    _with(monkeypatch, strict=True, landlock=True)
    assert choose_level("auto").level == "strict"
    _with(monkeypatch, strict=False, landlock=True)
    assert choose_level("auto", allow_unsafe=True).level == "landlock"


def test_auto_never_falls_to_rlimit(monkeypatch):
    _with(monkeypatch, strict=False, landlock=False, rlimit=True)
    with pytest.raises(SandboxError) as info:
        choose_level("auto", allow_unsafe=True)
    for part in ("no strict here", "no landlock here", "bubblewrap", "5.13", "allow_unsafe: true"):
        assert part in str(info.value)


def test_a_requested_level_is_not_replaced(monkeypatch):
    _with(monkeypatch, strict=False, landlock=True)
    with pytest.raises(SandboxError, match="strict: no strict here"):
        choose_level("strict")


def test_a_hole_is_found(monkeypatch):
    """A filter that lets sockets through makes the landlock level fail its probe."""
    if not probe("landlock").works:
        pytest.skip(probe("landlock").reason)
    from appo.tools.sandbox import job

    monkeypatch.setattr(job, "system_call_filter", lambda: b"")
    found = levels._probe("landlock")
    assert not found.works and "connect_unix" in found.reason


def test_no_code_runs_without_the_filter(level, monkeypatch, tmp_path):
    from appo.tools.sandbox import job

    monkeypatch.setattr(
        job, "system_call_filter", lambda: struct.pack("<HBBI", 0xFFFF, 0, 0, 0)
    )  # invalid
    tmp_path.chmod(0o777)
    with pytest.raises(ToolError, match="seccomp") as info:
        run_python(f"open({str(tmp_path / 'ran')!r}, 'w')", level=level)
    assert info.value.kind == "unavailable" and not (tmp_path / "ran").exists()


def test_limits_are_checked():
    for name in ("wall_s", "cpu_s", "output_bytes", "file_mb", "processes", "memory_mb"):
        with pytest.raises(ConfigError, match=f"tools.python.limits.{name}"):
            SandboxLimits(**{name: 0})
    with pytest.raises(ConfigError, match="64 or more"):
        SandboxLimits(memory_mb=16)


def test_system_call_numbers_match_the_kernel_headers():
    header = Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h")
    if not header.exists():
        pytest.skip("no kernel headers for x86_64")
    known = {n: int(v) for n, v in re.findall(r"#define __NR_(\w+) (\d+)", header.read_text())}
    conditional = {name: numbers for name, (numbers, _) in seccomp.CONDITIONAL.items()}
    for name, (x86, _) in {**seccomp.ALLOWED, **conditional}.items():
        if x86 is not None:
            assert known[name] == x86, name


def test_system_call_numbers_of_aarch64_match_the_kernel_headers():
    header = Path("/usr/include/asm-generic/unistd.h")
    if not header.exists():
        pytest.skip("no kernel headers")
    known = {
        n: int(v) for n, v in re.findall(r"#define __NR3?2?6?4?_?_?(\w+) (\d+)", header.read_text())
    }
    aliases = {
        "fstat": "fstat",
        "lseek": "lseek",
        "newfstatat": "fstatat",
        "fadvise64": "fadvise64",
    }
    conditional = {name: numbers for name, (numbers, _) in seccomp.CONDITIONAL.items()}
    checked = 0
    for name, (_, arm) in {**seccomp.ALLOWED, **conditional}.items():
        number = known.get(name, known.get(aliases.get(name, name)))
        if arm is not None and number is not None:
            assert number == arm, name
            checked += 1
    assert checked > 90


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_filter_is_well_formed(machine):
    """Instructions of 8 bytes, all jumps land inside, every path ends in a return."""
    data = seccomp.program(machine)
    ops = [struct.unpack_from("<HBBI", data, i) for i in range(0, len(data), 8)]
    assert len(ops) < 4096
    for at, (code, jt, jf, _) in enumerate(ops):
        if code in (seccomp.BPF_JEQ, seccomp.BPF_JGE, seccomp.BPF_JSET):
            assert at + 1 + max(jt, jf) < len(ops)
    assert ops[-1][0] == seccomp.BPF_RET


def _decide(machine, number, *args):
    """Interpret the filter: what it answers to a call."""
    data = seccomp.program(machine)
    words = {0: number, 4: seccomp.AUDIT_ARCH[machine]}
    words.update({16 + 8 * i: a for i, a in enumerate(args)})
    at = value = 0
    while True:
        code, jt, jf, k = struct.unpack_from("<HBBI", data, at * 8)
        at += 1
        if code == seccomp.BPF_LD_W_ABS:
            value = words.get(k, 0)
        elif code == seccomp.BPF_AND:
            value &= k
        elif code == seccomp.BPF_RET:
            return k
        else:
            hit = {0x15: value == k, 0x35: value >= k, 0x45: bool(value & k)}[code]
            at += jt if hit else jf


def test_filter_decisions_on_both_machines():
    allow, eperm, enosys = 0x7FFF0000, 0x50001, 0x50026
    for machine, column in (("x86_64", 0), ("aarch64", 1)):
        for numbers in seccomp.ALLOWED.values():
            if numbers[column] is not None:
                assert _decide(machine, numbers[column]) == allow
        named = {k: v[0][column] for k, v in seccomp.CONDITIONAL.items()}
        assert _decide(machine, named["fcntl"], 0, 3) == allow
        assert _decide(machine, named["fcntl"], 0, 8) == eperm  # F_SETOWN
        assert _decide(machine, named["clone"], 0x01200011) == allow
        assert _decide(machine, named["clone"], 0x10000011) == eperm  # CLONE_NEWUSER
        assert _decide(machine, named["openat"], 0, 0, 0o1101) == allow  # O_WRONLY|O_CREAT|O_TRUNC
        assert _decide(machine, named["openat"], 0, 0, 0o1000) == eperm  # O_RDONLY|O_TRUNC
        assert _decide(machine, named["socketpair"], 1, 0x80001) == allow
        assert _decide(machine, named["socketpair"], 1, 2) == eperm  # datagram
        assert _decide(machine, named["socketpair"], 2, 1) == eperm  # AF_INET
        assert _decide(machine, named["kill"], seccomp.SELF) == allow
        assert _decide(machine, named["kill"], 1) == eperm
        assert _decide(machine, 435) == enosys  # clone3
        assert _decide(machine, 460) == enosys
        assert _decide(machine, 425) == eperm  # io_uring_setup
    assert _decide("x86_64", 41) == _decide("aarch64", 198) == eperm  # socket
    assert _decide("x86_64", 59) == _decide("aarch64", 221) == eperm  # execve
    assert _decide("x86_64", 0x40000000) == enosys  # x32


def test_landlock_rights_by_abi():
    counts = [bin(landlock.handled(v)).count("1") for v in range(1, 8)]
    assert counts == [13, 14, 15, 15, 16, 16, 16]


def test_bwrap_command():
    if bwrap.path() is None:
        pytest.skip("bubblewrap is not installed")
    args = bwrap.arguments(16)
    for flag in ("--unshare-all", "--die-with-parent", "--new-session", "--clearenv"):
        assert flag in args
    assert "--proc" not in args and os.path.expanduser("~") not in args


class _Fusion(BaseHTTPRequestHandler):
    """A server that speaks the wire format, with an answer made up here."""

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        done = subprocess.run(["echo", "42"], capture_output=True, text=True)
        run = {"status": "Finished", "return_code": 0, "stdout": done.stdout, "stderr": ""}
        if "sleep" in body["code"]:
            run = {"status": "TimeLimitExceeded", "return_code": None, "stdout": "", "stderr": ""}
        answer = {"status": "Success", "message": "", "run_result": run}
        if "broken" in body["code"]:
            answer = {"status": "SandboxError", "message": "out of machines", "run_result": None}
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(answer).encode())

    def log_message(self, *args):
        return


def test_remote(monkeypatch):
    from appo.tools.sandbox.remote import probe as probe_remote
    from appo.tools.sandbox.remote import run_remote

    monkeypatch.delenv("APPO_SANDBOX_URL", raising=False)
    assert not probe_remote()[0]
    with HTTPServer(("127.0.0.1", 0), _Fusion) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("APPO_SANDBOX_URL", f"http://127.0.0.1:{server.server_port}")
        assert probe_remote()[0]
        assert run_remote("sleep", SandboxLimits()).timed_out
        with pytest.raises(ToolError, match="out of machines"):
            run_remote("broken", SandboxLimits())
        server.shutdown()
    with pytest.raises(ToolError) as info:
        run_remote("print(1)", SandboxLimits(wall_s=0.5))
    assert info.value.kind == "unavailable"
