"""Every key is documented at its field, and the documentation is read from there."""

import dataclasses
import typing
from dataclasses import dataclass
from typing import Literal

from appo.config import Config
from appo.config.marks import Free
from appo.config.meanings import meanings


def keys(cls, prefix=""):
    """(dotted key, meaning) of all fields that hold a value."""
    hints, found = typing.get_type_hints(cls), meanings(cls)
    for f in dataclasses.fields(cls):
        if dataclasses.is_dataclass(hints[f.name]):
            yield from keys(hints[f.name], f"{prefix}{f.name}.")
        else:
            yield prefix + f.name, found.get(f.name, "")


def test_every_key_has_a_meaning():
    found = dict(keys(Config))
    assert len(found) > 90 and found["learner.lr"] == "Peak learning rate of AdamW."
    assert [key for key, text in found.items() if not text.endswith(".")] == []


@dataclass
class Example:
    # Two lines
    # above.
    a: int = 1
    b: Free[int | Literal["all"]] = 2  # Behind.

    # Of nothing.

    c: str = "# no comment"
    # Above,
    d: str | None = None  # and behind.


def test_comments_above_and_behind_a_field():
    assert meanings(Example) == {"a": "Two lines above.", "b": "Behind.", "d": "Above, and behind."}
