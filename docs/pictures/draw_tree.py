"""Draw one root of a saved rollout tree and one of its branches: tokens, tool results, rewards.

    python docs/pictures/draw_tree.py                      # docs/pictures/tree.jsonl → tree.svg
    python docs/pictures/draw_tree.py RUN/trees.jsonl --line 3 --leaf 8 --out my.svg

Input is a line of a run's `trees.jsonl`. `tree.jsonl` beside this script is such a line, unchanged:
step 11 of `appo train tiny deterministic=true seed=0 save_trees=all`, prompt arithmetic-train-172.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from svg import box, path, picture, text, width_of, write_or_check
from tokenizers import Tokenizer

HERE = Path(__file__).resolve().parent
SIZE = 14  # of token text
GAP = 3  # between boxes
PAD = 12  # of a box, both sides together
HEIGHT = 28  # of a box
LEFT = 26
TURN = (
    42  # from the first line of a rollout to its second, which starts after the first tool result
)
ROW = {"root": 126, "branch": 254}  # top of the boxes

Tree = dict[str, Any]


def decoder(file: Path | None) -> Tokenizer:
    """The tokenizer that turns ids into text: `file`, or that of the tiny model in this package."""
    if file is None:
        file = next((HERE.parents[1] / "appo").rglob("tiny_qwen3/tokenizer.json"))
    return Tokenizer.from_file(str(file))


def walk(tree: Tree, leaf: Tree) -> list[int]:
    """Nodes from the prompt to the end of `leaf`."""
    found, at = [], leaf["node"]
    while at is not None:
        found.append(at)
        at = tree["nodes"][at]["parent"]
    return found[::-1]


def response(tree: Tree, leaf: Tree) -> list[tuple[int, str]]:
    """(token id, role) of everything after the prompt, inherited tokens included."""
    nodes = [tree["nodes"][i] for i in walk(tree, leaf)]
    tokens: list[tuple[int, str]] = []
    for i, node in enumerate(nodes):
        end = nodes[i + 1]["fork_at"] if i + 1 < len(nodes) else len(node["token_ids"])
        if node["role"] != "prompt":
            tokens += [(t, node["role"]) for t in node["token_ids"][:end]]
    return tokens


def pieces(tokens: list[tuple[int, str]], tokenizer: Tokenizer, alone: set[int], first_turn: bool
           ) -> list[tuple[int, str, str]]:  # fmt: skip
    """(position, role, text): tokens of the first turn one by one, later ones joined.

    Positions in `alone` stand apart in any turn.
    """
    out: list[tuple[int, list[int], str]] = []
    turns = 0
    for position, (token, role) in enumerate(tokens):
        new_role = position == 0 or role != tokens[position - 1][1]
        turns += new_role
        single = first_turn and turns == 1
        if new_role or single or position in alone or position - 1 in alone:
            out.append((position, [token], role))
        else:
            out[-1][1].append(token)
    return [(at, role, tokenizer.decode(ids, skip_special_tokens=False).strip("\n"))
            for at, ids, role in out]  # fmt: skip


def draw_row(start: float, second: float, top: float, row: list[tuple[int, str, str]],
             css: dict[int, str]
             ) -> tuple[list[str], dict[int, tuple[float, float]], float]:  # fmt: skip
    """Boxes of one rollout from x = start; after a tool result the line goes on at x = second.

    → (shapes, left edge and top by position, right end of the last line)
    """
    shapes, place, x = [], {}, start
    for i, (position, role, value) in enumerate(row):
        if i and row[i - 1][1] == "tool":
            x, top = second, top + TURN
        value = value.replace(" ", "·") if value.strip() == "" else value
        width = width_of(value, SIZE) + PAD
        place[position] = (x, top)
        shapes.append(box(x, top, width, HEIGHT, css.get(position, role)))
        shapes.append(text(x + PAD / 2, top + 19, value, size=SIZE, mono=True))
        x += width + GAP
    return shapes, place, x


def reward_badge(x: float, top: float, reward: float) -> list[str]:
    """SVG of an arrow and a reward, right of a rollout that ends at `x`."""
    css, words = ("good" if reward > 0 else "bad"), f"reward {reward:g}"
    width = width_of(words, SIZE) + 18
    return [
        path(f"M {x:.1f} {top + HEIGHT / 2} h 10", "arrow", 1.5),
        box(x + 10, top, width, HEIGHT, css, 14),
        text(x + 19, top + 19, words, size=SIZE, mono=True),
    ]


def legend(y: float) -> list[str]:
    """SVG of the line that says what the colors mean."""
    shapes, x = [], float(LEFT)
    for css, words in (("model", "drawn by the policy"), ("tool", "tool result: never trained"),
                       ("fork", "the token that was drawn again")):  # fmt: skip
        shapes += [box(x, y - 11, 14, 14, css, 3), text(x + 20, y, words, size=13, css="faint")]
        x += 40 + 7.0 * len(words)
    return shapes


def draw(tree: Tree, leaf: Tree, tokenizer: Tokenizer, theme: str) -> str:
    """The picture of `leaf` (a branch) and of the root it left."""
    parent = tree["leaves"][leaf["parent_leaf"]]
    siblings = [x for x in tree["leaves"] if x["parent_leaf"] == leaf["parent_leaf"]]
    split, other = leaf["split"], {x["split"] for x in siblings} - {leaf["split"]}

    root = pieces(response(tree, parent), tokenizer, {split, *other}, True)
    whole = pieces(response(tree, leaf), tokenizer, {split}, True)
    own = [(at, role, value) for at, role, value in whole if at >= split]
    indent = LEFT + 26 + sum(width_of(v, SIZE) + PAD + GAP for at, _, v in root if at < split)
    shapes, place, end = draw_row(LEFT, indent, ROW["root"], root, {split: "fork"})
    fork_x = place[split][0]
    branch, own_place, branch_end = draw_row(fork_x, indent, ROW["branch"], own, {split: "fork"})
    width = max(end, branch_end) + width_of("reward 0", SIZE) + 54

    question = next(m["content"] for m in tree["task"]["messages"] if m["role"] == "user")
    roots = sum(x["branch"] is None for x in tree["leaves"])
    note = f"Branch: shares the first {split} tokens, draws the next one and all that follows."
    line_x = fork_x + 10
    marks = [
        text(LEFT, 40, question, size=17, bold=True),
        text(LEFT + 11.3 * len(question), 40, f"answer: {tree['task']['answer']}", css="faint"),
        text(LEFT, 76, f"Root: one of {roots} rollouts drawn from the question.", size=14),
        text(LEFT, 98, "▾ where its other branches begin", size=13, css="faint"),
        path(f"M {line_x:.1f} {ROW['root'] + HEIGHT} V {ROW['branch']}", "line", 2.5),
        text(indent, ROW["branch"] - 14, note, size=14),
    ]
    for at in sorted(other):
        marks.append(text(place[at][0] + 1, place[at][1] - 6, "▾", size=13, css="faint"))
    parts = [*shapes, *branch, *marks, *legend(358),
             *reward_badge(end, place[max(place)][1], parent["reward"]),
             *reward_badge(branch_end, own_place[max(own_place)][1], leaf["reward"])]  # fmt: skip
    description = (
        f"{question} The root reads {' '.join(v for _, _, v in root)} "
        f"and has reward {parent['reward']:g}. The branch shares the first {split} tokens, reads "
        f"{' '.join(v for _, _, v in own)} after them, and has reward {leaf['reward']:g}."
    )
    return picture(width, 380, "A rollout tree with one branch", description, parts, theme=theme)


def main() -> None:
    """Draw one tree of a file of rollouts into the picture that the command line names."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("trees", nargs="?", type=Path, default=HERE / "tree.jsonl")
    parser.add_argument("--line", type=int, default=0, help="which tree of the file, from 0")
    parser.add_argument("--leaf", type=int, default=8, help="number of a branch among its leaves")
    parser.add_argument("--tokenizer", type=Path, help="tokenizer.json of the run's model")
    parser.add_argument("--out", type=Path, default=HERE / "tree.svg")
    parser.add_argument("--theme", choices=("auto", "light", "dark"), default="auto")
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit 1 on a difference"
    )
    args = parser.parse_args()
    tree = json.loads(args.trees.read_text(encoding="utf-8").splitlines()[args.line])
    leaf = tree["leaves"][args.leaf]
    if leaf["branch"] is None:
        branches = [i for i, x in enumerate(tree["leaves"]) if x["branch"] is not None]
        parser.error(f"--leaf {args.leaf} is a root; branches are {branches}")
    write_or_check(args.out, draw(tree, leaf, decoder(args.tokenizer), args.theme), args.check)


if __name__ == "__main__":
    main()
