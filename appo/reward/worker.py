"""The grader process: reads one JSON line per item, writes one JSON line per verdict.

Imports no torch.

python -m appo.reward.worker        # started by appo.reward.workers, ends when its input ends
"""

from __future__ import annotations

import faulthandler
import json
import math
import os
import resource
import signal
import sys
from importlib import import_module
from numbers import Real
from typing import Any

MEMORY = 4 << 30  # bytes of address space; `10**10**10` must hit a wall
GRACE_S = 2.0  # after the deadline the parent kills us; if it is gone, the alarm does


def resolve_grader(name: str) -> Any:
    """A name of GRADERS or an import string `module:function`.

    The current folder is on the path if the trainer has put it there: a data row alone does not
    reach it.
    """
    from appo.reward import GRADERS
    from appo.reward.own import own_grader

    return own_grader(name, "grader", here=False) if ":" in name else GRADERS[name]


def _grade(message: dict[str, Any]) -> float:
    name = message["grader"]
    score = resolve_grader(name)(message["answer"], message["gold"], message["meta"])
    if isinstance(score, bool) or not isinstance(score, Real) or not math.isfinite(score):
        raise ValueError(f"grader returned {score!r}, expected a finite number")
    if ":" in name and not 0 <= float(score) <= 1:
        raise ValueError(f"grader {name!r} returned {score!r}, expected a number from 0 to 1")
    return float(score)


def _load(name: str) -> None:
    """Import what the grader needs, so that the first item does not pay for it."""
    resolve_grader(name)
    for module in {"maths": ("math_verify",), "reasoning_gym": ("reasoning_gym",)}.get(name, ()):
        import_module(module)


def _answer(message: dict[str, Any]) -> dict[str, Any]:
    # SIG_DFL: the kernel ends us even when one C call never returns to the interpreter.
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, message["timeout_s"] + GRACE_S)
    try:
        if "load" in message:
            _load(message["load"])
            return {"ready": True}
        return {"score": _grade(message)}
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"[:500]}
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def main() -> None:
    """Grade items from standard input one by one until it ends; limits come first."""
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY if hard < 0 else min(MEMORY, hard), hard))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # The parent asks a worker that keeps it waiting for its stacks (GraderPool.describe).
    faulthandler.register(signal.SIGUSR1, file=os.dup(2))
    # What a library prints must not end up between our lines.
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    quiet = False
    for line in sys.stdin:
        reply = _answer(json.loads(line))
        if reply.get("ready") and not quiet:
            # From here on only verdicts matter; chatter of parsers would fill the disk over a long
            # run.
            quiet = True
            silence = os.open(os.devnull, os.O_WRONLY)
            os.dup2(silence, 1)
            os.dup2(silence, 2)
        replies.write(json.dumps(reply) + "\n")


if __name__ == "__main__":
    main()
