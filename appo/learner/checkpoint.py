"""Checkpoints that are complete or do not exist.

A checkpoint is written beside its final name, every file is flushed to disk and hashed into a
manifest, and only then renamed. Whatever happens in between (a signal, a full disk, a power cut)
leaves the checkpoint before it as the newest complete one. `latest` names it for people and
scripts; loading does not trust it and verifies instead.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from appo.dist.ranks import Ranks
from appo.errors import CheckpointError
from appo.learner.manifest import STATE, read_manifest, seal, verify
from appo.observability.lines import sync, write_synced

__all__ = ["load_latest", "read_manifest", "save_checkpoint"]

FOLDER = "checkpoints"
_NAME = re.compile(r"step_(\d+)(\.old-\w+)?$")  # .old: a step saved again, between two renames
_SCRATCH = re.compile(r"step_(\d+)\.(tmp|old|gone)-\w+$")
_FULL = (errno.ENOSPC, errno.EDQUOT)

log = logging.getLogger(__name__)


def save_checkpoint(
    run_dir: Path | str,
    step: int,
    write: Callable[[Path], None],
    state: dict[str, Any],
    *,
    keep_last: int = 2,
    ranks: Ranks | None = None,
) -> Path:
    """Save `step` under run_dir/checkpoints/step_N and return that folder.

    `write(folder)` puts the files there (`Learner.save`); `state` is anything JSON can hold (data
    cursor, policy version, metric step …). The newest `keep_last` checkpoints up to this step stay.
    With several ranks all call this and all write; rank 0's `state` counts, and rank 0 publishes.
    Raises CheckpointError, on all ranks alike, when writing fails on one; what was complete before
    stays.
    """
    ranks = ranks or Ranks()
    root = Path(run_dir) / FOLDER
    final = root / f"step_{step}"
    scratch = root / ranks.broadcast(f"step_{step}.tmp-{uuid.uuid4().hex[:8]}", "checkpoint")

    def begin() -> None:
        root.mkdir(parents=True, exist_ok=True)
        _sweep(root)
        scratch.mkdir()

    def publish() -> None:
        write_synced(scratch / STATE, json.dumps(state, indent=1).encode())
        seal(scratch, step, ranks.world)
        _publish(scratch, final)
        _retire(root, step, keep_last)

    try:
        _together(ranks, begin, root, on=ranks.main)
        _together(ranks, lambda: write(scratch), root)
        _together(ranks, publish, root, on=ranks.main)
    except CheckpointError as error:
        where = f"checkpoint of step {step} in {root} failed"
        raise CheckpointError(f"{where}: {error}; older ones are intact") from error
    finally:
        if ranks.main and scratch.exists():
            _remove(scratch)
    return final


def load_latest(run_dir: Path | str, ranks: Ranks | None = None) -> tuple[Path, dict[str, Any]]:
    """(folder, state) of the newest checkpoint whose files all match its manifest.

    Newer ones that are incomplete or damaged are skipped with a logged warning. Raises
    CheckpointError when none is left, with the reason for each. With several ranks all call this:
    rank 0 looks, and all get the same.
    """
    ranks = ranks or Ranks()
    found = ranks.broadcast(
        _newest(Path(run_dir) / FOLDER) if ranks.main else None, "newest checkpoint"
    )
    if isinstance(found, str):
        raise CheckpointError(found)
    return found


def _newest(root: Path) -> tuple[Path, dict[str, Any]] | str:
    """The newest trustworthy checkpoint and its state, or why there is none."""
    reasons = []
    found = list(_complete_names(root))
    # Of a step that was saved twice the copy that was set aside is the older one.
    for step, path in sorted(found, key=lambda x: (x[0], "." not in x[1].name), reverse=True):
        wrong = verify(path, step)
        if wrong is None:
            return path, json.loads((path / STATE).read_text())
        log.warning("checkpoint %s is skipped: %s", path, wrong)
        reasons.append(f"{path.name}: {wrong}")
    return f"no usable checkpoint in {root}" + (": " + "; ".join(reasons) if reasons else "")


def _together(ranks: Ranks, work: Callable[[], None], disk: Path, on: bool = True) -> None:
    """Do `work` on the ranks where `on`; CheckpointError on all of them when it failed on one.

    Collective.
    """
    failure: Exception | None = None
    try:
        if on:
            work()
    except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
        failure = error
    said = ranks.all_gather(failure and _in_words(failure, disk), "checkpoint")
    wrong = [f"rank {r}: {s}" if ranks.world > 1 else s for r, s in enumerate(said) if s]
    if wrong:
        raise CheckpointError("; ".join(wrong)) from failure


def _in_words(error: Exception, folder: Path) -> str:
    """The error, and that the disk of `folder` is full if that is behind it."""
    while not folder.exists():
        folder = folder.parent
    full = shutil.disk_usage(folder).free < 1 << 20 or getattr(error, "errno", None) in _FULL
    hint = " (the disk is full: free some space or lower keep_last)" if full else ""
    return f"{error}{hint}"


def _publish(scratch: Path, final: Path) -> None:
    """Give the sealed folder its name, then point `latest` at it."""
    root = final.parent
    old = None
    if final.exists():  # the same step again, after a resume
        old = root / f"{final.name}.old-{uuid.uuid4().hex[:8]}"
        os.rename(final, old)
    os.rename(scratch, final)
    sync(root)
    pointer = root / f"latest.tmp-{uuid.uuid4().hex[:8]}"
    write_synced(pointer, final.name.encode())
    os.replace(pointer, root / "latest")
    sync(root)
    if old is not None:
        _remove(old)


def _retire(root: Path, step: int, keep_last: int) -> None:
    """Remove checkpoints beyond the newest `keep_last` up to `step`."""
    older = sorted((n, p) for n, p in _complete_names(root) if n <= step and "." not in p.name)
    for _, path in older[: -max(1, keep_last)]:
        gone = path.with_name(f"{path.name}.gone-{uuid.uuid4().hex[:8]}")
        os.rename(path, gone)  # half a checkpoint must never carry a checkpoint's name
        _remove(gone)


def _sweep(root: Path) -> None:
    """Remove what interrupted saves left.

    A copy set aside goes only when its successor is whole.
    """
    for path in list(root.iterdir()):
        if path.name.startswith("latest.tmp-"):
            path.unlink(missing_ok=True)
        elif match := _SCRATCH.match(path.name):
            step, kind = int(match[1]), match[2]
            if kind != "old" or verify(root / f"step_{step}", step) is None:
                _remove(path)


def _remove(path: Path) -> None:
    """Delete a folder; one that cannot be deleted costs space, not the run."""
    try:
        shutil.rmtree(path)
    except OSError as error:
        log.warning("cannot remove %s: %s", path, error)


def _complete_names(root: Path) -> Iterator[tuple[int, Path]]:
    """(step, folder) of every folder with the name of a checkpoint."""
    if root.is_dir():
        for path in root.iterdir():
            match = _NAME.match(path.name)
            if match and path.is_dir():
                yield int(match[1]), path
