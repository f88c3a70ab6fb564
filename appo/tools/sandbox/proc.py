"""Looking at a process tree from outside, through /proc.

It keeps the limits that the kernel keeps per process only.
"""

from __future__ import annotations

import os
from pathlib import Path

PAGE = os.sysconf("SC_PAGE_SIZE")


def tree(root: int) -> list[int]:
    """Process ids below `root` (not `root` itself). Empty when it has ended."""
    found: list[int] = []
    queue = [root]
    while queue:
        pid = queue.pop()
        below = _children(pid)
        found += below
        queue += below
    return found


def _children(pid: int) -> list[int]:
    below: list[int] = []
    try:
        for task in os.listdir(f"/proc/{pid}/task"):
            below += map(int, Path(f"/proc/{pid}/task/{task}/children").read_text().split())
    except (FileNotFoundError, ProcessLookupError):
        return below  # ended meanwhile
    return below


def resident_bytes(pids: list[int]) -> int:
    """Memory the processes hold together, in bytes.

    Shared pages count once where the kernel lets us see (PSS).
    """
    return sum(map(_resident, pids))


def _resident(pid: int) -> int:
    try:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    except PermissionError:
        return _resident_pages(pid) * PAGE
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return 0


def _resident_pages(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except (FileNotFoundError, ProcessLookupError):
        return 0
