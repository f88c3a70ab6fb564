"""Pages can be followed and read: links and anchors lead somewhere, lines are short, named files exist."""

import re
import subprocess
import sys
from itertools import pairwise

import pytest
from support.pages import NAMES, PAGES, ROOT, anchors, blocks, inline_code, links, prose

WIDTH = 100
FOLDERS = "appo|bench|csrc|docs|examples|kernels|tests|requirements"
PLACE = re.compile(rf"^(?:{FOLDERS})/[\w./*{{}},<>-]*$")
each_page = pytest.mark.parametrize("page", PAGES, ids=NAMES)


@each_page
def test_links_and_anchors_lead_somewhere(page):
    lost = []
    for link in links(page):
        if re.match(r"^[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        there = target.exists() and target.is_relative_to(ROOT)
        if not there or (anchor and anchor not in anchors(target)):
            lost.append(link)
    assert lost == []


def test_a_lost_link_is_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# A b, `c`\n[x](#a-b-c) [y](gone.md) `[z](code)`\n```text\n[w](no)\n```\n")
    assert links(page) == ["#a-b-c", "gone.md"] and anchors(page) == {"a-b-c"}


@each_page
def test_lines_are_at_most_100_columns(page):
    """Tables, headings and lines that are one long link or address cannot be wrapped."""
    wide = [
        f"{page.name}:{n}: {len(line)}"
        for n, line in enumerate(page.read_text().splitlines(), 1)
        if len(line) > WIDTH and not line.lstrip().startswith(("|", "#", "<!--"))
        and len(max(line.split(), key=len)) < WIDTH - 20
    ]  # fmt: skip
    assert wide == []


@each_page
def test_lists_and_tables_follow_a_blank_line(page):
    """Otherwise the site shows them as running text."""
    lines = prose(page).splitlines()
    glued = [
        f"{page.name}:{n}"
        for n, (before, line) in enumerate(pairwise(lines), 2)
        if before.strip() and (begins := re.match(r"(\||[-*] |\d+\. )", line))
        and not before.startswith(("|", "  ") if begins[0] == "|" else ("- ", "* ", "  "))
        and not re.match(r"\d+\. ", before)
    ]  # fmt: skip
    assert glued == []


@each_page
def test_files_named_in_the_text_exist(page):
    """`bench/x.py`, `csrc/{a,b}/`, `tests/*.py`; a place with <words> in it is a pattern for the reader."""
    found = [code.split()[-1] if code.startswith("python ") else code.split()[0]
             for code in inline_code(page) if code.strip()]  # fmt: skip
    places = {code for code in found if PLACE.match(code) and "<" not in code}
    lost = [place for place in places for path in braces(place) if not any_file(path)]
    assert sorted(lost) == []


@each_page
def test_files_blocks_list_what_exists(page):
    listed = [line for block in blocks(page, "files") for line in block.text.split()]
    assert [place for place in listed if not (ROOT / place).exists()] == []


def test_contributing_says_which_files_each_addition_touches():
    page = ROOT / "CONTRIBUTING.md"
    titles = re.findall(r"^## (Add an? .*)$", prose(page), re.M)
    assert len(titles) == 5 and len(blocks(page, "files")) == len(titles)


def braces(place):
    """`a/{b,c}` → `a/b`, `a/c`."""
    found = re.search(r"\{([^}]*)\}", place)
    if not found:
        return [place]
    parts = [place[: found.start()] + word + place[found.end() :] for word in found[1].split(",")]
    return [path for part in parts for path in braces(part)]


def any_file(place):
    """Whether a path or a pattern names something; a dot at the end is the sentence's."""
    return (
        any(ROOT.glob(place.rstrip("/."))) if "*" in place else (ROOT / place.rstrip(".")).exists()
    )


def test_generated_pages_are_current():
    done = subprocess.run(
        [sys.executable, "docs/generate.py", "--check"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
