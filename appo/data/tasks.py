"""Tasks by name: an endless or shuffled stream per split, with one resumable cursor.

Every task is a pure function of (task parameters, seed, split, position), so resuming is setting a
number back, and a run refuses to go on with other data than it was started with.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable, Iterator
from typing import Any

from appo.data import own
from appo.data.rl_records import question_text, read_rl_records
from appo.data.sources import (
    Arithmetic,
    ReasoningGym,
    Records,
    Split,
    TaskSource,
    nearest,
    split_of,
    stable_hash,
)
from appo.errors import DataError
from appo.imports import is_import, resolve
from appo.types import Task

__all__ = [
    "TASKS",
    "Cursor",
    "TaskSource",
    "TaskStream",
    "build_tasks",
    "read_rl_records",
    "split_of",
]

# A task is made with (seed=…, tools=…, **data.params); one of the user's own: appo.data.own.
TASKS: dict[str, Callable[..., TaskSource]] = {
    "arithmetic": Arithmetic,
    "reasoning_gym": ReasoningGym,
    "records": Records,
    "jsonl": Records,
    "parquet": Records,
}


class TaskStream:
    """Tasks of one split by position: immutable, so several readers may share it.

    train: position p is defined for every p >= 0; a finite source is shuffled anew (by the seed)
    for each epoch. eval: file or draw order, no repeats, ends after `size` tasks. `identity` says
    in words what the tasks depend on, `fingerprint` is its hash.
    """

    def __init__(self, name: str, source: TaskSource, split: Split, seed: int, size: int | None):
        self.name, self.source, self.split, self.seed = name, source, split, seed
        available = source.count(split)
        if available == 0:
            raise DataError(
                f"data.task={name!r}: the {split} split is empty; give a larger file or data.{split}=FILE"
            )
        known = [n for n in (available, size) if n is not None]
        self.count: int | None = min(known) if known else None
        what = {"task": name, "split": split, "seed": seed, "size": size, **source.describe()}
        self.identity: dict[str, Any] = json.loads(json.dumps(what, default=str))
        self.fingerprint = f"{stable_hash(json.dumps(self.identity, sort_keys=True)):016x}"
        self._order: tuple[int, list[int]] = (-1, [])
        self._distinct: list[Task] = []
        self._seen: set[str] = set()
        self._drawn = 0  # source indices looked at for distinct eval questions

    def __len__(self) -> int:
        """Distinct tasks (of one epoch); sys.maxsize when endless."""
        return sys.maxsize if self.count is None else self.count

    def __getitem__(self, position: int) -> Task:
        if position < 0 or (self.split == "eval" and position >= len(self)):
            raise IndexError(position)
        if self.split == "eval" and self.source.count("eval") is None:
            return self._distinct_task(position)
        if self.count is None or self.split == "eval":
            return self.source.task(self.split, position)
        epoch, place = divmod(position, self.count)
        index = self._epoch(epoch)[place]
        return self.source.task(self.split, index)

    def __iter__(self) -> Iterator[Task]:
        """From position 0; endless for train."""
        position = 0
        while self.split == "train" or position < len(self):
            yield self[position]
            position += 1

    def _epoch(self, epoch: int) -> list[int]:
        if self._order[0] != epoch:
            assert self.count is not None
            # The subset that `size` selects is the same in every epoch, so it is drawn once and
            # then shuffled.
            chosen = list(range(self.source.count(self.split) or self.count))
            random.Random(stable_hash("subset", self.seed)).shuffle(chosen)
            chosen = chosen[: self.count]
            random.Random(stable_hash("epoch", self.seed, epoch)).shuffle(chosen)
            self._order = (epoch, chosen)
        return self._order[1]

    def _distinct_task(self, position: int) -> Task:
        """Procedural evaluation questions without repeats."""
        misses = 0
        while len(self._distinct) <= position:
            task = self.source.task("eval", self._drawn)
            self._drawn += 1
            question = question_text(task)
            if question not in self._seen:
                self._seen.add(question)
                self._distinct.append(task)
                misses = 0
                continue
            misses += 1
            if misses == 1000:
                raise DataError(
                    f"data.task={self.name!r} has only about {len(self._distinct)} distinct eval questions, but "
                    f"{position + 1} were asked for; lower eval.questions or enlarge the task (data.params)"
                )
        return self._distinct[position]


class Cursor:
    """The next tasks of a stream, and where a resumed run goes on.

    >>> cursor = Cursor(build_tasks("arithmetic", split="train", seed=0))
    >>> batch = cursor.take(4)            # positions 0 to 3
    >>> saved = cursor.state_dict()       # {"position": 4, "fingerprint": …, "identity": …}
    """

    def __init__(self, tasks: TaskStream):
        self.tasks = tasks
        self.position = 0

    def take(self, n: int) -> list[Task]:
        """The next n tasks. An eval stream may give fewer at its end."""
        stop = self.position + n
        if self.tasks.split == "eval":
            stop = min(stop, len(self.tasks))
        out = [self.tasks[p] for p in range(self.position, stop)]
        self.position = stop
        return out

    def state_dict(self) -> dict[str, Any]:
        """Where the cursor stands and which tasks it counts, as JSON types."""
        return {
            "position": self.position,
            "fingerprint": self.tasks.fingerprint,
            "identity": self.tasks.identity,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on at the saved position.

        DataError, with what differs, when the state belongs to other data.
        """
        new = self.tasks.identity
        if state.get("fingerprint") != self.tasks.fingerprint:
            old = state.get("identity") or {}
            keys = [k for k in {**old, **new} if old.get(k) != new.get(k)]
            changes = "; ".join(f"{k}: was {old.get(k)!r}, is {new.get(k)!r}" for k in keys)
            raise DataError(
                f"data.task={self.tasks.name!r} is not the data this run was started with "
                f"({changes or 'unknown state'}); put the old data back, or start a new run"
            )
        self.position = int(state["position"])


def build_tasks(
    name: str,
    *,
    split: Split,
    seed: int,
    size: int | None = None,
    params: dict[str, Any] | None = None,
    tools: tuple[str, ...] = (),
) -> TaskStream:
    """The stream of tasks called `name`.

    A key of TASKS, `reasoning_gym:<dataset>`, or a user's `module:function`.

    size    use at most so many distinct tasks; None: all (procedural: endless)
    params  passed to the task; for files {"train": path, "eval": path, "repair": bool, "grader":
            name}
    Raises DataError for an unknown name or parameter and for data that cannot be used.
    """
    if split not in ("train", "eval"):
        raise DataError(f"split={split!r}: must be 'train' or 'eval'")
    if size is not None and size < 1:
        raise DataError(f"data.size={size}: must be at least 1, or unset for all tasks")
    arguments = dict(params or {})
    if is_import(name, TASKS):
        function = resolve(
            name, "data.task", own.EXPECTED, lambda found: own.problem(found, arguments)
        )
        source = own.OwnTasks(function, name, seed=seed, tools=tuple(tools), **arguments)
        return TaskStream(name, source, split, seed, size)
    base, _, detail = name.partition(":")
    if base not in TASKS or (detail and base != "reasoning_gym"):
        raise DataError(
            f"data.task={name!r} is unknown{nearest(name, [*TASKS, 'reasoning_gym:<dataset>'])}"
        )
    if base == "reasoning_gym":
        arguments["dataset"] = detail
    try:
        built_in = TASKS[base](seed=seed, tools=tuple(tools), **arguments)
    except TypeError as error:
        raise DataError(f"data.params={params!r} do not fit data.task={name!r}: {error}") from error
    return TaskStream(name, built_in, split, seed, size)
