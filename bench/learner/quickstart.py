"""Seconds of a quickstart step by phase, and the peak memory of the whole process.

Runs `appo train` in a process of its own, so that the memory is that of a user's run. `--quick`
uses the tiny recipe. There is no peer: no other trainer has these phases. Ours is given per step,
evaluation apart.
"""

from __future__ import annotations

import os
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2]))  # the checkout, for `bench`

from bench.common import Case, arguments, report

PHASES = ("rollout", "score", "branch", "reward", "learn", "push", "step")
PEAK_GOAL_GIB = 4.0


def train(recipe: str, steps: int, output: Path) -> None:
    """One run; its own output goes to the screen."""
    command = [sys.executable, "-m", "appo", "train", recipe, f"steps={steps}", f"output={output}"]
    command += ["eval.questions=32", "--plain"]
    subprocess.run(command, check=True, env=os.environ | {"PYTHONUNBUFFERED": "1"})


def main() -> None:
    args = arguments(__doc__ or "")
    from appo.observability.metrics import read_metrics

    recipe, steps = ("tiny", 2) if args.quick else ("quickstart", 4)
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        train(recipe, steps, run)
        records = read_metrics(run)
    done = [r for r in records if r["kind"] == "step"]
    cases = [
        Case(f"{recipe}: {phase}", "s/step", statistics.median(r[f"time/{phase}"] for r in done))
        for phase in PHASES
    ]
    evals = [r["time/eval"] / r["eval/questions"] for r in records if r["kind"] == "eval"]
    cases.append(Case(f"{recipe}: evaluation", "s/question", statistics.median(evals)))
    drawn = sum(r["tokens/generated"] for r in done)
    seconds = sum(r["time/rollout"] + r["time/branch"] for r in done)
    cases.append(Case(f"{recipe}: sampling", "tokens/s", drawn / seconds, higher_is_better=True))
    peak = (
        resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    )  # the largest child, KiB on Linux
    cases.append(Case(f"{recipe}: peak memory (goal ≤ {PEAK_GOAL_GIB:g})", "GiB", peak))
    report("quickstart step", cases, args)


if __name__ == "__main__":
    main()
