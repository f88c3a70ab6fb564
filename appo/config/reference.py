"""Every key of the configuration with its type, default, meaning and what a resumed run may do with
it.

The meaning of a key is the comment above its field. Comments are read from the source, so that the
dataclasses stay as short to read as they are; docs/configuration.md is written from `keys()`.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import io
import tokenize
import typing
from collections.abc import Iterator
from typing import Any

from appo.config.marks import Resume, resume_marks
from appo.config.schema import Config


@dataclasses.dataclass(frozen=True)
class Key:
    """One key. section: the docstring of its dataclass; default: the value, ready for YAML."""

    name: str  # "learner.lr"
    section: str
    type: str  # 'float', "'lora' | 'full'", 'int | null'
    default: Any
    doc: str
    resume: Resume


def keys() -> list[Key]:
    """All keys of a recipe, in the order of the fields."""
    return [k for k in _keys(Config, "", resume_marks(Config)) if k.name != "recipe"]


def _keys(cls: type, prefix: str, marks: dict[str, Resume]) -> Iterator[Key]:
    hints, docs = typing.get_type_hints(cls), comments(cls)
    defaults = cls()
    for f in dataclasses.fields(cls):
        hint, name = hints[f.name], prefix + f.name
        if dataclasses.is_dataclass(hint):
            yield from _keys(typing.cast(type, hint), name + ".", marks)
            continue
        value = getattr(defaults, f.name)
        section = inspect.getdoc(cls) or ""
        yield Key(name, section, type_text(hint), value, docs.get(f.name, ""), marks[name])


def comments(cls: type) -> dict[str, str]:
    """{field: the comment lines directly above it, or behind it on its line} of a class, from its
    source.
    """
    source = inspect.getsource(cls)
    (node,) = ast.parse(source).body
    assert isinstance(node, ast.ClassDef)
    found: dict[int, tuple[str, bool]] = {}  # line → (text, alone on its line)
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            alone = not token.line[: token.start[1]].strip()
            found[token.start[0]] = (token.string.lstrip("# "), alone)
    out: dict[str, str] = {}
    for statement in node.body:
        if not isinstance(statement, ast.AnnAssign) or not isinstance(statement.target, ast.Name):
            continue
        above: list[str] = []
        line = statement.lineno
        while (line := line - 1) in found and found[line][1]:
            above.insert(0, found[line][0])
        behind, alone = found.get(statement.end_lineno or 0, ("", True))
        text = " ".join([*above, *([] if alone else [behind])])
        if text:
            out[statement.target.id] = text
    return out


def type_text(hint: Any) -> str:
    """A type as a user of YAML would write it: `int | null`, `'lora' | 'full'`, `list of str`."""
    args = typing.get_args(hint)
    if hint is type(None):
        return "null"
    if typing.get_origin(hint) is typing.Literal:
        return " | ".join(map(repr, args))
    if typing.get_origin(hint) is list:
        return f"list of {type_text(args[0])}"
    if typing.get_origin(hint) is dict:
        return "mapping"
    if args:
        return " | ".join(map(type_text, args))
    return str(getattr(hint, "__name__", hint))
