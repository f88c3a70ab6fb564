"""bench/gpu/suite.py as far as a machine without a GPU can show: arguments, skips, crashes, hangs, reports."""

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

BENCH = Path(__file__).parents[2] / "bench"
without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")


@pytest.fixture(scope="module")
def suite():
    from bench.gpu import suite

    return suite


def run(*arguments):
    command = [sys.executable, str(BENCH / "gpu" / "suite.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


@without_gpu
def test_without_a_device(tmp_path):
    """Says what is skipped and why, writes both reports without a figure, and ends well unless a device is required."""
    page, data = tmp_path / "gpu.md", tmp_path / "gpu.json"
    done = run("--quick", "--report", page, "--json", data)
    assert done.returncode == 0, done.stderr
    assert "No CUDA device: torch " in done.stdout
    assert "Skipped: tests, matrix, forward, cublas32, backward, peers." in done.stdout
    assert "no CUDA device, so no figure was measured" in page.read_text()
    assert "| ms |" not in page.read_text()
    document = json.loads(data.read_text())
    assert {"machine", "date", "command", "quick", "cases", "parts"} <= set(document)
    assert document["cases"] == []
    assert {part["status"] for part in document["parts"]} == {"skipped"}


@without_gpu
def test_a_required_device(tmp_path):
    data = tmp_path / "gpu.json"
    done = run("--require-gpu", "--only", "peers", "--only", "matrix", "--json", data)
    assert done.returncode == 2
    parts = json.loads(data.read_text())["parts"]
    assert [part["part"] for part in parts] == ["matrix", "peers"]  # in the order of the suite


@pytest.mark.parametrize(
    ("arguments", "why"),
    [(("--only", "nothing"), "invalid choice: 'nothing'"), (("--minutes", "0"), "--minutes is 0")],
)
def test_wrong_arguments(arguments, why):
    done = run(*arguments)
    assert done.returncode == 2
    assert why in done.stderr


@without_gpu
def test_nothing_is_timed_without_a_device(suite):
    from bench.gpu.timing import Stopwatch

    with pytest.raises(RuntimeError, match="nothing to measure"):
        Stopwatch()


PART = """
    import json, os, sys, time
    rows = open(sys.argv[sys.argv.index("--rows") + 1], "a")
    def write(**row):
        print(json.dumps(row), file=rows, flush=True)
    write(case="good", values={"ms": 1.25, "MiB": 3})
"""


def part(suite, tmp_path, body, limit=30.0):
    """A part of the suite whose script is PART with `body` behind it."""
    script = tmp_path / "part.py"
    script.write_text(textwrap.dedent(PART) + textwrap.dedent(body))
    return suite.run_part("matrix", quick=True, limit=limit, script=script)


def test_rows_of_a_part(suite, tmp_path):
    result = part(suite, tmp_path, "write(note='42 MHz')")
    assert (result.status, result.why) == ("ok", "")
    assert result.rows == [
        {"case": "good", "values": {"ms": 1.25, "MiB": 3}},
        {"note": "42 MHz"},
    ]


@pytest.mark.parametrize(
    ("body", "why"),
    [
        ("os.abort()", "exit code -6"),
        ("raise RuntimeError('illegal memory access')", "RuntimeError: illegal memory access"),
        ("write(case='bad', values={}, error='off by 1')", "1 of its rows report an error"),
        ("print('{\"case', end='', file=rows, flush=True); os._exit(3)", "exit code 3"),
    ],
)
def test_a_part_that_fails_keeps_its_rows(suite, tmp_path, body, why):
    result = part(suite, tmp_path, body)
    assert result.status == "failed"
    assert why in result.why
    assert result.rows[0]["case"] == "good"


def test_a_part_that_hangs_is_killed(suite, tmp_path, monkeypatch):
    monkeypatch.setattr(suite, "GRACE", 0.0)
    result = part(suite, tmp_path, "time.sleep(600)", limit=2.0)
    assert (result.status, result.why) == ("failed", "killed after 2 s")
    assert len(result.rows) == 1


def test_a_broken_peer_is_no_failure_of_ours(suite, tmp_path):
    result = part(suite, tmp_path, "write(case='peer', values={}, unavailable='out | of memory')")
    assert result.status == "ok"
    assert suite.table(result.rows) == [
        "| case | ms | MiB | remark |",
        "|---|---:|---:|---|",
        "| good | 1.25 | 3 |  |",
        "| peer |  |  | out \\| of memory |",
    ]


def test_one_failed_part_does_not_stop_the_others(suite, monkeypatch):
    def run_part(name, quick, limit):
        status = "failed" if name == "matrix" else "ok"
        return suite.Result(name, status, rows=[{"case": name, "values": {"s": limit}}])

    monkeypatch.setattr(suite, "run_part", run_part)
    results = suite.run_parts(["matrix", "forward", "peers"], quick=True, seconds=100.0)
    assert [r.status for r in results] == ["failed", "ok", "ok"]
    limits = [r.rows[0]["values"]["s"] for r in results]
    assert limits[0] == pytest.approx(100 * suite.PARTS["matrix"], rel=0.01)
    assert limits[-1] == pytest.approx(100, rel=0.01)  # the last may use all that is left
    (late,) = suite.run_parts(["peers"], quick=True, seconds=0.5)
    assert (late.status, late.why) == ("failed", "no time was left for it")


def test_results_of_pytest(suite, tmp_path):
    file = tmp_path / "test_toy.py"
    file.write_text(
        "import pytest\n"
        "pytestmark = pytest.mark.gpu\n"
        "def test_good(): pass\n"
        "def test_bad(): assert 1 == 2\n"
        "def test_absent(): pytest.skip('not here')\n"
    )
    result = suite.run_tests(60, "-p", "no:cacheprovider", str(file))
    assert result.status == "failed"
    assert result.rows[0]["values"] == {"tests": 3, "failure": 1, "error": 0, "skipped": 1}
    assert result.rows[1]["case"].endswith("::test_bad")
    assert "assert 1 == 2" in result.rows[1]["error"]
    file.write_text("def test_unmarked(): pass\n")
    assert suite.run_tests(60, str(file)).why == "no test is marked gpu"


def test_the_matrix_on_this_machine(suite, tmp_path, monkeypatch):
    """The comparison itself, with the backends of a CPU: accurate ones pass, a wrong one is told."""
    from bench.gpu import matrix as gpu_matrix
    from bench.gpu.rows import Rows

    rows = Rows(tmp_path / "rows")
    gpu_matrix.matrix(rows, quick=True, device="cpu", backends=("torch",))
    found = [json.loads(line) for line in rows.file.read_text().splitlines()]
    assert len(found) == 3 * (
        len(gpu_matrix.SMALL) + 2
    )  # one shape in three dtypes, each in three variants
    assert not [row for row in found if "error" in row]
    assert set(found[0]["values"]) == set(gpu_matrix.LIMITS)


def test_the_matrix_tells_what_is_wrong(suite, tmp_path, monkeypatch):
    from bench.gpu import matrix as gpu_matrix
    from bench.gpu.rows import Rows

    right = gpu_matrix.linear_logprob_entropy

    def wrong(*args, backend, **kwargs):
        out = right(*args, backend="torch", **kwargs)
        if backend == "broken":
            raise RuntimeError("no kernel image")
        return out._replace(entropy=out.entropy.detach() + 1e-3 + 0 * out.entropy)

    monkeypatch.setattr(gpu_matrix, "linear_logprob_entropy", wrong)
    monkeypatch.setattr(gpu_matrix, "SMALL", [gpu_matrix.ALL_DTYPES])
    rows = Rows(tmp_path / "rows")
    gpu_matrix.matrix(rows, quick=True, device="cpu", backends=("off", "broken"))
    found = [json.loads(line) for line in rows.file.read_text().splitlines()]
    assert found[1]["error"] == "RuntimeError: no kernel image"
    assert "entropy is off by 1.0e-03" in found[0]["error"]
    assert "dh is off by" in found[0]["error"]


class CallOnce:
    """A stopwatch that calls everything once and measures nothing."""

    def measure(self, runs, repeats, out_of_time):
        from bench.gpu.timing import Measured

        for run_it in runs.values():
            run_it()
        return {name: Measured(1.0, 1.0, 1.0) for name in runs}

    def clock(self, run):
        return None


def test_sweeps_call_what_exists(suite, tmp_path, monkeypatch):
    """Every setting of every sweep reaches its backend; kernels are replaced, there is no device to run them."""
    pytest.importorskip("triton")
    from appo._kernels.common.gpu import launch
    from appo._kernels.linear_logprob import backend_cublas as linear_cublas
    from appo._kernels.linear_logprob import backend_torch as linear_torch
    from appo._kernels.linear_logprob import backend_triton as linear_triton
    from appo._kernels.linear_logprob.gpu import backward
    from bench.gpu import speed as gpu_speed
    from bench.gpu.rows import Rows, Shape

    tiles, blocks = [], []

    def stats(call, tile=None, block=None):
        tiles.append(tile)
        blocks.append(block)
        return linear_torch.partial_stats(call)

    def gradients(call, up, *rest):
        blocks.append(backward.gradient_block(*call.w.shape))
        return linear_torch.gradients(call, up, *rest)

    monkeypatch.setattr(launch, "arch", lambda device: "sm_90")
    for module in (linear_triton, linear_cublas):
        monkeypatch.setattr(module, "partial_stats", stats)
        monkeypatch.setattr(module, "gradients", gradients)
    monkeypatch.setattr(gpu_speed, "SWEEP_QUICK", (Shape(8, 16, 64),))
    monkeypatch.setattr(gpu_speed, "BLOCKS", [(4, 32), (8, 64), (16, 64)])
    monkeypatch.setattr(gpu_speed, "DEVICE", "cpu")
    for sweep in (gpu_speed.forward, gpu_speed.cublas32, gpu_speed.backward):
        rows = Rows(tmp_path / sweep.__name__)
        sweep(rows, True, CallOnce())
        found = [json.loads(line) for line in rows.file.read_text().splitlines()]
        assert found[-1]["note"].endswith("SM clock unknown")
        assert not [row for row in found if "error" in row]
    assert len({tile for tile in tiles if tile}) >= 8
    assert {(4, 32), (8, 64)} <= set(blocks)
    assert (16, 64) not in blocks  # more tokens than there are


def test_peers_on_this_machine(suite):
    """What is installed here gives the log-probs that ours gives; what is not is named with the reason."""
    from bench.gpu import speed as gpu_speed
    from bench.gpu.rows import Shape, inputs

    found, missing = gpu_speed.on_a_gpu()
    names = [one.name for one in found]
    assert names[:3] == ["ours, triton", "ours, cublas32", "ours, torch"]
    assert "eager bf16" in names
    assert all(missing.values())
    h, w, y = inputs(Shape(8, 64, 100), "cpu")
    want = torch.log_softmax(h.double() @ w.double().T, 1).gather(1, y[:, None])[:, 0]
    for one in found:
        if one.compiled or one.name.startswith(("ours, triton", "ours, cublas32", "Liger", "Cut")):
            continue
        assert (one.logp(h, w, y)[0].double() - want).abs().max() < 0.2, one.name
        dh, dw = gpu_speed.step(one.logp, h, w, y, 1, True)
        assert dh.shape == h.shape
        assert dw.shape == w.shape
