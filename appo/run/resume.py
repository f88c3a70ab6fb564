"""Which settings a resumed run may change.

The checkpoint's configuration against the one of now, key by key.

A run that goes on must compute what it would have computed. Keys that cannot change that are free;
keys that change it within rounding only are allowed and named; every other difference is refused.
Which key is which stands beside the key: `appo.config.marks`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from appo.config import Config
from appo.config.marks import Resume, resume_marks
from appo.errors import CheckpointError


class Change(NamedTuple):
    """One key with another value than in the checkpoint."""

    key: str
    old: Any
    new: Any

    def __str__(self) -> str:
        return f"{self.key}: {self.old!r} -> {self.new!r}"


def flatten(cfg: Config) -> dict[str, Any]:
    """{"learner.lr": 1e-6, …}: every key of a configuration with its value, fit for JSON.

    Part of a checkpoint.
    """
    return dict(_leaves("", dataclasses.asdict(cfg)))


def changed(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[Change]:
    """Keys whose values differ, in the order of `now`.

    A key that the checkpoint is too old to know had its default.
    """
    defaults = flatten(Config())
    keys = [*now, *(k for k in saved if k not in now)]
    pairs = ((k, saved.get(k, defaults.get(k)), now.get(k)) for k in keys)
    return [Change(k, old, new) for k, old, new in pairs if old != new]


def check_config(saved: Mapping[str, Any], cfg: Config, run: str) -> list[str]:
    """Refuse a configuration that does not continue the run whose checkpoint holds `saved`.

    Made by `flatten`.

    run: the run folder, for the message. Returns notes about differences that are accepted. Raises
    CheckpointError that lists the others with old and new values.
    """
    marks = resume_marks(Config)
    differences = [
        c for c in changed(saved, flatten(cfg)) if _mark(c.key, marks) is not Resume.HIDDEN
    ]
    planned = (
        cfg.learner.schedule != "constant"
    )  # then the learning rate depends on the number of steps
    refused, notes = [], []
    for c in differences:
        mark = _mark(c.key, marks)
        if c.key == "steps" and planned:
            refused.append(f"{c} (learner.schedule is {cfg.learner.schedule!r})")
        elif mark is Resume.ROUNDING:
            notes.append(f"changed on resume, equal up to rounding only: {c}")
        elif mark is Resume.FREE:
            late = " (roots that were not drawn ahead yet are drawn with the weights of now)"
            ahead = c.key == "steps" and cfg.staleness and c.new > c.old
            notes.append(f"changed on resume: {c}{late if ahead else ''}")
        else:
            refused.append(str(c))
    if refused:
        kinds = (Resume.FREE, Resume.ROUNDING)
        may = [k for kind in kinds for k, m in marks.items() if m is kind]
        may = [k for k in may if not (planned and k == "steps")]
        raise CheckpointError(
            f"resume={run}: the configuration is not the one of its checkpoint ({'; '.join(refused)}). Set these back, "
            f"or start a new run with another output. What may change: {', '.join(may)}"
        )
    return notes


def _mark(key: str, marks: Mapping[str, Resume]) -> Resume:
    """The mark of a key, or of the key that holds it: data.params.digits is part of data.params."""
    while key not in marks and "." in key:
        key = key.rpartition(".")[0]
    return marks.get(key, Resume.SAME)


def _leaves(prefix: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _leaves(f"{prefix}.{name}" if prefix else str(name), inner)
    else:
        yield prefix, value
