"""A hook of mkdocs.

Links to source files, which a reader of the repository can follow, on a site of the pages alone.

With `repo_url` in mkdocs.yml they lead there. Without it their words stay, as code.
"""

from __future__ import annotations

import posixpath
import re
from typing import Any

LINK = re.compile(r"\[([^\]]+)\]\(((?:\.\./)+[^)#\s]+)(#[^)\s]*)?\)")
FENCE = re.compile(r"(^```.*?^```)", re.M | re.S)


def on_page_markdown(markdown: str, page: Any, config: Any, **_: Any) -> str:
    """The page with links that leave docs/ rewritten; code blocks as they are."""
    parts = FENCE.split(markdown)
    parts[::2] = [outside(text, page.file.src_uri, config.repo_url) for text in parts[::2]]
    return "".join(parts)


def outside(text: str, page: str, repo_url: str | None) -> str:
    """`page`: path below docs/, from which `../` counts."""

    def put(link: re.Match[str]) -> str:
        words, target = link[1], link[2]
        path = posixpath.normpath(posixpath.join("docs", posixpath.dirname(page), target))
        if path.startswith("docs/"):
            return link[0]
        if repo_url:
            return f"[{words}]({repo_url.rstrip('/')}/blob/main/{path}{link[3] or ''})"
        return words if words.startswith("`") else f"`{words}`"

    return LINK.sub(put, text)
