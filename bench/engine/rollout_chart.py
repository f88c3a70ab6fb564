"""The rollout table as a picture: sampled tokens a second and rows computed, per engine.

Drawn with matplotlib's object interface on the Agg canvas, as the charts of a run are: no display,
no global state.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[2]))  # the checkout, for `bench`

from bench.common import Case

OURS, PEER, GREY = "#1f5fa8", "#b8bec6", "#5a5a5a"


def draw(sections: Mapping[str, Sequence[Case]], path: Path) -> None:
    """PNG or SVG by the name.

    sections: thread count → cases "drawn" and "computed" (see bench/engine/rollout.py).
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns: list[tuple[str, dict[str, float]]] = [
        (f"drawn tokens a second, {title}", figures_of(cases, "drawn"))
        for title, cases in sections.items()
    ]
    last = list(sections.values())[-1]
    columns.append(("rows computed", figures_of(last, "computed")))
    # The same order of engines everywhere: the fastest of the first column on top.
    names = sorted({n for _, c in columns for n in c}, key=lambda n: -columns[0][1].get(n, 0.0))
    figure = Figure(
        figsize=(3.4 * len(columns) + 1.6, 0.42 * len(names) + 1.1), layout="constrained"
    )
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(columns), sharey=True, squeeze=False)[0]
    for ax, (title, figures) in zip(axes, columns, strict=True):
        bars(ax, title, names, figures)
    figure.savefig(path, dpi=130, metadata={"Date": None} if path.suffix == ".svg" else None)


def figures_of(cases: Sequence[Case], name: str) -> dict[str, float]:
    case = next(c for c in cases if c.name == name)
    return {"ours": case.ours} | case.peers


def bars(ax: Any, title: str, names: Sequence[str], figures: Mapping[str, float]) -> None:
    values = [figures.get(name, 0.0) for name in names]
    colours = [OURS if name == "ours" else PEER for name in names]
    drawn = ax.barh(range(len(names)), values, color=colours, height=0.68)
    labels = [f"{figures[name]:,.0f}" if name in figures else "–" for name in names]
    ax.bar_label(drawn, labels, padding=4, fontsize=9, color=GREY)
    ax.set_yticks(range(len(names)), names, fontsize=9)
    ax.invert_yaxis()
    ax.set_title(title, loc="left", fontsize=10)
    ax.set_xlim(0, 1.18 * max(values, default=1.0))
    ax.spines[["top", "right", "bottom"]].set_visible(False)
    ax.tick_params(axis="x", bottom=False, labelbottom=False)
    ax.tick_params(axis="y", length=0)
