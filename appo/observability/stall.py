"""What a process that does not move is doing.

Its threads, its child processes, and the ranks beside it.

Read by `appo.observability.watchdog` from a thread of its own, so nothing here takes a lock that a
stalled thread may hold.
"""

from __future__ import annotations

import json
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

COMMAND = 160  # characters of a command line that are shown


def section(title: str, text: Callable[[], str]) -> str:
    """A titled block; a text that cannot be made says why instead."""
    try:
        body = text()
    except Exception as error:  # the other sections are worth having whatever this one met
        body = f"cannot be told: {type(error).__name__}: {error}"
    return f"\n== {title}\n{body or 'nothing'}"


def threads() -> str:
    """The Python stack of every thread of this process, innermost call last."""
    names = {t.ident: t.name for t in threading.enumerate()}
    blocks = []
    for ident, frame in sys._current_frames().items():
        stack = "".join(traceback.format_stack(frame)).rstrip()
        blocks.append(f"-- thread {names.get(ident, '?')} ({ident})\n{stack}")
    return "\n".join(blocks)


def children() -> str:
    """One line per descendant: pid, state, age, where it sleeps in the kernel, command."""
    return "\n".join(_child(p) for p in _descendants())


def _child(process: Any) -> str:
    import psutil

    try:
        age = time.time() - process.create_time()
        command = " ".join(process.cmdline())[:COMMAND] or f"[{process.name()}]"
        return (
            f"pid {process.pid}, parent {process.ppid()}: {process.status()}{_sleeps_in(process.pid)}, "
            f"{age:.0f} s old: {command}"
        )
    except psutil.Error as error:
        return f"pid {process.pid}: {type(error).__name__}"


def _sleeps_in(pid: int) -> str:
    """Where the kernel says that the process sleeps, as " in <kernel function>"; else ""."""
    try:
        place = Path(f"/proc/{pid}/wchan").read_text()
    except OSError:
        return ""
    return f" in {place}" if place not in ("", "0") else ""


def kill_children() -> None:
    """SIGKILL to every descendant, also to stopped ones.

    A process that leaves by os._exit cleans nothing up.
    """
    import psutil

    for process in _descendants():
        try:
            process.kill()
        except psutil.Error:
            continue  # gone already, or not ours to kill


def _descendants() -> list[Any]:
    import psutil

    found: list[Any] = psutil.Process().children(recursive=True)
    return found


def ranks(folder: Path, me: int, world: int) -> str:
    """One line per rank from its heartbeat file.

    A file that grew old is the sign of a frozen or dead process.
    """
    found = beats(folder, world)
    missing = "no heartbeat here (it never started, or it writes to another machine's disk)"
    return "\n".join(
        _rank(found[r], me) if r in found else f"rank {r}: {missing}" for r in range(world)
    )


def beats(folder: Path, world: int) -> dict[int, dict[str, Any]]:
    """rank → its newest heartbeat, with `silent_s` and whether that makes it `frozen`."""
    out = {}
    for rank in range(world):
        try:
            beat = json.loads((folder / f"rank_{rank}.json").read_text())
        except (OSError, ValueError):
            continue  # not there (yet)
        beat["silent_s"] = time.time() - beat["written"]
        silent = 3 * beat["every_s"] + 1
        if beat["host"] != socket.gethostname():  # caches of shared disks, and another clock
            silent = max(120.0, silent)
        beat["frozen"] = beat["silent_s"] > silent
        out[rank] = beat
    return out


def _rank(beat: dict[str, Any], me: int) -> str:
    doing = f"phase {beat['phase']!r}" + (f" ({beat['detail']})" if beat["detail"] else "")
    who = f"rank {beat['rank']} (pid {beat['pid']} on {beat['host']}{', this one' if beat['rank'] == me else ''})"
    if beat["frozen"]:
        return f"{who}: FROZEN OR DEAD, silent for {beat['silent_s']:.0f} s; was in {doing}"
    return f"{who}: alive, without progress for {beat['idle_s']:.0f} s in {doing}"
