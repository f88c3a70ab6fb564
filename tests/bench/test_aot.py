"""GPU kernels compile for four GPUs that are not here, within their budgets; and the gate can fail.

Here the default configuration of each kernel; `python bench/gpu/aot_report.py` compiles every shipped one (a minute or two).
The report runs in a process of its own, because compiled and interpreted Triton kernels cannot share one.
"""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "bench/gpu/aot_report.py"
ARCHS = ("sm_80", "sm_90", "sm_100", "gfx942")
PRODUCTS = ("partial", "dlogits", "attend", "attention")  # must run on tensor cores

# Registers per thread. A product owns a multiprocessor alone and may use all there are; the others hide latency by running
# side by side, and one that is not listed must leave room for three blocks of four warps.
REGISTERS = {"partial": 255, "dlogits": 255, "rowgrads": 200, "attend": 255, "attention": 255}
REGISTERS_AMD = {"attention": 512}  # of each lane, with four waves of 64
FEW = 168

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)


def report(*arguments, path=None, **env):
    """The script, finished, in a process without the interpreter unless `env` says otherwise."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | env
    if path is not None:
        environment["PYTHONPATH"] = str(path)
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


@pytest.mark.parametrize("arch", ARCHS)
def test_budgets_of_shipped_kernels(arch, tmp_path):
    file = tmp_path / "aot.json"
    done = report("--quick", "--arch", arch, "--json", file)
    assert done.returncode == 0, done.stdout + done.stderr
    document = json.loads(file.read_text())
    assert {"machine", "date", "command"} <= set(document)
    rows = document["cases"]
    assert len({row["name"] for row in rows}) == len(rows) > 0
    most = REGISTERS | REGISTERS_AMD if arch.startswith("gfx") else REGISTERS
    for row in rows:
        assert (row["stack"], row["spills"], row["problems"]) == (0, 0, []), row
        assert row["shared"] <= row["shared_limit"], row
        assert row["registers"] <= most.get(row["name"].split()[0], FEW), row
    for kernel in PRODUCTS:
        found = [row for row in rows if kernel in row["name"]]
        assert found, f"no case of {kernel} for {arch}"
        assert all(row["tensor_core"] for row in found), found


TOY = """
import triton
import triton.language as tl
from appo._kernels.common.gpu.aot import AotCase

@triton.jit
def product(a_ptr, b_ptr, c_ptr, H, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, WIDE: tl.constexpr):
    m, n, k = tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, BK)
    total = tl.zeros((BM, BN), tl.float32)
    for start in range(0, H, BK):
        a = tl.load(a_ptr + m[:, None] * H + start + k[None, :])
        b = tl.load(b_ptr + n[:, None] * H + start + k[None, :])
        if WIDE:  # exact float32 products of bf16 inputs: right, and many times slower
            total = tl.dot(a.to(tl.float32), b.to(tl.float32).T, total, input_precision="ieee")
        else:
            total = tl.dot(a, b.T, total)
    tl.store(c_ptr + m, tl.max(tl.exp2(total), 1))

@triton.jit(do_not_specialize=["N"])
def fixed(c_ptr, N):
    tl.store(c_ptr, N)

def case(name, m, n, k=64, wide=False, warps=4, stages=3, dtype="*bf16", extra=()):
    signature = {"a_ptr": dtype, "b_ptr": dtype, "c_ptr": "*fp32", "H": "i32"}
    constants = {"BM": m, "BN": n, "BK": k, "WIDE": wide}
    signature |= {key: "constexpr" for key in constants} | dict(extra)
    return AotCase(name, product, signature, constants, warps, stages, ("a_ptr", "b_ptr", "H"))

def aot_cases(arch):
    return [
        case("good", 64, 64),
        case("spilling", 128, 256),
        case("scalar", 32, 32, k=32, wide=True),
        case("exact float32", 32, 32, k=32, wide=True, dtype="*fp32"),
        case("too much shared memory", 128, 128, warps=8, stages=8),
        case("misspelt", 64, 64, extra={"G": "i32"}),
        AotCase("false promise", fixed, {"c_ptr": "*fp32", "N": "i32"}, {}, divisible=("N",)),
    ]
"""


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """The folder of the module above, for PYTHONPATH."""
    folder = tmp_path_factory.mktemp("toy")
    (folder / "toy_kernels.py").write_text(TOY)
    return folder


@pytest.fixture(scope="module")
def toy_report(toy):
    """The finished process and its rows by name; one run for all the tests that only read."""
    file = toy / "toy.json"
    done = report("--module", "toy_kernels", "--arch", "sm_80", "--json", file, path=toy)
    return done, {row["name"]: row for row in json.loads(file.read_text())["cases"]}


def test_good_kernels_pass(toy_report):
    _, rows = toy_report
    good, exact = rows["good"], rows["exact float32"]
    assert good["problems"] == exact["problems"] == []
    assert (good["stack"], good["warps"]) == (0, 4)
    assert min(good["tensor_core"], good["async_copies"], good["registers"]) > 0
    assert exact["tensor_core"] == 0  # right for float32 inputs


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("spilling", "bytes of stack"),
        ("scalar", "tl.dot without a tensor-core instruction"),
        ("too much shared memory", "bytes of shared memory, the limit is 166,912"),
        ("misspelt", r"does not compile: ValueError: .*has \['G'\]"),
    ],
)
def test_the_gate_fails(toy_report, name, problem):
    done, rows = toy_report
    assert done.returncode == 1, done.stdout
    assert re.search(problem, " ".join(rows[name]["problems"])), rows[name]
    assert f"sm_80 {name}: " in done.stdout
    assert "7 kernels compiled, 5 over budget" in done.stdout


def test_quick_takes_the_first_case_of_each_kernel(toy, tmp_path):
    file = tmp_path / "quick.json"
    report("--module", "toy_kernels", "--arch", "sm_80", "--quick", "--json", file, path=toy)
    rows = json.loads(file.read_text())["cases"]
    assert [row["name"] for row in rows] == ["good", "false promise"]


def test_the_page_is_rewritten_between_its_marks(toy, tmp_path):
    page = tmp_path / "page.md"
    page.write_text("above\n<!-- aot-table -->\nstale\n<!-- /aot-table -->\nbelow\n")
    arguments = ("--module", "toy_kernels", "--arch", "sm_80", "--only", "good", "--markdown", page)
    assert report(*arguments, path=toy).returncode == 0
    first = page.read_text()
    assert first.startswith("above\n<!-- aot-table -->\n")
    assert first.endswith("\n<!-- /aot-table -->\nbelow\n")
    assert "| good | sm_80 | 4 | 3 |" in first
    assert "stale" not in first
    assert report(*arguments, path=toy).returncode == 0
    assert page.read_text() == first


def test_a_report_that_cannot_be_made_says_why(toy, tmp_path):
    page = tmp_path / "page.md"
    page.write_text("no marks\n")
    for arguments, env, why in [
        ((), {"TRITON_INTERPRET": "1"}, "TRITON_INTERPRET is set"),
        (("--markdown", page), {}, "has no <!-- aot-table -->"),
        (("--module", "toy_kernels", "--only", "nothing"), {}, "no case"),
        (("--arch", "sm_999"), {}, "invalid choice"),
    ]:
        done = report(*arguments, path=toy, **env)
        assert done.returncode == 2, done.stdout + done.stderr
        assert why in done.stderr
        assert "Traceback" not in done.stderr
