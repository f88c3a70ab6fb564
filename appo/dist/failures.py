"""Several ranks behave as one program.

An error on one of them is printed once and ends all of them.

With one rank both context managers let everything through: the command line prints the error as
ever.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from appo.errors import AppoError, RankError
from appo.dist.ranks import LOOK_S, Ranks
from appo.observability.progress import Console
from appo.dist.signals import RunStopped


@contextmanager
def agree_or_raise(ranks: Ranks, console: Console) -> Iterator[None]:
    """Go on only if no rank met an error (of ours) in the block.

    The first one is printed by rank 0 and raised by all.

    Nothing collective may happen inside: a rank that fails does not get there.
    """
    if ranks.world == 1:
        yield
        return
    error = None
    try:
        yield
    except AppoError as e:
        error = e
    mine = None if error is None else (type(error).__name__, str(error), error.exit_code)
    each = ranks.all_gather(mine, "agreement that all is well")
    failed = [(r, found) for r, found in enumerate(each) if found is not None]
    if not failed:
        return
    rank, (name, text, code) = failed[0]
    if ranks.main:
        console.error(name, text if rank == 0 else f"rank {rank}: {text}")
    ranks.barrier("the end")  # a launcher ends all ranks as soon as one has gone: print first
    raise mark_reported(error or RankError(f"rank {rank}: {text}"), code)


@contextmanager
def fail_together(ranks: Ranks, console: Console) -> Iterator[None]:
    """An error in the block is left as a word for the other ranks.

    Each cause is printed by one rank.
    """
    try:
        yield
    except AppoError as error:
        if ranks.world > 1 and not error.reported:
            _report(error, ranks, console)
        raise
    except RuntimeError as error:  # a collective of the learner's says no more than that it failed
        cause = ranks.explain_failure() if ranks.world > 1 else ""
        if not cause:
            ranks.report_exit(exit_reason(error))
            raise
        lost = RankError(cause)
        _report(lost, ranks, console)
        raise lost from error
    except BaseException as error:
        ranks.report_exit(exit_reason(error))
        raise


def mark_reported(error: AppoError, exit_code: int | None = None) -> AppoError:
    """The error, marked as printed."""
    error.reported = True
    if exit_code is not None:
        error.exit_code = exit_code
    return error


def show(error: AppoError, console: Console) -> None:
    """Print an error; a run that ends because it was asked to is none."""
    if isinstance(error, RunStopped):
        console.warn(str(error))
    else:
        console.error(type(error).__name__, str(error))


def exit_reason(error: BaseException) -> str:
    """What a rank leaves for the others about the error that ends it."""
    return f"{type(error).__name__}: {error}"


def _report(error: AppoError, ranks: Ranks, console: Console) -> None:
    reason = exit_reason(error)
    if not ranks.main:
        # Rank 0 speaks for all of those who met the same, or who were left by the same rank.
        deadline = time.monotonic() + LOOK_S + 1
        while (
            time.monotonic() < deadline and 0 not in ranks.exit_reasons() and not ranks.is_dead(0)
        ):
            time.sleep(0.05)
        heard = ranks.exit_reasons().get(0)
        if heard == reason or (heard is not None and isinstance(error, RankError)):
            mark_reported(error)
    if not error.reported:
        show(error, console)
        mark_reported(error)
    ranks.report_exit(reason)
