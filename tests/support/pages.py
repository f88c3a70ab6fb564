"""The Markdown of the repository, taken apart: fenced blocks, links, headings, inline code."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted(
    [ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")]
    + list((ROOT / "docs").rglob("*.md"))
)
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
FENCE = re.compile(r"^(?P<in> *)```(?P<tag>\w*)\n(?P<text>.*?)^(?P=in)```$", re.M | re.S)
LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)|!\[[^\]]*\]\(([^)\s]+)\)")
CODE = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")


class Block(NamedTuple):
    """A fenced block: its tag ("" for none), text, and the line of its fence."""

    tag: str
    text: str
    line: int


def blocks(page: Path, tag: str | None = None) -> list[Block]:
    """Fenced blocks of a page, or those with one tag."""
    text = page.read_text()
    found = [
        Block(m["tag"], m["text"], text.count("\n", 0, m.start()) + 1) for m in FENCE.finditer(text)
    ]
    return [b for b in found if tag is None or b.tag == tag]


def prose(page: Path) -> str:
    """The page without its fenced blocks; lines keep their numbers."""
    return FENCE.sub(lambda m: "\n" * m[0].count("\n"), page.read_text())


def links(page: Path) -> list[str]:
    """Targets of links and pictures, outside code."""
    text = CODE.sub(lambda m: "x" * len(m[0]), prose(page))
    return [a or b for a, b in LINK.findall(text)]


def anchors(page: Path) -> set[str]:
    """Anchors of the headings, as a viewer of the repository makes them."""
    found: set[str] = set()
    for title in re.findall(r"^#{1,6} +(.*?)\s*#*$", prose(page), re.M):
        words = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", title).replace("`", "").strip().lower()
        slug = re.sub(r"[^\w\- ]", "", words).replace(" ", "-")
        n = 0
        while (name := f"{slug}-{n}" if n else slug) in found:
            n += 1
        found.add(name)
    return found


def inline_code(page: Path) -> list[str]:
    """Code between single backticks, outside fenced blocks."""
    return CODE.findall(prose(page))


def commands(text: str) -> list[list[str]]:
    """The commands of a shell block as words.

    Comments, variables set before a command and `&&` taken away.
    """
    out = []
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        while words:
            end = words.index("&&") if "&&" in words else len(words)
            command, words = words[:end], words[end + 1 :]
            while command and re.match(r"^[A-Z_]+=", command[0]):
                command = command[1:]
            if command:
                out.append(command)
    return out
