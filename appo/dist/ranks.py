"""What the processes of one run tell each other.

Numbers, objects, a flag, and why one of them has gone.

Tensors of the learner travel through DeepSpeed. Everything else (metrics, trees, paths, errors)
goes through here, as pickled objects over gloo, also where the learner's group is NCCL. One process
alone needs no group: every method is then a plain function of its argument, and torch is not even
imported.
"""

from __future__ import annotations

import atexit
import os
import pickle
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Literal

from appo.errors import RankError

# A rank may wait for long and all be well (one downloads a model, one has the longest rollout). A
# rank that dies closes its connections, which ends a wait over gloo at once (over NCCL the launcher
# does); a stall is for the watchdog to explain (`watchdog_s`): it knows more than a collective that
# only ran out of time.
TIMEOUT = timedelta(days=1)

LOOK_S = 2.0  # how long to look for what became of a rank that has closed its connections

How = Literal["sum", "max", "min"]


class Ranks:
    """One process's place among those of a run.

    `Ranks()` is a run of one process; `Ranks.join()` asks the launcher.

    Collective: all ranks call the same methods in the same order, on the thread that joined. Each
    takes `what`, a few words that the watchdog reports while it waits. RankError when a rank has
    gone.

    >>> ranks = Ranks()
    >>> ranks.sum({"tokens": 3.0}), ranks.gather("a"), ranks.any(False)
    ({'tokens': 3.0}, ['a'], False)
    """

    def __init__(self) -> None:
        self.rank, self.world = 0, 1
        self.local_rank, self.local_world = 0, 1  # among the ranks of this machine
        self.waiting: str | None = None  # the collective this rank is in now
        self._group: Any = None
        self._store: Any = None
        self._thread = threading.get_ident()
        self._peers: list[tuple[str, int]] = []  # (host, pid) of every rank

    @classmethod
    def join(cls) -> Ranks:
        """The ranks that torchrun or the deepspeed launcher has started.

        It says so in the environment.

        Makes the process group of torch, which then lives as long as the process. Joining again
        gives the same object.
        """
        global _joined
        if _joined is None:
            world = int(os.environ.get("WORLD_SIZE", "1"))
            _joined = cls()
            if world > 1:
                _joined._start()
        return _joined

    @property
    def main(self) -> bool:
        """Whether this is the rank that prints and writes."""
        return self.rank == 0

    # -- numbers

    def sum(self, values: Mapping[str, float], what: str = "sum") -> dict[str, float]:
        """Sums over ranks, in float64 and in rank order, hence the same bits everywhere.

        Keys may differ between ranks.
        """
        return self.reduce(values, "sum", what)

    def reduce(self, values: Mapping[str, float], how: How, what: str = "") -> dict[str, float]:
        """Sum, largest or smallest of each key over the ranks that have it; NaN stays NaN."""
        if self.world == 1:
            return dict(values)
        each = self.all_gather({k: float(v) for k, v in values.items()}, what or how)
        names = dict.fromkeys(name for one in each for name in one)
        return {name: _REDUCE[how]([one[name] for one in each if name in one]) for name in names}

    def any(self, flag: bool, what: str = "any") -> bool:
        """Whether one rank or more said True."""
        return flag if self.world == 1 else any(self.all_gather(bool(flag), what))

    # -- objects

    def gather(self, obj: Any, what: str = "gather") -> list[Any] | None:
        """On rank 0 everyone's object, in rank order; None elsewhere."""
        if self.world == 1:
            return [obj]
        out = [None] * self.world if self.main else None
        with self._meeting(what) as dist:
            dist.gather_object(obj, out, dst=0, group=self._group)
        return out

    def broadcast(self, obj: Any, what: str = "broadcast") -> Any:
        """Rank 0's object, on all ranks; what others pass does not matter."""
        if self.world == 1:
            return obj
        box = [obj if self.main else None]
        with self._meeting(what) as dist:
            dist.broadcast_object_list(box, src=0, group=self._group)
        return box[0]

    def all_gather(self, obj: Any, what: str = "all_gather") -> list[Any]:
        """Everyone's object on all ranks, in rank order."""
        if self.world == 1:
            return [obj]
        out: list[Any] = [None] * self.world
        with self._meeting(what) as dist:
            dist.all_gather_object(out, obj, group=self._group)
        return out

    def all_to_all(self, out: Sequence[Sequence[Any]], what: str = "all_to_all") -> list[Any]:
        """`out[r]` holds objects for rank r (for oneself too).

        → those for this rank, in the order of their senders.
        """
        assert len(out) == self.world, f"{len(out)} lists for {self.world} ranks"
        if self.world == 1:
            return list(out[0])
        import torch

        data = [pickle.dumps(list(part), protocol=pickle.HIGHEST_PROTOCOL) for part in out]
        sizes = torch.tensor([len(d) for d in data])
        theirs = torch.empty_like(sizes)
        with self._meeting(what) as dist:
            dist.all_to_all_single(theirs, sizes, group=self._group)
            sent = torch.frombuffer(bytearray(b"".join(data)), dtype=torch.uint8)
            got = torch.empty(int(theirs.sum()), dtype=torch.uint8)
            dist.all_to_all_single(got, sent, theirs.tolist(), sizes.tolist(), group=self._group)
        raw, found, begin = got.numpy().tobytes(), [], 0
        for size in theirs.tolist():
            found += pickle.loads(raw[begin : begin + size])
            begin += size
        return found

    def barrier(self, what: str = "barrier") -> None:
        """Return when all ranks are here."""
        if self.world > 1:
            with self._meeting(what) as dist:
                dist.barrier(group=self._group)

    # -- a rank that goes

    def report_exit(self, reason: str) -> None:
        """Leave word for the others why this rank ends; not collective, and never an error."""
        if self._store is not None:
            try:
                self._store.set(f"appo/left/{self.rank}", reason)
            except RuntimeError:  # the process that kept the messages has gone first
                self._store = None

    def exit_reasons(self) -> dict[int, str]:
        """{rank: reason} of those that have left word; not collective."""
        found = {}
        for r in range(self.world if self._store is not None else 0):
            key = f"appo/left/{r}"
            try:
                if self._store.check([key]):
                    found[r] = self._store.get(key).decode()
            except RuntimeError:
                break
        return found

    def explain_failure(self) -> str:
        """Which ranks have gone, and why, after a collective has failed; "" if none has.

        The collective is ours or one of the learner's.

        Looks for some seconds: a connection closes a little before its process is seen to end.
        """
        deadline = time.monotonic() + LOOK_S
        while True:
            words = {r: why for r, why in self.exit_reasons().items() if r != self.rank}
            gone = [r for r in range(self.world) if r not in words and self.is_dead(r)]
            if words or gone or time.monotonic() > deadline:
                break
            time.sleep(0.05)
        said = [f"rank {r} has ended: {why}" for r, why in words.items()]
        said += [f"rank {r} ({self._peers[r][0]}, pid {self._peers[r][1]}) has gone without a word "
                 "(killed from outside, or out of memory?)" for r in gone]  # fmt: skip
        return "; ".join(said)

    def is_dead(self, rank: int) -> bool:
        """Whether the process of a rank of this machine no longer runs.

        Of another machine nobody knows.
        """
        import psutil

        if not self._peers or self._peers[rank][0] != self._peers[self.rank][0]:
            return False
        try:
            return psutil.Process(self._peers[rank][1]).status() == psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return True

    # -- within

    def _start(self) -> None:
        import torch
        import torch.distributed as dist

        env = os.environ
        device = int(env.get("LOCAL_RANK", "0"))
        if not dist.is_initialized():
            backend = "gloo"
            if torch.cuda.is_available():
                backend = "nccl"
                torch.cuda.set_device(device)
            store, rank, world = next(iter(dist.rendezvous("env://", timeout=TIMEOUT)))
            self._store = dist.PrefixStore("appo", store)
            dist.init_process_group(
                backend, store=store, rank=rank, world_size=world, timeout=TIMEOUT
            )
            atexit.register(dist.destroy_process_group)
        self._group = dist.new_group(backend="gloo", timeout=TIMEOUT)
        self.rank, self.world, self.local_rank = dist.get_rank(), dist.get_world_size(), device
        self._peers = self.all_gather((socket.gethostname(), os.getpid()), "joining")
        hosts = [host for host, _ in self._peers]
        self.local_world = hosts.count(hosts[self.rank])

    @contextmanager
    def _meeting(self, what: str) -> Iterator[Any]:
        import torch.distributed as dist

        assert threading.get_ident() == self._thread, f"{what}: only the main thread talks to ranks"
        self.waiting = what
        try:
            yield dist
        except RuntimeError as error:  # gloo: a connection was closed
            cause = self.explain_failure() or f"contact with another rank was lost: {error}"
            raise RankError(f"while in {what!r}: {cause}") from error
        finally:
            self.waiting = None


_joined: Ranks | None = None


def _largest(values: list[float]) -> float:
    return max(values, key=lambda x: (x != x, x))  # NaN counts as largest


def _smallest(values: list[float]) -> float:
    return min(values, key=lambda x: (x == x, x))  # … and as smallest


_REDUCE: dict[str, Callable[[list[float]], float]] = {
    "sum": sum,
    "max": _largest,
    "min": _smallest,
}
