"""Train the tiny recipe for many small steps and watch what the process holds: memory, files, threads, children.

python tests/reliability/soak.py --steps 500 --output soak.json      # the full version; some minutes

Prints and writes one JSON object. Memory is judged by the slope over the second half of what is *in use*: bytes that
malloc has given out, and blocks of Python's own allocator. Resident memory says less in 60 steps: an allocator takes a new
arena of megabytes at a step that differs from run to run.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil

OVERRIDES = (
    "threads=1", "prompts_per_step=4", "algo.rollouts=4", "algo.roots=2", "algo.branches=1", "rollout.max_new_tokens=24",
    "eval.questions=4", "eval.every=50", "save_every=20", "learner.schedule=constant", "learner.lr=1e-5",
)  # fmt: skip


BLOCK = 64  # bytes, about the mean block of Python's allocator


class MallInfo(ctypes.Structure):
    """glibc's mallinfo2(3): uordblks are bytes in use in arenas, hblkhd in mappings of their own."""

    _fields_ = [(name, ctypes.c_size_t) for name in (
        "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost",
    )]  # fmt: skip


def in_use(me: psutil.Process) -> float:
    """Bytes; resident memory where the C library cannot say."""
    call = getattr(ctypes.CDLL(None), "mallinfo2", None)
    if call is None:
        return float(me.memory_info().rss)
    call.restype = MallInfo
    info = call()
    return float(info.uordblks + info.hblkhd + BLOCK * sys.getallocatedblocks())


def look(me: psutil.Process) -> dict[str, float]:
    return {
        "rss_mb": me.memory_info().rss / 2**20,
        "held_mb": in_use(me) / 2**20,
        "files": me.num_fds(),
        "threads": threading.active_count(),
        "children": len(me.children(recursive=True)),
        "objects": len(gc.get_objects()),
    }


def soak(steps: int, every: int) -> dict[str, Any]:
    """What was held every `every` steps and after the end, and slopes over the second half."""
    from appo.config import load_config
    from appo.observability.progress import Console
    from appo.run.train import TrainingRun, train

    me, seen = psutil.Process(), []
    real = TrainingRun._one_step

    def watched(self: TrainingRun, number: int) -> None:
        real(self, number)
        if number % every == 0:
            gc.collect()
            seen.append({"step": number} | look(me))

    TrainingRun._one_step = watched  # type: ignore[method-assign]
    with tempfile.TemporaryDirectory() as folder:
        cfg = load_config("tiny", [*OVERRIDES, f"steps={steps}", f"output={folder}/run"])
        begin = time.perf_counter()
        train(cfg, Console(quiet=True))
        seconds = time.perf_counter() - begin
        checkpoints = len(list(Path(folder, "run", "checkpoints").glob("step_*")))
    gc.collect()
    tail = seen[len(seen) // 2 :]
    at = [s["step"] for s in tail]
    return {
        "steps": steps,
        "seconds": round(seconds, 1),
        "checkpoints": checkpoints,
        "rss_mb": [round(s["rss_mb"], 1) for s in seen],
        "held_mb": [round(s["held_mb"], 2) for s in seen],
        "held_kb_per_step": 1024 * float(np.polyfit(at, [s["held_mb"] for s in tail], 1)[0]),
        "objects_per_step": float(np.polyfit(at, [s["objects"] for s in tail], 1)[0]),
        "files": [min(s["files"] for s in tail), max(s["files"] for s in tail)],
        "threads": [min(s["threads"] for s in tail), max(s["threads"] for s in tail)],
        "after": look(me),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--every", type=int, default=5, help="steps between two looks")
    parser.add_argument("--output", type=Path, help="write the JSON here as well")
    args = parser.parse_args()
    found = json.dumps(soak(args.steps, args.every))
    print(found)
    if args.output:
        args.output.write_text(found + "\n")


if __name__ == "__main__":
    main()
