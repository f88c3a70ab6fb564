"""Start a few processes that find each other as ranks.

This spares the seconds that torchrun needs to start.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


@dataclass
class Ended:
    """One rank's end; code is negative after a signal (-9: killed)."""

    code: int
    out: str
    err: str


def start(
    world: int, args: Sequence[str | Path], folders: Sequence[Path] | None = None, **env: str
) -> list[subprocess.Popen]:
    """`python *args` once per rank, in the environment a launcher would give.

    The caller must `join` them.

    folders: the working directory of each rank.
    """
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    # The library that is tested is the one of this checkout, wherever the child is started.
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    common = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world),
                           "LOCAL_WORLD_SIZE": str(world), "PYTHONPATH": path} | env  # fmt: skip
    return [
        subprocess.Popen(
            [sys.executable, *map(str, args)],
            env=common | {"RANK": str(r), "LOCAL_RANK": str(r)},
            cwd=folders[r] if folders else None,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for r in range(world)
    ]


def join(processes: Sequence[subprocess.Popen], timeout: float) -> list[Ended]:
    """Wait for all; after `timeout` seconds kill what still runs and fail with what was said."""
    deadline, ended, late = time.monotonic() + timeout, [], False
    for p in processes:
        try:
            out, err = p.communicate(timeout=max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            late = True
            p.kill()
            out, err = p.communicate()
        ended.append(Ended(p.returncode, out, err))
    told = "\n".join(f"-- rank {r}: {e.code}\n{e.out}{e.err}" for r, e in enumerate(ended))
    assert not late, f"ranks still ran after {timeout} s\n{told[-6000:]}"
    return ended


def run(world: int, *args: str | Path, timeout: float = 120, **env: str) -> list[Ended]:
    """Start, wait, and insist that every rank ended well."""
    ended = join(start(world, args, **env), timeout)
    told = "\n".join(f"-- rank {r}: {e.code}\n{e.out}{e.err}" for r, e in enumerate(ended))
    assert all(e.code == 0 for e in ended), told[-6000:]
    return ended
