"""Trees on disk: one tree per line of a JSON-lines file, complete enough to learn from again.

Text is written next to the ids (`text` of a node, `token` of a branch point) for people and for the
report; it is never read back into a tree. `minibatch` is the mini-batch of its step that a tree was
trained in, from 0; a replay puts it back there (`read_step`). The format itself is
`appo.observability.codec`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from appo.errors import DataError
from appo.observability.codec import tree_from_json, tree_to_json
from appo.observability.lines import append_lines, cut_after, read_lines, to_line
from appo.types import RolloutTree

__all__ = [
    "TREES", "append_trees", "cut_after", "read_step", "read_trees", "tree_from_json", "tree_to_json",
]  # fmt: skip

TREES = "trees.jsonl"

Text = Callable[[Sequence[int]], str]


def append_trees(
    path: Path | str,
    trees: Sequence[RolloutTree],
    text: Text | None = None,
    minibatch: Sequence[int] | None = None,
) -> None:
    """Append trees, after removing what a kill may have left of the last line.

    text: ids to readable text · minibatch: number of each tree's mini-batch, for `read_step`. A run
    that resumes calls `cut_after(path, step)` first.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if not _ends_whole(path):
        cut_after(path, None)
    lines = [_with_text(t, text) for t in trees]
    for data, k in zip(lines, minibatch or (), strict=minibatch is not None):
        data["minibatch"] = k
    append_lines(path, [to_line(data) for data in lines])


def read_trees(path: Path | str) -> Iterator[RolloutTree]:
    """The trees of a file in order; a torn last line is left out.

    Raises DataError if there is no such file or a line before the last is damaged.
    """
    for data in _saved(Path(path)):
        yield tree_from_json(data)


def read_step(path: Path | str, step: int) -> dict[int, list[RolloutTree]]:
    """Mini-batch → its trees, in the order in which they were saved.

    {} if the file holds none of that step.

    Raises DataError as `read_trees` does, and for a tree that was saved without the number of its
    mini-batch.
    """
    out: dict[int, list[RolloutTree]] = {}
    for data in _saved(Path(path)):
        if data.get("step") != step:
            continue
        if "minibatch" not in data:
            raise DataError(
                f"{path}: a tree of step {step} does not say which mini-batch it was trained in; it was not saved by a "
                "training run of this version"
            )
        out.setdefault(int(data["minibatch"]), []).append(tree_from_json(data))
    return dict(sorted(out.items()))


def _saved(path: Path) -> Iterator[dict[str, Any]]:
    if not path.is_file():
        raise DataError(f"{path}: no such file; trees are saved in the run folder as {TREES}")
    return read_lines(path)


def _ends_whole(path: Path) -> bool:
    if not path.exists() or path.stat().st_size == 0:
        return True
    with open(path, "rb") as f:
        f.seek(-1, 2)
        return f.read(1) == b"\n"


def _with_text(tree: RolloutTree, text: Text | None) -> dict[str, Any]:
    data = tree_to_json(tree)
    if text is None:
        return data
    for node, out in zip(tree.nodes, data["nodes"], strict=True):
        out["text"] = text(node.token_ids)
    for leaf, out in zip(tree.leaves, data["leaves"], strict=True):
        if leaf.parent_leaf is None or leaf.split is None:
            continue
        ids = tree.trajectory(leaf.parent_leaf).response_ids[leaf.split : leaf.split + 1]
        out["token_id"] = [int(t) for t in ids]
        out["token"] = text(out["token_id"])
    return data
