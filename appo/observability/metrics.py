"""The numbers of a run: metrics.jsonl, and the small statistics that are read off it.

`MetricsWriter` and `BranchLog` are the two logs that a trainer keeps; how lines survive a kill is
`appo.observability.lines`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from appo.observability.branches import BranchLog, branch_table
from appo.observability.lines import append_lines, dump_record, open_log, read_lines
from appo.observability.renamed import in_todays_words

__all__ = [
    "BranchLog", "MetricsWriter", "branch_table", "eval_questions", "newcombe", "read_metrics", "strip_times", "wilson",
]  # fmt: skip

METRICS = "metrics.jsonl"
PHASES = ("rollout", "score", "branch", "reward", "learn", "push")

_MACHINE_GROUPS = frozenset({"time", "machine", "memory", "speed"})
_MACHINE_KEYS = frozenset({"timestamp", "date", "hostname", "pid", "device", "threads"})
_MACHINE_ENDINGS = ("_s", "_ms", "seconds", "_mb", "_gb", "_bytes")


class MetricsWriter:
    """Appends records to `run_dir/metrics.jsonl`.

    resume_after: step of the checkpoint that the run goes on from; lines of later steps are cut
    off. None keeps all.

    >>> MetricsWriter(run).write({"step": 1, "kind": "step", "reward/mean": 0.4, "time/step": 48.1})

    Raises ConfigError if the folder cannot be written.
    """

    def __init__(self, run_dir: Path | str, resume_after: int | None = None):
        self.path = open_log(run_dir, METRICS, resume_after)

    def write(self, record: Mapping[str, Any]) -> None:
        """One line. NaN and ±inf become null and their keys are listed under `nonfinite`."""
        append_lines(self.path, [dump_record(record)])


def read_metrics(run_dir: Path | str) -> list[dict[str, Any]]:
    """All records of a run, in the order they were written and with today's names.

    [] if there are none yet.
    """
    return [in_todays_words(record) for record in read_lines(Path(run_dir) / METRICS)]


def strip_times(record: Mapping[str, Any]) -> dict[str, Any]:
    """The record without what depends on clock or machine.

    What must be equal in two deterministic runs.
    """
    out = {k: v for k, v in record.items() if not _of_machine(k)}
    if "nonfinite" in out:
        out["nonfinite"] = [k for k in out["nonfinite"] if not _of_machine(k)]
        if not out["nonfinite"]:
            del out["nonfinite"]
    return out


def _of_machine(key: str) -> bool:
    return (
        key.partition("/")[0] in _MACHINE_GROUPS
        or key in _MACHINE_KEYS
        or key.endswith(_MACHINE_ENDINGS)
    )


# -- intervals -----------------------------------------------------------------------------------


def wilson(successes: float, n: int, z: float = 1.959963984540054) -> tuple[float, float]:
    """95 % score interval of a share (Wilson 1927); (0, 1) when nothing was counted."""
    if n <= 0:
        return 0.0, 1.0
    p = successes / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    # At p = 0 and p = 1 the bound is exact, but rounding leaves a speck outside of it.
    return min(max(centre - half, 0.0), p), max(min(centre + half, 1.0), p)


def newcombe(before: tuple[float, int], after: tuple[float, int]) -> tuple[float, float]:
    """95 % interval of share(after) - share(before) from their Wilson intervals.

    Newcombe 1998, method 10.

    before, after: (successes, n). Taken as independent, which is cautious where the same questions
    are asked twice.
    """
    p1, p2 = before[0] / max(before[1], 1), after[0] / max(after[1], 1)
    (l1, u1), (l2, u2) = wilson(*before), wilson(*after)
    d = p2 - p1
    return d - math.hypot(p2 - l2, u1 - p1), d + math.hypot(u2 - p2, p1 - l1)


def eval_questions(record: Mapping[str, Any]) -> int | None:
    """How many questions an eval record counts (`eval/questions`, or `eval/n`).

    None if it does not say.
    """
    for key in ("eval/questions", "eval/n", "eval/count"):
        if record.get(key):
            return int(record[key])
    return None
