"""The import strings of a run: where a recipe names the user's own code, and whether it fits.

Every string is told before anything of it is imported, and imported before a model is looked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from appo.data.tasks import TASKS
from appo.imports import is_import
from appo.reward.own import own_grader
from appo.reward.workers import check_grader

if TYPE_CHECKING:
    from appo.config import Config
    from appo.types import Task


def import_strings(cfg: Config) -> list[tuple[str, str]]:
    """(import string, key) of everything in the configuration that is a user's own."""
    keys = [
        ("algo.name", cfg.algo.name, ()),
        ("data.task", cfg.data.task, tuple(TASKS)),
        ("data.params.grader", str(cfg.data.params.get("grader") or ""), ()),
        ("reward.grader", cfg.reward.grader or "", ()),
        *(("tools.enabled", tool, ()) for tool in cfg.tools.enabled),
        ("model.family", cfg.model.family or "", ()),
    ]
    return [(text, key) for key, text, builtin in keys if is_import(text, builtin)]


def describe(imports: list[tuple[str, str]]) -> str:
    """One line for the card: "my_tool:search (tools.enabled), …"."""
    return ", ".join(f"{text} ({key})" for text, key in imports)


def check_graders(cfg: Config, tasks: list[Task]) -> list[tuple[str, str]]:
    """Check the graders of the configuration and of these tasks.

    → import strings that only the tasks name.

    What a row of a data file names is not imported here: no one who started the run has written it.
    Raises ConfigError for an unknown grader and for a function that cannot be called as one.
    """
    keys = {"reward.grader": cfg.reward.grader, "data.params.grader": cfg.data.params.get("grader")}
    found = {str(name): key for key, name in keys.items() if name}
    own_task = is_import(cfg.data.task, TASKS)
    for task in tasks:
        if task.grader not in found:
            where = f"the grader of task {task.task_id!r}"
            check_grader(task.grader, where)
            if own_task:
                found[task.grader] = where
    for grader, where in found.items():
        check_grader(grader, where)
        if is_import(grader):
            own_grader(grader, where)
    return [(g, where) for g, where in found.items() if is_import(g) and where not in keys]
