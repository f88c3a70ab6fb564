"""The tiny recipe as a child process, small enough that a whole run takes seconds.

Started, watched, stopped, compared.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from appo.observability.metrics import read_metrics, strip_times

ROOT = Path(__file__).resolve().parents[2]
SMALL = (
    "train", "tiny", "--plain", "threads=1", "deterministic=true", "prompts_per_step=4", "eval.questions=8", "save_every=1",
    "algo.roots=2", "algo.branches=1", "algo.rollouts=4", "save_trees=4",
)  # fmt: skip


def start(*args: object, code: str = "") -> subprocess.Popen[str]:
    """`appo train tiny` with `args`; `code` runs in the process first (to plant a fault)."""
    argv = ["appo", *SMALL, *map(str, args)]
    script = f"{textwrap.dedent(code)}\nimport sys\nfrom appo.cli import main\nsys.argv = {argv!r}\nmain()\n"
    # The library that is tested is the one of this checkout, wherever the child is started.
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(
        [sys.executable, "-c", script],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": path},
    )


def finish(process: subprocess.Popen[str], timeout: float = 120) -> tuple[int, str]:
    """(exit code, all that was said).

    The process is killed when it takes longer than `timeout` seconds.
    """
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        out, err = process.communicate()
        raise AssertionError(
            f"still running after {timeout} s\n{out[-3000:]}{err[-3000:]}"
        ) from None
    return process.returncode, out + err


def train(*args: object, code: str = "", timeout: float = 120) -> str:
    """A run that must end well; what it said."""
    status, said = finish(start(*args, code=code), timeout)
    assert status == 0, said[-5000:]
    return said


def steps(run: Path) -> int:
    """Training steps in the metrics of a run so far."""
    return sum(r["kind"] == "step" for r in read_metrics(run))


def until(ready: Callable[[], Any], process: subprocess.Popen[str], timeout: float = 90) -> Any:
    """Wait for `ready()` to be true while the process runs; its value."""
    end = time.monotonic() + timeout
    while not (found := ready()):
        if process.poll() is not None or time.monotonic() > end:
            process.kill()
            out, err = process.communicate()
            raise AssertionError(
                f"{'timeout' if process.poll() is None else 'it ended'}\n{out}{err}"
            )
        time.sleep(0.02)
    return found


def written(run: Path) -> tuple[list[Any], list[Any]]:
    """Metrics and trees of a run without seconds: equal for equal runs."""
    trees = [json.loads(line) for line in (run / "trees.jsonl").read_text().splitlines()]
    return [strip_times(r) for r in read_metrics(run)], [_without_seconds(t) for t in trees]


def _without_seconds(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_seconds(v) for k, v in value.items() if k != "wall_s"}
    return [_without_seconds(v) for v in value] if isinstance(value, list) else value


def weights(run: Path) -> dict[str, Any]:
    """Masters and moments in the newest checkpoint, by kind and parameter."""
    import torch

    newest = run / "checkpoints" / (run / "checkpoints" / "latest").read_text()
    shard = torch.load(newest / "zero" / "rank_0.pt", weights_only=True)
    return {f"{kind}/{n}": t for kind in ("master", "exp_avg", "exp_avg_sq") for n, t in shard[kind].items()}  # fmt: skip


def records(path: Path, count: int, first: int = 3) -> Path:
    """A file of `count` sums in the record format."""
    rows = [
        {"data_source": "sums", "prompt": [{"role": "user", "content": f"What is {first + i} + {7 * i % 50 + 4}?"}],
         "ability": "maths", "reward_model": {"ground_truth": str(first + i + 7 * i % 50 + 4), "style": "rule"},
         "extra_info": {"index": i}}
        for i in range(count)
    ]  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
