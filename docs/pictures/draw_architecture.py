"""Draw the rooms of appo on their floors: a room imports from floors below its own only.

    python docs/pictures/draw_architecture.py              # → docs/pictures/architecture.svg

FLOORS is the order of imports, lowest first.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from svg import box, path, picture, text, write_or_check

HERE = Path(__file__).resolve().parent

# Lowest first: (rooms with what each is for, color).
FLOORS: list[tuple[list[tuple[str, str]], str]] = [
    ([("csrc/", "C++ by operation, one instruction set per file; behind a C interface")], "tool"),
    ([("kernels/", "PyTorch definition, C++ and Triton: one function per operation")], "tool"),
    ([("errors, types, imports", "Task, Node, RolloutTree, Credit: what flows; no torch")], "model"),
    ([("appo.kernels", "typed public names of kernels/")], "model"),
    ([("observability", "metrics, trees, report; knows nothing of what it shows")], "model"),
    ([("config", "recipe, keys, checks")], "model"),
    ([("algo", "branching, credit, loss"), ("packing", "trees into streams"),
      ("tools", "tools and sandbox")], "model"),
    ([("reward", "graders, killable"), ("dist", "ranks, failures, signals")], "model"),
    ([("data", "tasks, prompts")], "model"),
    ([("models", "find, check, convert")], "model"),
    ([("rollout", "agent, engines: native, vLLM"), ("trainer", "one step over mini-batches"),
      ("learner", "policy, ZeRO, push")], "fork"),
    ([("run", "plan, session, build, train, evaluate, replay, resume")], "good"),
    ([("doctor, cli", "commands")], "good"),
]  # fmt: skip

WIDTH, LEFT, RIGHT, TOP = 860, 26, 26, 84
HEIGHT, GAP = 42, 20
GROUND = 2  # floors below appo/ itself
PASSAGE = 56  # beside the lowest floor of appo/


def top_of(floor: int) -> float:
    """y of a floor's boxes; a wider gap separates appo/ from the folders it stands on."""
    y = TOP + (len(FLOORS) - 1 - floor) * (HEIGHT + GAP)
    return y + (18 if floor < GROUND else 0)


def right_of(floor: int) -> float:
    """Right end of a floor: errors and types leave room for the arrow that passes them."""
    return WIDTH - RIGHT - (PASSAGE if floor == GROUND else 0)


def draw_floor(floor: int) -> list[str]:
    """SVG of the rooms of one floor, side by side."""
    rooms, css = FLOORS[floor]
    space = (right_of(floor) - LEFT - 12 * (len(rooms) - 1)) / len(rooms)
    shapes, y = [], top_of(floor)
    for i, (name, what) in enumerate(rooms):
        x = LEFT + i * (space + 12)
        shapes.append(box(x, y, space, HEIGHT, css, 6))
        shapes.append(text(x + 12, y + 18, name, size=15, bold=True))
        shapes.append(text(x + 12, y + 35, what, size=12.5, css="faint"))
    return shapes


def arrow(floor: int) -> list[str]:
    """From `floor` to the one below; appo.kernels reaches its folder past errors and types."""
    x, start = WIDTH / 2, floor
    if floor == GROUND:
        x, start = WIDTH - RIGHT - PASSAGE / 2, floor + 1
    begin, end = top_of(start) + HEIGHT + 2, top_of(floor - 1) - 3
    return [
        path(f"M {x} {begin} V {end - 5}", "arrow", 1.5),
        path(f"M {x - 5} {end - 7} L {x} {end} L {x + 5} {end - 7} Z", "arrowhead", 0),
    ]


def draw(theme: str) -> str:
    """The whole picture as SVG."""
    bottom = top_of(0) + HEIGHT
    parts = [
        text(LEFT, 36, "The rooms of appo", size=17, bold=True),
        text(LEFT, 60, "A room imports from floors below its own. The yellow ones never import one "
             "another: they meet in typed protocols.", size=13, css="faint"),
    ]  # fmt: skip
    for floor in range(len(FLOORS)):
        parts += draw_floor(floor)
        parts += arrow(floor) if floor else []
    names = [", ".join(name for name, _ in rooms) for rooms, _ in FLOORS]
    description = "From low to high: " + "; ".join(names) + "."
    return picture(WIDTH, bottom + 26, "The rooms of appo", description, parts, theme=theme)


def main() -> None:
    """Write the picture to the file that the command line names."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=HERE / "architecture.svg")
    parser.add_argument("--theme", choices=("auto", "light", "dark"), default="auto")
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit 1 on a difference"
    )
    args = parser.parse_args()
    write_or_check(args.out, draw(args.theme), args.check)


if __name__ == "__main__":
    main()
