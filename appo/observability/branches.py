"""Where trees branched, and whether the Branching Score had anything to say.

A log of every branch point of a run.

One line of branches.jsonl is one prompt of one mini-batch. `omega_uninformative` says that Ω was
constant on a root, which it is by construction in the first mini-batch of a step (the weights have
not moved since the roots were drawn); the shares per mini-batch in `branch_table` show when it
begins to carry information.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from appo.observability.lines import append_lines, dump_record, open_log, read_lines
from appo.observability.renamed import in_todays_words

BRANCHES = "branches.jsonl"
TOP_TOKENS = 12
EXAMPLES = 10


class BranchLog:
    """Appends to `run_dir/branches.jsonl`; `resume_after` as in `MetricsWriter`."""

    def __init__(self, run_dir: Path | str, resume_after: int | None = None):
        self.path = open_log(run_dir, BRANCHES, resume_after)

    def write(
        self,
        step: int,
        minibatch: int,
        prompt_id: str,
        rows: Sequence[dict[str, Any]],
        omega_uninformative: Sequence[bool] | None = None,
        shortfall: int = 0,
    ) -> None:
        """One prompt and its branch points.

        rows: root · position (response position that the score chose), response_length (of the
        root) · token (text of the root's token there) · rule, score, z_entropy, z_omega ·
        omega_uninformative (Ω constant on this root) · root_reward, branch_reward (None if
        ungraded); further keys are kept. omega_uninformative: for each root, whether Ω was
        constant; None: taken from the rows, so a root without a branch is unknown. shortfall:
        branch slots that stayed empty.
        """
        if omega_uninformative is None:
            by_root = {
                int(r["root"]): bool(r["omega_uninformative"])
                for r in rows
                if r.get("omega_uninformative") is not None
            }
            omega_uninformative = [by_root[i] for i in sorted(by_root)]
        record = {
            "step": step, "minibatch": minibatch, "prompt_id": prompt_id,
            "omega_uninformative": [bool(f) for f in omega_uninformative], "shortfall": shortfall, "rows": list(rows),
        }  # fmt: skip
        append_lines(self.path, [dump_record(record)])


def branch_table(run_dir: Path | str) -> dict[str, Any]:
    """Summary of a run's branch points. Shares are in [0, 1], None where nothing was counted.

    prompts, points, shortfall
    by_minibatch  {index: {prompts, roots, points, uninformative_prompts (Ω uninformative on all
                  roots of a prompt), uninformative_roots, strict (share of points that the score
                  chose)}}
    rules         {rule: share} · positions[5]: share of points per fifth of the root's response
    tokens        [{token, count, z_entropy, z_omega}], most frequent first; means, z_omega where Ω
                  is informative
    reward        {better, same, worse, points}: branches against their root
    examples      rows with step, minibatch and prompt_id, spread evenly over the run
    """
    prompts = 0
    shortfall = 0
    rows: list[dict[str, Any]] = []
    silent: dict[int, list[list[bool]]] = defaultdict(list)
    rules: dict[int, list[str]] = defaultdict(list)
    for line in map(in_todays_words, read_lines(Path(run_dir) / BRANCHES)):
        prompts += 1
        shortfall += line.get("shortfall", 0)
        k = int(line["minibatch"])
        silent[k].append(line.get("omega_uninformative") or [])
        rules[k] += [r["rule"] for r in line["rows"]]
        rows += [{**r, **{key: line[key] for key in ("step", "minibatch", "prompt_id")}}
                 for r in line["rows"]]  # fmt: skip
    return {
        "prompts": prompts,
        "points": len(rows),
        "shortfall": shortfall,
        "by_minibatch": {k: _minibatch(silent[k], rules[k]) for k in sorted(silent)},
        "rules": {r: n / len(rows) for r, n in Counter(r["rule"] for r in rows).most_common()},
        "positions": _quintiles(rows),
        "tokens": _tokens(rows),
        "reward": _against_root(rows),
        "examples": _spread(rows, EXAMPLES),
    }


def _minibatch(silent: Sequence[Sequence[bool]], rules: Sequence[str]) -> dict[str, Any]:
    known = [f for f in silent if f]
    roots = [x for f in known for x in f]
    return {
        "prompts": len(silent),
        "roots": len(roots),
        "points": len(rules),
        "strict": _mean(r == "strict" for r in rules),
        "uninformative_prompts": _mean(all(f) for f in known),
        "uninformative_roots": _mean(roots),
    }


def _quintiles(rows: Sequence[dict[str, Any]]) -> list[float] | None:
    """Share of points in each fifth of their root's response."""
    known = [r for r in rows if r.get("response_length")]
    if not known:
        return None
    fifths = Counter(min(5 * int(r["position"]) // int(r["response_length"]), 4) for r in known)
    return [fifths[i] / len(known) for i in range(5)]


def _tokens(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    groups: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for r in rows:
        groups[r["token"]].append(r)
    # Ties by text, so that two equal runs give equal reports.
    most = sorted(groups.items(), key=lambda item: (-len(item[1]), item[0]))[:TOP_TOKENS]
    return [
        {
            "token": token,
            "count": len(g),
            "z_entropy": _mean(r["z_entropy"] for r in g),
            # Where Ω is uninformative, z(Ω) is 0 by definition: it would only dilute the mean.
            "z_omega": _mean(r["z_omega"] for r in g if not r.get("omega_uninformative")),
        }
        for token, g in most
    ]


def _against_root(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    gain = [
        r["branch_reward"] - r["root_reward"]
        for r in rows
        if r.get("branch_reward") is not None and r.get("root_reward") is not None
    ]
    return {
        "points": len(gain),
        "better": _mean(g > 0 for g in gain),
        "same": _mean(g == 0 for g in gain),
        "worse": _mean(g < 0 for g in gain),
    }


def _spread(rows: Sequence[dict[str, Any]], n: int) -> list[dict[str, Any]]:
    if len(rows) <= n:
        return list(rows)
    return [rows[round(i)] for i in np.linspace(0, len(rows) - 1, n)]


def _mean(values: Iterable[Any]) -> float | None:
    numbers = [float(v) for v in values if v is not None]
    return float(np.mean(numbers)) if numbers else None
