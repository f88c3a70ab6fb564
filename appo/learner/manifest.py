"""What makes a checkpoint folder trustworthy.

A list of its files with size and SHA-256, itself under a checksum.

The manifest is written last, beside files that are already on the disk, so where there is one the
folder was complete.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from appo.errors import CheckpointError
from appo.observability.lines import sync, write_synced

FORMAT = 2
MANIFEST, STATE = "manifest.json", "state.json"
_PACKAGES = ("appo", "torch", "transformers", "deepspeed", "peft", "numpy")
_THREADS = 8  # hashing frees the interpreter lock; more of them than disks have lanes is of no use


def seal(folder: Path, step: int, world_size: int) -> None:
    """Flush every file to the disk, then write the manifest. Raises OSError."""
    files = _files(folder)
    for file in files:
        sync(file)
    for sub in {f.parent for f in files} | {folder}:
        sync(sub)
    manifest = {
        "format": FORMAT,
        "step": step,
        "world_size": world_size,
        "versions": {name: _version(name) for name in _PACKAGES},
        "files": {
            str(f.relative_to(folder)): {"bytes": f.stat().st_size, "sha256": digest}
            for f, digest in zip(files, _digests(files))
        },
    }
    manifest["sha256"] = _checksum(manifest)
    write_synced(folder / MANIFEST, json.dumps(manifest, indent=1).encode())
    sync(folder)


def verify(folder: Path, step: int) -> str | None:
    """Why this folder cannot be trusted to be the checkpoint of `step`, or None."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        if manifest["format"] != FORMAT:
            return f"the manifest is of format {manifest['format']!r}, this version reads {FORMAT}"
        if manifest["sha256"] != _checksum(manifest):
            return "the manifest was changed after it was written"
        if manifest["step"] != step:
            return f"it is of step {manifest['step']}; the folder was renamed"
        listed, found = manifest["files"], _files(folder)
        names = [str(f.relative_to(folder)) for f in found if f.name != MANIFEST]
        if stray := set(names) ^ set(listed):
            name = min(stray)
            return f"{name} is {'missing' if name in listed else 'not in the manifest'}"
        for name, digest in zip(names, _digests([folder / n for n in names])):
            size = (folder / name).stat().st_size
            if (size, digest) != (listed[name]["bytes"], listed[name]["sha256"]):
                return f"{name} does not match the manifest ({size} bytes, {listed[name]['bytes']} written)"
        return None if STATE in listed else f"it has no {STATE}"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{type(error).__name__}: {error}"


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a checkpoint folder: format, step, world_size, versions, files."""
    try:
        manifest: dict[str, Any] = json.loads((path / MANIFEST).read_text())
        return manifest
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} has no readable {MANIFEST}: {error}") from error


def _files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.is_file())


def _digests(files: Sequence[Path]) -> list[str]:
    with ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1)) as pool:
        return list(pool.map(_sha256, files))


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _checksum(manifest: dict[str, Any]) -> str:
    """Of everything in the manifest but this."""
    rest = {k: v for k, v in manifest.items() if k != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
