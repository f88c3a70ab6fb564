r"""Question files.

The RL record format of the field (parquet or JSONL) and plain question/answer rows.

A record is
`{data_source, prompt: [{role, content}], ability, reward_model: {ground_truth, style}, extra_info}`.
Published files have defects; they are counted and reported, repaired on request, and never trained
on in silence. The best known one: `"\boxed"` written without a raw string, so that a backspace
character stands before "oxed".
"""

from __future__ import annotations

import json
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from appo.errors import DataError
from appo.types import Task

# What Python makes of LaTeX commands in a string that is not raw, and what was meant.
CORRUPT = {"\x08oxed": r"\boxed", "\x0crac": r"\frac"}
GRADER_OF_ABILITY = {"math": "maths", "maths": "maths", "qa": "qa_f1"}

Log = Callable[[str], None]


@dataclass
class RecordReport:
    """What a scan of one file found. Counts are rows of the file."""

    path: Path
    rows: int = 0
    corrupt: int = 0  # rows with a control character in place of a LaTeX backslash
    repaired: bool = False
    empty_answers: int = 0  # rows left out: nothing could ever be right
    duplicates: int = 0  # rows whose question stood in an earlier row (kept)
    graders: Counter[str] = field(default_factory=Counter)

    def warnings(self) -> list[str]:
        """One sentence per kind of defect found, after the path; empty when there is none."""
        out = []
        if self.corrupt and not self.repaired:
            out.append(
                f"{self.corrupt} rows hold '\\x08oxed' or '\\x0crac' in place of \\boxed or \\frac: set repair"
            )
        if self.empty_answers:
            out.append(f"{self.empty_answers} rows have an empty answer and are left out")
        if self.duplicates:
            out.append(f"{self.duplicates} rows repeat the question of an earlier row")
        return [f"{self.path}: {line}" for line in out]


def read_rl_records(path: Path, *, repair: bool = False, tools: tuple[str, ...] = ()) -> list[Task]:
    """Tasks of a parquet or JSONL file, in file order; defects are reported through `warnings`.

    Raises DataError for an unreadable or empty file, a missing column or a malformed row.
    """
    tasks, report = scan_records(path, repair=repair, tools=tools)
    for line in report.warnings():
        warnings.warn(line, stacklevel=2)
    return tasks


def scan_records(
    path: Path, *, repair: bool = False, tools: tuple[str, ...] = (), grader: str | None = None
) -> tuple[list[Task], RecordReport]:
    """Tasks and what was found on the way.

    `grader` overrides the one that the row's ability suggests.
    """
    path = Path(path).expanduser()
    report = RecordReport(path, repaired=repair)
    tasks: list[Task] = []
    seen: set[str] = set()
    for number, row in enumerate(_rows(path)):
        report.rows += 1
        mended = _repaired(row)
        if mended != row:
            report.corrupt += 1
            row = mended if repair else row
        task = _task(row, f"{path.stem}-{number}", f"{path}, row {number}", tools, grader)
        if task is None:
            report.empty_answers += 1
            continue
        question = question_text(task)
        report.duplicates += question in seen
        seen.add(question)
        report.graders[task.grader] += 1
        tasks.append(task)
    if not tasks:
        raise DataError(
            f"{path}: {report.rows} rows, none of them usable; a data set needs at least one task"
        )
    return tasks, report


def question_text(task: Task) -> str:
    """What is asked: the last user message, blanks normalised. Splits and duplicates go by it."""
    users = [m["content"] for m in task.messages if m["role"] == "user"]
    return " ".join((users or [m["content"] for m in task.messages])[-1].split())


def _rows(path: Path) -> Iterable[dict[str, Any]]:
    if not path.is_file():
        raise DataError(
            f"data file {path} does not exist; give the path of a .parquet or .jsonl file"
        )
    if path.suffix == ".parquet":
        return _parquet(path)
    if path.suffix in (".jsonl", ".json", ".ndjson"):
        return _jsonl(path)
    raise DataError(
        f"data file {path}: suffix {path.suffix!r} is not supported; use .parquet or .jsonl"
    )


def _parquet(path: Path) -> list[dict[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        rows: list[dict[str, Any]] = pyarrow.parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(
            f"{path}: not a readable parquet file ({error}); download it again"
        ) from error
    return rows


def _jsonl(path: Path) -> Iterable[dict[str, Any]]:
    try:
        lines = path.read_text(encoding="utf-8").split(
            "\n"
        )  # not splitlines: U+2028 may stand in a question
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as UTF-8 text ({error})") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(
                f"{path}:{number}: not a JSON object ({error}); write one object per line"
            ) from error
        if not isinstance(row, dict):
            raise DataError(f"{path}:{number}: must be a JSON object, not {type(row).__name__}")
        yield row


def _task(
    row: dict[str, Any], task_id: str, where: str, tools: tuple[str, ...], grader: str | None
) -> Task | None:
    """The task of a row, or None when its answer is empty."""
    if "prompt" in row or "reward_model" in row:
        messages = _messages(_column(row, "prompt", where), where)
        model = _column(row, "reward_model", where)
        if not isinstance(model, dict) or "ground_truth" not in model:
            raise DataError(
                f"{where}: reward_model is {model!r}, but must be a mapping with 'ground_truth'"
            )
        answer = model["ground_truth"]
    else:
        messages = [{"role": "user", "content": str(_column(row, "question", where))}]
        answer = _column(row, "answer", where)
    if isinstance(answer, (list, tuple)):
        answer = [str(a) for a in answer if a is not None and str(a).strip()]
    else:
        answer = "" if answer is None else str(answer)
    if not answer or not (isinstance(answer, list) or answer.strip()):
        return None
    ability = str(row.get("ability") or "")
    return Task(
        task_id=task_id,
        messages=messages,
        answer=answer,
        tools=tools,
        grader=grader or row.get("grader") or GRADER_OF_ABILITY.get(ability, "maths"),
        source=str(row.get("data_source") or ""),
        meta={"ability": ability, **(row.get("extra_info") or {})},
    )


def _column(row: dict[str, Any], name: str, where: str) -> Any:
    if (row.get(name) is None and name != "answer") or name not in row:
        raise DataError(
            f"{where}: column {name!r} is missing; the row has {', '.join(map(repr, row)) or 'no columns'}. "
            "Expected: prompt + reward_model (RL records), or question + answer"
        )
    return row[name]


def _messages(prompt: Any, where: str) -> list[dict[str, str]]:
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    good = isinstance(prompt, list) and prompt and all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in prompt
    )  # fmt: skip
    if not good:
        raise DataError(
            f"{where}: prompt is {str(prompt)[:80]!r}, but must be a list of {{role, content}}"
        )
    return [{"role": m["role"], "content": m["content"]} for m in prompt]


def _repaired(value: Any) -> Any:
    if isinstance(value, str):
        for bad, good in CORRUPT.items():
            value = value.replace(bad, good)
        return value
    if isinstance(value, dict):
        return {k: _repaired(v) for k, v in value.items()}
    return [_repaired(v) for v in value] if isinstance(value, list) else value
