"""Every key is documented beside its field, and the documentation is read from there."""

from dataclasses import dataclass
from typing import Literal

from appo.config import Config
from appo.config.marks import Free, Resume
from appo.config.reference import comments, keys, type_text
from appo.run.resume import flatten


def test_every_key_has_a_meaning_a_type_and_its_default():
    found = {k.name: k for k in keys()}
    default = flatten(Config())
    assert set(found) == (set(default) - {"recipe"}) | {"data.params"}
    assert not [name for name, k in found.items() if not k.doc.endswith(".")]
    for name, key in found.items():
        if name != "data.params":
            assert key.default == default[name], name
    lr = found["learner.lr"]
    assert (lr.type, lr.section, lr.resume) == ("float", "How to train.", Resume.SAME)
    assert found["learner.mode"].type == "'lora' | 'full'"


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
    assert comments(Example) == {"a": "Two lines above.", "b": "Behind.", "d": "Above, and behind."}


def test_types_as_a_user_writes_them():
    assert type_text(int | None) == "int | null"
    assert type_text(list[str]) == "list of str"
    assert type_text(int | Literal["all"]) == "int | 'all'"
