"""What each key means: the comment at its field, read from the source.

The dataclasses stay as short to read as they are; docs/generate.py makes docs/configuration.md.
"""

from __future__ import annotations

import ast
import inspect
import io
import tokenize


def meanings(cls: type) -> dict[str, str]:
    """{field: its meaning} of a class, from its source.

    A meaning is the comment lines directly above the field, or behind it on its line.
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
