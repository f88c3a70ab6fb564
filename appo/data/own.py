"""A user's own task: a function from (split, seed, tools) to tasks.

def capitals(*, split, seed, tools):
    rows = TRAIN if split == "train" else EVAL
    return [Task(f"{split}-{i}", [{"role": "user", "content": q}], a, tools) for i, (q, a) in enumerate(rows)]
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from appo.data.rl_records import question_text
from appo.data.sources import Split, stable_hash
from appo.errors import DataError
from appo.imports import call_problem
from appo.types import Task

EXPECTED = (
    "a function my_task(*, split: str, seed: int, tools: tuple[str, ...], **params) that returns a sequence of "
    "appo.types.Task, other ones for split='train' than for 'eval'"
)


def problem(function: Any, params: dict[str, Any]) -> str:
    """What keeps `function` from being a task with these data.params; "" when nothing does."""
    return call_problem(function, split="train", seed=0, tools=(), **params)


class OwnTasks:
    """A `TaskSource` over what the user's function returns; it is called once for each split.

    Raises DataError when the function raises, or returns what is not a sequence of tasks.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        name: str,
        *,
        seed: int,
        tools: tuple[str, ...],
        **params: Any,
    ):
        self.name, self.params = name, params
        self.tasks: dict[Split, Sequence[Task]] = {}
        splits: tuple[Split, Split] = ("train", "eval")
        for split in splits:
            try:
                tasks = function(split=split, seed=seed, tools=tools, **params)
            except Exception as error:  # the user's code may fail in any way
                raise DataError(
                    f"data.task={name!r} raised for split={split!r}: {type(error).__name__}: {error}"
                ) from error
            self.tasks[split] = _checked(tasks, f"data.task={name!r}, split={split!r}")
        held_out = {question_text(t) for t in self.tasks["eval"]}
        shared = sum(question_text(t) in held_out for t in self.tasks["train"])
        if shared:
            warnings.warn(
                f"data.task={name!r}: {shared} training questions also stand in the eval split",
                stacklevel=2,
            )

    def count(self, split: Split) -> int | None:
        """Number of tasks of the split."""
        return len(self.tasks[split])

    def task(self, split: Split, index: int) -> Task:
        """One task by position."""
        return self.tasks[split][index]

    def describe(self) -> dict[str, Any]:
        """Parameters, and a hash of every task: a run goes on with the same tasks or not at all."""
        said = [
            (split, t.task_id, t.messages, t.answer, t.tools, t.grader)
            for split, tasks in self.tasks.items()
            for t in tasks
        ]
        return {"params": self.params, "hash of the tasks": f"{stable_hash(said):016x}"}


def _checked(tasks: Any, where: str) -> Sequence[Task]:
    if not isinstance(tasks, Sequence) or isinstance(tasks, str | bytes):
        raise DataError(
            f"{where}: returned {type(tasks).__name__}; expected: a sequence of appo.types.Task"
        )
    for i, task in enumerate(tasks):
        if not isinstance(task, Task):
            raise DataError(
                f"{where}: element {i} is of type {type(task).__name__}; expected: appo.types.Task"
            )
        if not _are_messages(task.messages):
            raise DataError(
                f"{where}: element {i} ({task.task_id!r}) has the messages {str(task.messages)[:80]!r}; "
                "expected: [{'role': 'user', 'content': text}]"
            )
    return tasks


def _are_messages(found: Any) -> bool:
    """Whether this is a list of at least one message whose role and content are text."""
    return (
        isinstance(found, list | tuple)
        and len(found) > 0
        and all(
            isinstance(m, Mapping) and all(isinstance(m.get(k), str) for k in ("role", "content"))
            for m in found
        )
    )
