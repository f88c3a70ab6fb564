"""`RolloutTree` ↔ JSON, exactly.

What is read back equals what was written, to the last bit of a logprob.

This is the file format that everything which shows a run reads (`appo.rollout.store` writes it).
Numbers of numpy become Python numbers of the same value; what JSON cannot say (tuples, keys that
are not text, NaN) is tagged `{"$kind": …}`. An object of a type unknown here is kept as its `repr`,
under its own tag.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from appo.errors import DataError
from appo.observability.renamed import NODE, in_todays_words
from appo.types import Finish, Leaf, Node, RolloutTree, Task, ToolCall

FORMAT = 1

_NODE = ("parent", "role", "fork_at", "token_ids", "logprobs", "entropy", "policy_version", "path",
         "closed", "old_logp")  # fmt: skip
_LEAF = ("node", "root", "branch", "parent_leaf", "split", "branch_score", "branch_rule", "branch_z",
         "finish", "reward", "reward_parts", "grade_error")  # fmt: skip
_CALL = ("tool", "argument", "output", "ok", "wall_s", "error_kind", "tokens")
_TASK = ("task_id", "messages", "answer", "tools", "grader", "source", "meta")
_TUPLES = frozenset({"path", "tools", "branch_z"})  # tuples by type: written as plain lists


def tree_to_json(tree: RolloutTree) -> dict[str, Any]:
    """A tree as JSON types only.

    `step` stands at the top so that a resumed run can cut the file.
    """
    return {
        "format": FORMAT,
        "step": encode(tree.step),
        "task": _record(tree.task, _TASK),
        "stats": encode(tree.stats),
        "nodes": [_record(n, _NODE) for n in tree.nodes],
        "leaves": [
            _record(leaf, _LEAF) | {"tool_calls": [_record(c, _CALL) for c in leaf.tool_calls]}
            for leaf in tree.leaves
        ],
    }


def tree_from_json(data: dict[str, Any]) -> RolloutTree:
    """The tree that `tree_to_json` wrote.

    Keys that are not known are ignored (text for readers, later additions).

    Raises DataError if it is of a newer format or lacks a field.
    """
    if data.get("format", FORMAT) != FORMAT:
        raise DataError(
            f"a saved tree has format {data['format']!r}, this version reads {FORMAT}; read it with the version of "
            "appo that wrote it"
        )
    try:
        return RolloutTree(
            task=Task(**_fields(data["task"], _TASK)),
            nodes=[Node(**_fields(in_todays_words(n, NODE), _NODE)) for n in data["nodes"]],
            leaves=[_leaf(x) for x in data["leaves"]],
            step=data["step"],
            stats=decode(data["stats"]),
        )
    except (KeyError, TypeError, ValueError) as e:
        raise DataError(f"a saved tree is incomplete or malformed: {type(e).__name__}: {e}") from e


def _leaf(data: dict[str, Any]) -> Leaf:
    fields = _fields(data, _LEAF)
    if fields.get("finish") is not None:
        fields["finish"] = Finish(fields["finish"])
    calls = [ToolCall(**_fields(c, _CALL)) for c in data["tool_calls"]]
    return Leaf(**fields, tool_calls=calls)


def _record(obj: Any, names: tuple[str, ...]) -> dict[str, Any]:
    out = {}
    for name in names:
        value = getattr(obj, name)
        if name in _TUPLES and value is not None:
            value = list(value)
        out[name] = encode(value)
    return out


def _fields(data: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    """Constructor arguments; a field that the file lacks gets the default of its class."""
    out = {name: decode(data[name]) for name in names if name in data}
    return {k: tuple(v) if k in _TUPLES and v is not None else v for k, v in out.items()}


# -- any value -----------------------------------------------------------------------------------


def encode(value: Any) -> Any:
    """JSON types for `value`; see the module for what is tagged."""
    if isinstance(value, Finish):
        return value.value
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"$float": repr(value)}
    if isinstance(value, list):
        return [encode(v) for v in value]
    if isinstance(value, tuple):
        return {"$tuple": [encode(v) for v in value]}
    if isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
        return {"$array": [encode(v) for v in value.ravel()], "dtype": value.dtype.str,
                "shape": list(value.shape)}  # fmt: skip
    if isinstance(value, dict):
        if all(isinstance(k, str) and not k.startswith("$") for k in value):
            return {k: encode(v) for k, v in value.items()}
        return {"$dict": [[encode(k), encode(v)] for k, v in value.items()]}
    return {"$repr": repr(value), "type": type(value).__qualname__}


def decode(value: Any) -> Any:
    """Inverse of `encode` (a `$repr` comes back as the text it is)."""
    if isinstance(value, list):
        return [decode(v) for v in value]
    if not isinstance(value, dict):
        return value
    if "$float" in value:
        return float(value["$float"])
    if "$tuple" in value:
        return tuple(decode(v) for v in value["$tuple"])
    if "$array" in value:
        flat = [decode(v) for v in value["$array"]]
        return np.asarray(flat, np.dtype(value["dtype"])).reshape(value["shape"])
    if "$dict" in value:
        return {decode(k): decode(v) for k, v in value["$dict"]}
    if "$repr" in value:
        return value["$repr"]
    return {k: decode(v) for k, v in value.items()}
