"""What a resumed run may do with a key, written as the key's type.

`threads: Free[int | None] = None`.

A key without a mark must keep the value of the checkpoint, so a new key is refused on resume until
somebody says why it may change. A mark on a group of keys holds for all keys of the group. Type
checkers see the bare type.
"""

from __future__ import annotations

import dataclasses
import typing
from enum import Enum
from typing import Annotated, TypeVar

T = TypeVar("T")


class Resume(Enum):
    """What a resumed run does with another value of a key."""

    SAME = "must stay as it was"
    FREE = "may change"
    ROUNDING = "may change; equal up to rounding only"
    HIDDEN = "always differs"


Free = Annotated[T, Resume.FREE]  # cannot change what a step computes
Rounding = Annotated[T, Resume.ROUNDING]  # sums in another order, or in other pieces
Hidden = Annotated[T, Resume.HIDDEN]  # always another value, and never of interest


def resume_marks(cls: type, prefix: str = "", group: Resume = Resume.SAME) -> dict[str, Resume]:
    """{"learner.lr": Resume.SAME, …} for every key below `cls`, in the order of the fields."""
    hints = typing.get_type_hints(cls, include_extras=True)
    out: dict[str, Resume] = {}
    for f in dataclasses.fields(cls):
        hint, mark = hints[f.name], group
        if typing.get_origin(hint) is Annotated:
            hint, *extras = typing.get_args(hint)
            mark = next((m for m in extras if isinstance(m, Resume)), mark)
        if isinstance(hint, type) and dataclasses.is_dataclass(hint):
            out |= resume_marks(hint, f"{prefix}{f.name}.", mark)
        else:
            out[prefix + f.name] = mark
    return out
