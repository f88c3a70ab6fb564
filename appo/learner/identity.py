"""What must agree between a saved learner and the one that loads it, and the file that says so."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from appo.config import LearnerConfig, RunContext
from appo.errors import CheckpointError

FILE = "learner.json"


def fingerprint(lm: nn.Module) -> str:
    """A checksum of the weights as loaded.

    Names, shapes and about a thousand values of each tensor.
    """
    crc = 0
    for name, p in lm.named_parameters():
        sample = p.detach().flatten()[:: max(1, p.numel() // 1000)].float().contiguous()
        crc = zlib.crc32(
            sample.numpy().tobytes(), zlib.crc32(f"{name}{tuple(p.shape)}".encode(), crc)
        )
    return f"{crc:08x}"


def identity(
    cfg: LearnerConfig, context: RunContext, base: str, trained: Mapping[str, tuple[int, ...]]
) -> dict[str, Any]:
    """Settings and weights that a checkpoint belongs to, as JSON types.

    base: `fingerprint` of the base model; trained: shape of each trained parameter by name.
    """
    lora = None
    if cfg.mode == "lora":
        lora = [cfg.lora.r, cfg.lora.alpha, sorted(cfg.lora.targets), cfg.lora.layers]
    return {
        "dtype": context.dtype,  # first: it changes the checksum of the base model too
        "base_model": base,
        "mode": cfg.mode,
        "lora": lora,
        "trained": {n: list(s) for n, s in trained.items()},
    }


def write_state(folder: Path, state: dict[str, Any]) -> None:
    """Write identity and progress into a checkpoint's folder."""
    (folder / FILE).write_text(json.dumps(state, indent=1))


def read_state(folder: Path, mine: dict[str, Any]) -> dict[str, Any]:
    """What `write_state` wrote; CheckpointError if it is missing or not of the identity `mine`."""
    try:
        saved: dict[str, Any] = json.loads((folder / FILE).read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder} holds no learner state: {error}") from error
    for name, value in mine.items():
        if saved.get(name) != value:
            raise CheckpointError(
                f"{folder}: {name} is {_difference(saved.get(name), value)}; "
                "resume with the settings the checkpoint was made with, or start a new run"
            )
    return saved


def _difference(saved: Any, mine: Any) -> str:
    """Both values in words; of two dicts the entries that differ."""
    if isinstance(saved, dict) and isinstance(mine, dict):
        keys = [k for k in saved.keys() | mine.keys() if saved.get(k) != mine.get(k)]
        saved, mine = ({k: d.get(k) for k in sorted(keys)[:3]} for d in (saved, mine))
    return f"{saved!r} in the checkpoint and {mine!r} in this run"
