"""The reward curve as a picture: what training did step by step, and what evaluation says about it.

Drawn with matplotlib's object interface on the Agg canvas, without pyplot: no display, no global
state.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from appo.observability.lines import replace_file
from appo.observability.metrics import eval_questions, wilson

REWARD, ACCURACY, TOOLS, GREY = "#1f5fa8", "#1f5fa8", "#d9822b", "#8a8a8a"


def reward_curve(records: Sequence[Mapping[str, Any]], path: Path | str) -> None:
    """PNG of two panels over steps: mean reward and tool use of the rollouts.

    Accuracy and tool use of evaluations.

    records: as in metrics.jsonl. Evaluations carry 95 % Wilson intervals if they say how many
    questions they asked.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 6.0), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    top, bottom = figure.subplots(2, 1, sharex=True)
    steps = [r for r in records if r.get("kind", "step") == "step"]
    evals = [r for r in records if r.get("kind") == "eval"]

    _line(top, steps, "reward/mean", "mean reward", REWARD)
    _line(top, steps, "tool/use", "successful tool call", TOOLS)
    _points(bottom, evals, "eval/accuracy", "accuracy", ACCURACY, -1)
    _points(bottom, evals, "eval/tool_use", "successful tool call", TOOLS, +1)

    _dress(top, "Training rollouts", "no step yet")
    n = next((eval_questions(r) for r in reversed(evals)), None)
    _dress(
        bottom,
        "Held-out questions" + (f" (n = {n}, 95 %)" if n else ""),
        "no evaluation yet",
    )
    numbers = [int(r.get("step", 0)) for r in (*steps, *evals)]
    _step_axis(bottom, numbers)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    replace_file(Path(path), buffer.getvalue())


def _series(
    records: Sequence[Mapping[str, Any]], key: str
) -> tuple[list[int], list[float], list[int | None]]:
    known = [r for r in records if r.get(key) is not None]
    return (
        [int(r.get("step", 0)) for r in known],
        [float(r[key]) for r in known],
        [eval_questions(r) for r in known],
    )


def _line(
    axes: Any, records: Sequence[Mapping[str, Any]], key: str, label: str, color: str
) -> None:
    x, y, _ = _series(records, key)
    if x:
        # Markers while single steps can be told apart; a lone step would be invisible without.
        marker = "o" if len(x) <= 40 else None
        axes.plot(x, y, color=color, marker=marker, markersize=4, linewidth=1.6, label=label)


def _points(
    axes: Any, records: Sequence[Mapping[str, Any]], key: str, label: str, color: str, side: int
) -> None:
    """Points with intervals, joined by a thin line.

    The two series step aside so that bars do not overlap.
    """
    x, y, counts = _series(records, key)
    if not x:
        return
    span = max(max(x) - min(x), 1)
    shifted = [s + side * 0.006 * span for s in x]
    bounds = [wilson(v * n, n) if n else (v, v) for v, n in zip(y, counts, strict=True)]
    below = [max(v - low, 0.0) for v, (low, _) in zip(y, bounds, strict=True)]
    above = [max(high - v, 0.0) for v, (_, high) in zip(y, bounds, strict=True)]
    axes.errorbar(
        shifted, y, yerr=[below, above], color=color, marker="o", markersize=5, linewidth=1.0,
        elinewidth=1.6, capsize=3, label=label,
    )  # fmt: skip
    # Figures stand outside, before the first point and behind the last, where no line crosses them.
    for i, ha in {0: "right", len(x) - 1: "left"}.items():
        axes.annotate(
            f"{y[i]:.2f}", (x[i], y[i]), xytext=(9 if ha == "left" else -9, 0),
            textcoords="offset points", color=color, fontsize=9, va="center", ha=ha,
        )  # fmt: skip


def _dress(axes: Any, title: str, empty: str) -> None:
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e3e3e3", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=9, color=GREY)
    handles, labels = axes.get_legend_handles_labels()
    if not handles:
        axes.text(0.5, 0.5, empty, transform=axes.transAxes, ha="center", va="center", color=GREY)
        axes.set_ylim(0, 1)
        return
    low, high = axes.get_ylim()
    # Shares: the whole range, so that slopes are honest; a hair more, so that a marker at 0 or 1 is
    # whole.
    axes.set_ylim(min(-0.02, low), max(1.02, high))
    axes.legend(
        handles, labels, frameon=False, fontsize=9, ncols=2, loc="lower right",
        bbox_to_anchor=(1.0, 1.0), borderaxespad=0.1, handlelength=1.4,
    )  # fmt: skip


def _step_axis(axes: Any, numbers: Sequence[int]) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel("step", fontsize=10)
    low, high = (min(numbers), max(numbers)) if numbers else (0, 1)
    margin = max(0.08 * (high - low), 0.5)
    axes.set_xlim(low - margin, high + margin)
    axes.xaxis.set_major_locator(
        MaxNLocator(integer=True, nbins=10, min_n_ticks=1, steps=[1, 2, 5, 10])
    )
