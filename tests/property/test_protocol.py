"""The tag parser gives the same events however its input is cut, and never sees a tag in what it was not fed."""

import re

from hypothesis import given, settings
from hypothesis import strategies as st

from appo.rollout.tags import TagEvent, TagParser

PIECES = st.sampled_from(
    [
        "<python>",
        "</python>",
        "<answer>",
        "</answer>",
        "<result>",
        "</result>",
        "<",
        ">",
        "</",
        "py",
        "thon>",
        "é",
        "x",
        "\n",
        "1+1",
    ]
)
TEXTS = st.lists(PIECES, max_size=30).map("".join)
TAGS = ["python", "answer"]


def reference(text: str) -> list[TagEvent]:
    """Whole-text definition: the first opening tag, then its own first closing tag, and so on."""
    out, at = [], 0
    while m := re.compile("<(python|answer)>").search(text, at):
        end = text.find(f"</{m[1]}>", m.end())
        if end < 0:
            break
        out.append(TagEvent(m[1], text[m.end() : end]))
        at = end + len(m[1]) + 3
    return out


@settings(max_examples=300, deadline=None)
@given(TEXTS, st.lists(st.integers(1, 9), min_size=1, max_size=20))
def test_any_chunking_gives_the_same_events(text, cuts):
    data, parser, got, at, i = text.encode(), TagParser(TAGS), [], 0, 0
    while at < len(data):
        step = cuts[i % len(cuts)]
        got += parser.feed(data[at : at + step])
        at, i = at + step, i + 1
    assert got == reference(text)


def test_two_calls_in_one_piece_come_in_order():
    events = TagParser(TAGS).feed(b"<python>a</python> <python>b</python><answer>c")
    assert events == [TagEvent("python", "a"), TagEvent("python", "b")]
