"""A few SVG shapes with one palette for a light and one for a dark page. No dependency.

A picture is drawn once. Its colors are classes; a reader with a dark desktop gets the second
palette through `prefers-color-scheme`. Every picture has its own background, so the first palette
is legible on a dark page too, where a viewer ignores that query.
"""

from __future__ import annotations

import sys
from html import escape
from pathlib import Path

MONO = "ui-monospace, SFMono-Regular, Menlo, Consolas, 'DejaVu Sans Mono', monospace"
SANS = "system-ui, -apple-system, 'Segoe UI', Helvetica, Arial, 'DejaVu Sans', sans-serif"
ADVANCE = 0.602  # width of a monospace letter over the font size

# class: (light fill, dark fill, light stroke, dark stroke); None: no paint
PALETTE: dict[str, tuple[str | None, str | None, str | None, str | None]] = {
    "page": ("#ffffff", "#0d1117", "#d1d9e0", "#3d444d"),
    "ink": ("#1f2328", "#f0f6fc", None, None),
    "faint": ("#59636e", "#9198a1", None, None),
    "model": ("#ddf4ff", "#0c2d4f", "#54aeff", "#388bfd"),
    "tool": ("#f6f8fa", "#212830", "#9198a1", "#656c76"),
    "fork": ("#fff1c2", "#4d3800", "#bf8700", "#d29922"),
    "good": ("#dafbe1", "#0f3d1e", "#1a7f37", "#3fb950"),
    "bad": ("#ffebe9", "#55181b", "#cf222e", "#f85149"),
    "line": (None, None, "#bf8700", "#d29922"),
    "arrow": (None, None, "#59636e", "#9198a1"),
    "arrowhead": ("#59636e", "#9198a1", None, None),
}


def _rules(dark: bool) -> str:
    lines = []
    for name, (fill, fill_dark, stroke, stroke_dark) in PALETTE.items():
        paint = (fill_dark, stroke_dark) if dark else (fill, stroke)
        text = f"fill: {paint[0] or 'none'}; stroke: {paint[1] or 'none'}"
        lines.append(f".{name} {{ {text} }}")
    return "\n".join(lines)


def width_of(text: str, size: float) -> float:
    """Width of monospace `text` in pixels."""
    return len(text) * size * ADVANCE


def text(x: float, y: float, value: str, *, size: float = 14, css: str = "ink", anchor: str = "start",
         mono: bool = False, bold: bool = False) -> str:  # fmt: skip
    """One line of text; (x, y) is the baseline at `anchor`. `width_of` fixes monospace widths."""
    family = "mono" if mono else "sans"
    fit = (
        f' textLength="{width_of(value, size):.1f}" lengthAdjust="spacingAndGlyphs"' if mono else ""
    )
    weight = ' font-weight="600"' if bold else ""
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" class="{css} {family}" font-size="{size:g}" '
        f'text-anchor="{anchor}"{weight}{fit} xml:space="preserve">{escape(value)}</text>'
    )


def box(x: float, y: float, width: float, height: float, css: str, radius: float = 4) -> str:
    """A rectangle with rounded corners, in pixels."""
    return (
        f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" '
        f'rx="{radius:g}" class="{css}"/>'
    )


def path(d: str, css: str, width: float = 2) -> str:
    """A line along the path data `d`, `width` pixels thick."""
    return f'<path d="{d}" class="{css}" stroke-width="{width:g}"/>'


def picture(width: float, height: float, title: str, description: str, parts: list[str],
            *, theme: str = "auto") -> str:  # fmt: skip
    """The SVG file. theme "light" or "dark" fixes the palette, for viewers without such queries."""
    rules = _rules(theme == "dark")
    if theme == "auto":
        rules += f"\n@media (prefers-color-scheme: dark) {{\n{_rules(True)}\n}}"
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" '
            f'width="{width:g}" height="{height:g}" role="img" aria-labelledby="title desc">',
            f'<title id="title">{escape(title)}</title>',
            f'<desc id="desc">{escape(description)}</desc>',
            f"<style>\n.mono {{ font-family: {MONO} }}\n.sans {{ font-family: {SANS} }}",
            f"{rules}\n</style>",
            box(0.5, 0.5, width - 1, height - 1, "page", 8),
            *parts,
            "</svg>\n",
        ]
    )


def write_or_check(file: Path, content: str, check: bool) -> None:
    """Write the picture; with `check`, exit 1 if the file on disk is another one."""
    if not check:
        file.write_text(content, encoding="utf-8")
    elif not file.is_file() or file.read_text(encoding="utf-8") != content:
        sys.exit(f"{file} is not what its script draws; run the script without --check")
