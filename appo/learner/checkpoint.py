"""Checkpoints that are complete or do not exist.

A checkpoint is written beside its final name, every file is flushed to disk and hashed into a manifest, and only
then renamed. Whatever happens in between (a signal, a full disk, a power cut) leaves the checkpoint before it as the
newest complete one. `latest` names it for people and scripts; loading does not trust it and verifies instead.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from appo.errors import CheckpointError

FORMAT = 1
FOLDER = "checkpoints"
MANIFEST, STATE = "manifest.json", "state.json"
_NAME = re.compile(r"step_(\d+)(\.old-\w+)?$")  # .old: a step saved again, between two renames
_SCRATCH = re.compile(r"step_\d+\.(tmp|old|gone)-\w+$")
_PACKAGES = ("appo", "torch", "transformers", "deepspeed", "peft", "numpy")

log = logging.getLogger(__name__)


def save_checkpoint(
    run_dir: Path | str,
    step: int,
    write: Callable[[Path], None],
    state: dict[str, Any],
    *,
    keep_last: int = 2,
    rank: int = 0,
    world_size: int = 1,
    barrier: Callable[[], None] = lambda: None,
) -> Path:
    """Save `step` under run_dir/checkpoints/step_N and return that folder.

    `write(folder)` puts the files there (`Learner.save`); `state` is anything JSON can hold (data cursor, policy
    version, metric step …). The newest `keep_last` checkpoints up to this step stay. With several ranks all call
    this; all write, rank 0 publishes, `barrier` makes them meet. Raises CheckpointError when writing fails; what was
    complete before stays.
    """
    root = Path(run_dir) / FOLDER
    final = root / f"step_{step}"
    scratch = root / f"step_{step}.tmp-{uuid.uuid4().hex[:8] if world_size == 1 else 'ranks'}"
    try:
        if rank == 0:
            root.mkdir(parents=True, exist_ok=True)
            _sweep(root)
            scratch.mkdir()
        barrier()
        write(scratch)
        barrier()
        if rank == 0:
            _write_synced(scratch / STATE, json.dumps(state, indent=1).encode())
            _seal(scratch, step, world_size)
            _publish(scratch, final)
            _retire(root, step, keep_last)
        barrier()
    except Exception as error:  # torch reports a full disk as RuntimeError
        if rank == 0:
            shutil.rmtree(scratch, ignore_errors=True)
        if not isinstance(error, OSError | RuntimeError):
            raise
        full = (
            " (the disk is full: free some space or lower keep_last)"
            if getattr(error, "errno", None) == errno.ENOSPC or not _free(root)
            else ""
        )
        raise CheckpointError(
            f"checkpoint of step {step} in {root} failed: {error}{full}; older ones are intact"
        ) from error
    return final


def load_latest(run_dir: Path | str) -> tuple[Path, dict[str, Any]]:
    """(folder, state) of the newest checkpoint whose files all match its manifest.

    Newer ones that are incomplete or damaged are skipped with a logged warning. Raises CheckpointError when none is
    left, with the reason for each.
    """
    root = Path(run_dir) / FOLDER
    reasons = []
    for _, path in sorted(
        _complete_names(root), key=lambda item: (item[0], item[1].name.count(".")), reverse=True
    ):
        wrong = verify(path)
        if wrong is None:
            return path, json.loads((path / STATE).read_text())
        log.warning("checkpoint %s is skipped: %s", path, wrong)
        reasons.append(f"{path.name}: {wrong}")
    raise CheckpointError(
        f"no usable checkpoint in {root}" + (": " + "; ".join(reasons) if reasons else "")
    )


def _free(folder: Path) -> bool:
    """Whether the disk of `folder` has a megabyte left."""
    return shutil.disk_usage(folder if folder.exists() else folder.parent).free > 1 << 20


def verify(path: Path) -> str | None:
    """Why a checkpoint cannot be trusted, or None."""
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        listed = manifest["files"]
        for name, entry in listed.items():
            file = path / name
            if file.stat().st_size != entry["bytes"] or _sha256(file) != entry["sha256"]:
                return f"{name} does not match the manifest"
        if STATE not in listed or manifest["format"] != FORMAT:
            return f"the manifest is of format {manifest['format']!r}, this version reads {FORMAT}"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a checkpoint folder: format, step, world_size, versions, files."""
    try:
        return json.loads((path / MANIFEST).read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} has no readable {MANIFEST}: {error}") from error


def _seal(folder: Path, step: int, world_size: int) -> None:
    """Flush every file, then write the manifest: it exists only beside complete files."""
    files = {}
    for file in _files(folder):
        _sync(file)
        files[str(file.relative_to(folder))] = {
            "bytes": file.stat().st_size,
            "sha256": _sha256(file),
        }
    for sub in {f.parent for f in _files(folder)} | {folder}:
        _sync(sub)
    manifest = {
        "format": FORMAT,
        "step": step,
        "world_size": world_size,
        "versions": {name: _version(name) for name in _PACKAGES},
        "files": files,
    }
    _write_synced(folder / MANIFEST, json.dumps(manifest, indent=1).encode())
    _sync(folder)


def _publish(scratch: Path, final: Path) -> None:
    """Give the sealed folder its name, then point `latest` at it."""
    root = final.parent
    old = None
    if final.exists():  # the same step again, after a resume
        old = root / f"{final.name}.old-{uuid.uuid4().hex[:8]}"
        os.rename(final, old)
    os.rename(scratch, final)
    _sync(root)
    pointer = root / f"latest.tmp-{uuid.uuid4().hex[:8]}"
    _write_synced(pointer, final.name.encode())
    os.replace(pointer, root / "latest")
    _sync(root)
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
    """Remove what interrupted saves left. A copy set aside goes only when its successor is whole."""
    for path in list(root.iterdir()):
        if path.name.startswith("latest.tmp-"):
            path.unlink(missing_ok=True)
        elif _SCRATCH.match(path.name):
            successor = root / path.name.partition(".")[0]
            if ".old-" not in path.name or (successor.exists() and verify(successor) is None):
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


def _files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.is_file())


def _write_synced(path: Path, data: bytes) -> None:
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
