"""JSON lines that survive a kill: the one way in which a run writes its logs.

One record is one line, written whole, flushed and synced before the call returns. A kill can
therefore tear at most the last line, which is left out on reading and removed when the file is
opened again. Resuming from the checkpoint of step k cuts off every line of a later step, so a run
that was killed and resumed leaves the same file as one that was not.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from appo.errors import ConfigError, DataError

# Order of key groups in a line: what one looks for first comes first, seconds come last.
_GROUPS = (
    "step",
    "steps",
    "kind",
    "reward",
    "eval",
    "tool",
    "format",
    "policy",
    "branch",
    "tokens",
)


def append_lines(path: Path, lines: list[str]) -> None:
    """Append whole lines in one write and force them to the disk."""
    data = "".join(line + "\n" for line in lines).encode()
    with open(path, "ab") as f:
        f.write(data)
        f.flush()
        os.fsync(f.fileno())


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Objects of a JSON-lines file, in order.

    A torn last line is left out, a missing file is empty.

    Raises DataError for a broken line that is not the last: that is damage, not a kill.
    """
    for _, value in _parsed(path):
        yield value


def cut_after(path: Path, step: int | None) -> None:
    """Drop lines whose `step` is greater than `step` (None: none) and a torn last line.

    The file is replaced as a whole, so a kill in the middle leaves the old one; it is not touched
    if nothing is to go.
    """
    if not path.exists():
        return
    kept = [
        raw for raw, value in _parsed(path) if step is None or int(value.get("step", 0)) <= step
    ]
    data = b"".join(raw + b"\n" for raw in kept)
    if data != path.read_bytes():
        replace_file(path, data)


def replace_file(path: Path, data: bytes) -> None:
    """Write `data` beside `path`, sync, and rename over it.

    Readers see the old or the new file, never a half.
    """
    tmp = path.with_name(path.name + ".tmp")
    write_synced(tmp, data)
    os.replace(tmp, path)


def write_synced(path: Path, data: bytes) -> None:
    """Write a file and force it to the disk."""
    with open(path, "wb") as f:
        f.write(data)
        f.flush()
        os.fsync(f.fileno())


def sync(path: Path) -> None:
    """Force a file, or the names in a folder, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _parsed(path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """(raw line without newline, its object); only the last line may be broken."""
    if not path.exists():
        return
    with open(path, "rb") as f:
        broken: int | None = None
        for number, line in enumerate(f, 1):
            if broken is not None:
                raise DataError(
                    f"{path}: line {broken} is not valid JSON, and it is not the last line, so this is not the trace "
                    "of a kill; restore the file or move it away"
                )
            raw = line.rstrip(b"\n")
            if not raw.strip():
                continue
            try:
                value = json.loads(raw)
            except (json.JSONDecodeError, UnicodeDecodeError):
                broken = number
                continue
            if not isinstance(value, dict):
                raise DataError(
                    f"{path}: line {number} is a JSON {type(value).__name__}, expected an object"
                )
            yield raw, value


def open_log(run_dir: Path | str, name: str, resume_after: int | None) -> Path:
    """Path of a log in a run folder, which is created, repaired and cut to `resume_after` first."""
    path = Path(run_dir) / name
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        cut_after(path, resume_after)
        path.touch()
    except OSError as e:
        raise ConfigError(
            f"output: cannot write {path} ({e.strerror or e}); choose a folder you may write to, output=DIR"
        ) from e
    return path


# -- records ---------------------------------------------------------------------------------------


def dump_record(record: Mapping[str, Any]) -> str:
    """A record as one line of valid JSON, keys in an order that depends on nothing but the keys."""
    bad: list[str] = []
    out = {str(key): _plain(record[key], str(key), bad) for key in sorted(record, key=_rank)}
    if bad:
        out["nonfinite"] = sorted(set(bad))
    return to_line(out)


def to_line(value: Any) -> str:
    """One line of JSON that can be written as UTF-8 whatever text it holds.

    A lone surrogate is escaped.
    """
    line = json.dumps(value, ensure_ascii=False, allow_nan=False)
    try:
        line.encode()
    except UnicodeEncodeError:
        return json.dumps(value, allow_nan=False)
    return line


def _rank(key: str) -> tuple[int, str]:
    group = key.partition("/")[0]
    if group == "time":
        return len(_GROUPS) + 1, key
    return (_GROUPS.index(group) if group in _GROUPS else len(_GROUPS)), key


def _plain(value: Any, where: str, bad: list[str]) -> Any:
    """JSON types only; `bad` collects where a number was not finite."""
    if isinstance(value, np.ndarray):
        value = value.tolist()
    elif isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        bad.append(where)
        return None
    if isinstance(value, Mapping):
        return {str(k): _plain(v, f"{where}.{k}", bad) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v, f"{where}[{i}]", bad) for i, v in enumerate(value)]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return str(value)
