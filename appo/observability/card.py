"""Blocks of text for a terminal, a log or a Markdown file.

The start-up card, tables, and harmless foreign text.

Whatever a model wrote may hold escape sequences, newlines or characters that change the reading
direction. It goes through `escape` before anybody sees it.
"""

from __future__ import annotations

import textwrap
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Any

_SHORT = {"\n": "\\n", "\r": "\\r", "\t": "\\t"}
# Control, format (bidi overrides, zero-width), surrogate, unassigned; line and paragraph
# separators.
_HIDDEN = frozenset({"Cc", "Cf", "Cs", "Cn", "Zl", "Zp"})


def escape(text: str, keep: str = "") -> str:
    r"""`text` with every control or invisible character spelled out, except those in `keep`.

    >>> escape("a\n\x1b[31mb")
    'a\\n\\x1b[31mb'
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(
        c if c in keep or unicodedata.category(c) not in _HIDDEN else _SHORT.get(c) or _code(c)
        for c in text
    )


def _code(c: str) -> str:
    n = ord(c)
    return f"\\x{n:02x}" if n < 0x100 else f"\\u{n:04x}" if n < 0x10000 else f"\\U{n:08x}"


def elide(text: str, limit: int) -> str:
    """At most `limit` characters: both ends, and in the middle how many are left out.

    >>> elide("abcdefghijklmnopqrstuvwxyz", 20)
    'abcd … 18 … wxyz'
    """
    if len(text) <= limit:
        return text
    for shown in range(
        limit, 1, -1
    ):  # the count's own width depends on what is cut: search from the largest
        gap = f" … {len(text) - shown:,} … "
        if shown + len(gap) <= limit:
            head = (shown + 1) // 2
            return text[:head] + gap + text[len(text) - (shown - head) :]
    return text[: max(limit - 1, 0)] + "…"


def wrap(text: str, width: int) -> list[str]:
    """Lines of at most `width`; blanks inside a line stay as they are, over-long words are broken."""
    return textwrap.wrap(
        text, max(width, 8), drop_whitespace=True, break_on_hyphens=False, replace_whitespace=False
    ) or [""]


# -- the card ------------------------------------------------------------------------------------


def card_text(
    title: str, rows: Sequence[tuple[str, str]], warnings: Sequence[str] = (), width: int = 100
) -> str:
    """The card without colour.

    Aligned labels, values wrapped with a hanging indent, warnings last.
    """
    title = escape(title)
    column = max((len(label) for label, _ in rows), default=0) + 2
    lines = [title, "-" * min(len(title), width)]
    for label, value in rows:
        # Values may hold several lines on purpose; each is wrapped on its own.
        parts = [p for line in escape(value, "\n").split("\n") for p in wrap(line, width - column)]
        lines += [(escape(label) if i == 0 else "").ljust(column) + p for i, p in enumerate(parts)]
    lines += [f"warning: {escape(w)}" for w in warnings]
    return "\n".join(line.rstrip() for line in lines)


def card_rich(title: str, rows: Sequence[tuple[str, str]], warnings: Sequence[str] = ()) -> Any:
    """The card as a rich renderable."""
    from rich import box
    from rich.console import Group
    from rich.panel import Panel
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for label, value in rows:
        table.add_row(Text(escape(label)), Text(escape(value, "\n")))
    parts: list[Any] = [table]
    if warnings:
        parts.append(Text(""))
        parts += [Text.assemble(("! ", "bold red"), (escape(w), "red")) for w in warnings]
    return Panel(
        Group(*parts),
        title=Text(escape(title), "bold"),
        title_align="left",
        box=box.ROUNDED,
        border_style="dim",
        padding=(0, 1),
        expand=False,
    )


# -- Markdown ------------------------------------------------------------------------------------


def md_table(header: Sequence[str], rows: Iterable[Sequence[str]], text_columns: int = 1) -> str:
    """A Markdown table.

    The first `text_columns` columns are left-aligned, the others (numbers) right.
    """
    align = [":--" if i < text_columns else "--:" for i in range(len(header))]
    return "\n".join("| " + " | ".join(r) + " |" for r in [header, align, *rows])


def md_code(text: str, limit: int = 40) -> str:
    """Foreign text as a code span that fits into a table cell."""
    shown = elide(escape(text), limit).replace("|", "\\|")
    if "`" in shown:
        return f"`` {shown} ``"
    # A span of blanks only would collapse.
    return f"`{shown}`" if shown.strip() else f"`{shown!r}`"
