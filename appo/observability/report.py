"""The report of a run.

report.md, curve.png and tree.txt, made from the logs in its folder and nothing else.

It can be written at any time, also for a run that is under way or was killed. A number that is not
there is a dash, never a zero.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from appo.observability.branches import branch_table
from appo.observability.card import md_code, md_table
from appo.observability.chart import reward_curve
from appo.observability.codec import tree_from_json
from appo.observability.engine import engine_section
from appo.observability.learner import learner_section
from appo.observability.lines import read_lines, replace_file
from appo.observability.metrics import PHASES, eval_questions, newcombe, read_metrics, wilson
from appo.observability.progress import Console
from appo.observability.trees import rank_for_display, render_tree, stored_text

Records = Sequence[Mapping[str, Any]]

FILES = {
    "config.yaml": "resolved configuration",
    "metrics.jsonl": "one record per step and evaluation",
    "branches.jsonl": "branch points, one line per prompt",
    "trees.jsonl": "sampled trees with ids, logprobs and entropies",
    "tree.txt": "one of these trees, readable",
    "curve.png": "reward and accuracy over steps",
    "checkpoints": "weights, optimiser and position in the data",
}

COUNTERS = {
    "grade/errors": "answers that could not be graded",
    "group/ungraded_leaves": "rollouts left out of their group",
    "group/zero_variance": "groups without signal (all rewards equal)",
    "branch/shortfall": "branch slots that stayed empty",
    "pack/over_budget": "rows longer than the token budget",
    "learner/empty": "mini-batches without anything to learn",
    "learner/nonfinite": "mini-batches skipped for a non-finite loss or gradient",
}
SHARES = {
    "tool/errors": "tool calls that failed",
    "rollout/truncated": "rollouts cut off by the token limit",
}


def write_report(run_dir: Path | str, config_yaml: str, console: Console) -> None:
    """Write report.md, curve.png and (if trees were saved) tree.txt into the run folder.

    A part that cannot be made is a warning, and the report goes without it: a run must not end in
    an error because of its picture.
    """
    run = Path(run_dir)
    records = read_metrics(run)
    _part("curve.png", console, lambda: reward_curve(records, run / "curve.png"))
    _part("tree.txt", console, lambda: write_tree(run))
    text = report_text(run, records, config_yaml)
    replace_file(run / "report.md", text.encode("utf-8", "replace"))
    console.note(f"report: {run / 'report.md'}")


def _part(name: str, console: Console, make: Any) -> None:
    try:
        make()
    except Exception as e:
        console.warn(f"{name} could not be written: {type(e).__name__}: {e}")


def write_tree(run: Path) -> None:
    """The most telling tree of the last saved step as tree.txt."""
    best: Any = None
    rank: tuple[Any, ...] = ()
    for data in read_lines(run / "trees.jsonl"):
        tree = tree_from_json(data)
        mine = (tree.step, *rank_for_display(tree))
        if best is None or mine > rank:
            best, rank = (tree, stored_text(data)), mine
    if best is not None:
        replace_file(run / "tree.txt", render_tree(*best).encode("utf-8", "replace"))


def report_text(run: Path, records: Records, config_yaml: str) -> str:
    """report.md as text."""
    steps = [r for r in records if r.get("kind", "step") == "step"]
    evals = [r for r in records if r.get("kind") == "eval"]
    sections = [
        f"# {run.name}",
        _summary(steps, evals, config_yaml),
        "## Evaluation",
        _evaluations(evals),
        "![Reward, accuracy and tool use over steps](curve.png)" if (run / "curve.png").exists() else "",
        "## Steps",
        _steps(steps),
        "## Branches",
        branch_section(branch_table(run)),
        "## Time",
        _times(steps, evals),
        "## Rollout engine",
        engine_section(steps),
        "## What the learner did not have to compute",
        learner_section(steps),
        "## Counters",
        _counters(steps),
        "## Files",
        _files(run),
        "## Configuration",
        "```yaml\n" + config_yaml.strip() + "\n```",
    ]  # fmt: skip
    return "\n\n".join(s for s in sections if s) + "\n"


# -- result --------------------------------------------------------------------------------------


def _summary(steps: Records, evals: Records, config_yaml: str) -> str:
    found = re.search(r"^steps:\s*(\d+)", config_yaml, re.MULTILINE)
    planned = int(found[1]) if found else None
    done = max((int(r["step"]) for r in steps), default=0)
    seconds = sum(_value(r, "time/step") or 0.0 for r in steps)
    seconds += sum(_value(r, "time/eval", "time/step") or 0.0 for r in evals)
    text = f"{done} of {planned} steps" if planned else f"{done} steps"
    text += f" in {_duration(seconds)} (evaluation included)."
    if planned and done < planned:
        text += " The run is not finished."
    if len(evals) < 2:
        return text
    for key, name in (("eval/accuracy", "Accuracy"), ("eval/tool_use", "Tool use")):
        a, b = _value(evals[0], key), _value(evals[-1], key)
        if a is None or b is None:
            continue
        text += f" {name} {a:.3f} → {b:.3f}"
        n, m = eval_questions(evals[0]), eval_questions(evals[-1])
        if n and m:
            low, high = newcombe((a * n, n), (b * m, m))
            text += f" (difference {b - a:+.3f}, 95 % {low:+.3f} to {high:+.3f})"
        text += "."
    return text


def _evaluations(evals: Records) -> str:
    if not evals:
        return "No evaluation yet."
    rows = []
    for r in evals:
        n = eval_questions(r)
        rows.append([
            str(r.get("step", "–")), _count(n),
            _share(_value(r, "eval/accuracy"), n), _share(_value(r, "eval/tool_use"), n),
        ])  # fmt: skip
    table = md_table(["step", "questions", "accuracy", "tool use"], rows)
    return f"{table}\n\nShares with count and 95 % Wilson interval; tool use: at least one successful call."


def _share(value: float | None, n: int | None) -> str:
    if value is None:
        return "–"
    if not n:
        return f"{value:.3f}"
    low, high = wilson(value * n, n)
    return f"{value:.3f} ({round(value * n)} of {n}; {low:.3f}–{high:.3f})"


def _steps(steps: Records) -> str:
    if not steps:
        return "No step yet."
    rows = []
    for r in _thinned(steps, 60):
        unique, total = _value(r, "tokens/unique"), _value(r, "tokens/total")
        rows.append([
            str(r["step"]), _num(_value(r, "reward/mean"), 3), _num(_value(r, "reward/std"), 3),
            _num(_value(r, "tool/use")), _num(_value(r, "policy/entropy", "rollout/entropy")),
            _num(_value(r, "branch/omega_uninformative")), _count(unique), _count(total),
            f"{total / unique:.2f}" if unique and total else "–", _num(_value(r, "time/step"), 1),
        ])  # fmt: skip
    header = ["step", "reward", "std", "tool use", "entropy", "Ω uninformative", "unique tokens", "total tokens",
              "sharing", "seconds"]  # fmt: skip
    table = md_table(header, rows)
    if len(rows) < len(steps):
        table += f"\n\n{len(rows)} of {len(steps)} steps; all of them are in metrics.jsonl."
    return table


def _thinned(records: Records, n: int) -> Records:
    if len(records) <= n:
        return records
    return [records[round(i * (len(records) - 1) / (n - 1))] for i in range(n)]


# -- branches ------------------------------------------------------------------------------------


def branch_section(t: Mapping[str, Any]) -> str:
    """Markdown of `branch_table`: was Ω informative, and where do the points fall."""
    if not t["prompts"]:
        return "No branches (an algorithm without branches, or no step yet)."
    informative = md_table(
        ["mini-batch", "prompts", "roots", "Ω uninformative, prompts", "Ω uninformative, roots", "branch points", "by score"],
        [
            [str(k + 1), _count(m["prompts"]), _count(m["roots"]), _num(m["uninformative_prompts"], 3),
             _num(m["uninformative_roots"], 3), _count(m["points"]), _num(m["strict"], 3)]
            for k, m in t["by_minibatch"].items()
        ],
    )  # fmt: skip
    parts = [
        "Share of prompts (all of their roots) and of roots on which Ω was constant, by mini-batch of the step. In the "
        "first one the weights are those that drew the roots, so Ω is constant by definition. By score: share of points "
        "that the Branching Score chose; the others went to the highest entropy (or were drawn at random).",
        informative,
    ]
    if not t["points"]:
        return "\n\n".join([*parts, "No branch point was chosen."])
    rules = ", ".join(f"{rule} {share:.3f}" for rule, share in t["rules"].items())
    parts.append(
        f"Rules that chose the {t['points']:,} points: {rules}. Empty slots: {t['shortfall']:,}."
    )
    if (r := t["reward"])["points"]:
        parts.append(
            f"Reward of a branch against its root: better {r['better']:.3f}, same {r['same']:.3f}, "
            f"worse {r['worse']:.3f} ({r['points']:,} pairs)."
        )
    if t["positions"]:
        fifths = ["0–20 %", "20–40 %", "40–60 %", "60–80 %", "80–100 %"]
        parts.append("Where they fall, by position in the root's response:")
        parts.append(md_table(fifths, [[f"{x:.3f}" for x in t["positions"]]], text_columns=0))
    parts.append(
        "Tokens re-drawn most often, with mean z-scores (z(Ω) over roots where Ω is informative):"
    )
    parts.append(
        md_table(
            ["token", "points", "z(entropy)", "z(Ω)"],
            [[md_code(x["token"], 24), _count(x["count"]), _signed(x["z_entropy"]), _signed(x["z_omega"])]
             for x in t["tokens"]],
        )
    )  # fmt: skip
    parts.append(f"{len(t['examples'])} branch points, spread evenly over the run:")
    parts.append(_examples(t["examples"]))
    return "\n\n".join(parts)


def _examples(rows: Sequence[Mapping[str, Any]]) -> str:
    return md_table(
        ["prompt", "token", "rule", "step", "mini-batch", "root", "position", "z(entropy)", "z(Ω)", "score",
         "root reward", "branch reward"],
        [
            [md_code(str(r["prompt_id"]), 24), md_code(r["token"], 24), str(r["rule"]), str(r["step"]),
             str(r["minibatch"] + 1), str(r["root"]), f"{r['position']} of {r.get('response_length', '–')}",
             _signed(r.get("z_entropy")),
             "none" if r.get("omega_uninformative") else _signed(r.get("z_omega")), _signed(r.get("score")),
             _num(r.get("root_reward")), _num(r.get("branch_reward"))]
            for r in rows
        ],
        text_columns=3,
    )  # fmt: skip


# -- time, errors, files -------------------------------------------------------------------------


def _times(steps: Records, evals: Records) -> str:
    total = sum(_value(r, "time/step") or 0.0 for r in steps)
    if not total:
        return "No step yet."
    seconds = {p: sum(_value(r, f"time/{p}") or 0.0 for r in steps) for p in PHASES}
    seconds["other"] = max(total - sum(seconds.values()), 0.0)
    rows = [
        [p, f"{s:.1f}", f"{s / len(steps):.2f}", f"{s / total:.3f}"] for p, s in seconds.items()
    ]
    rows.append(["**all steps**", f"{total:.1f}", f"{total / len(steps):.2f}", "1.000"])
    if spent := sum(_value(r, "time/eval", "time/step") or 0.0 for r in evals):
        rows.append([f"evaluation ({len(evals)}×)", f"{spent:.1f}", "–", "–"])
    return md_table(["phase", "seconds", "per step", "share"], rows)


def _counters(steps: Records) -> str:
    """Every counter that was kept, zeros too: a zero says that somebody looked."""
    rows = []
    for key, words in COUNTERS.items():
        known = [v for r in steps if (v := _value(r, key)) is not None]
        if known:
            rows.append([words, f"`{key}`", _count(sum(known))])
    for key, words in SHARES.items():
        known = [v for r in steps if (v := _value(r, key)) is not None]
        if known:
            rows.append([words, f"`{key}`", f"{sum(known) / len(known):.3f} (mean share)"])
    bad = sorted({k for r in steps for k in r.get("nonfinite", ())})
    if bad:
        rows.append(
            ["metrics that were not finite", "`nonfinite`", ", ".join(f"`{k}`" for k in bad)]
        )
    return md_table(["what", "key", "all steps"], rows, 2) if rows else "Nothing was counted yet."


def _files(run: Path) -> str:
    rows = [[f"`{name}`", what] for name, what in FILES.items() if (run / name).exists()]
    return md_table(["file", "holds"], rows, 2) if rows else "None."


# -- numbers -------------------------------------------------------------------------------------


def _value(record: Mapping[str, Any], *keys: str) -> float | None:
    return next((float(record[k]) for k in keys if record.get(k) is not None), None)


def _num(value: float | None, digits: int = 2) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _signed(value: float | None) -> str:
    return "–" if value is None else f"{value:+.2f}"


def _count(value: float | None) -> str:
    return "–" if value is None else f"{value:,.0f}"


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.1f} min"
