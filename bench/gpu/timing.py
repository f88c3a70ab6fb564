"""Time of CUDA work.

Events around each call, a cold L2, alternating medians, the clock the chip ran at meanwhile.
"""

from __future__ import annotations

import gc
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Measured:
    """Median and fastest milliseconds of one call, and the MiB it held at its peak.

    What was there before it is not counted.
    """

    median: float
    fastest: float
    peak: float


class DeviceLost(RuntimeError):
    """A kernel broke the CUDA context.

    Nothing measured after it in this process would mean anything.
    """


class Stopwatch:
    """Measures on the current CUDA device. Raises RuntimeError where there is none."""

    def __init__(self) -> None:
        if not torch.cuda.is_available():
            raise RuntimeError("no CUDA device: there is nothing to measure")
        cache = torch.cuda.get_device_properties(0).L2_cache_size
        self._flush = torch.empty(2 * max(cache, 32 << 20), dtype=torch.uint8, device="cuda")

    def measure(
        self,
        runs: Mapping[str, Callable[[], object]],
        repeats: int,
        out_of_time: Callable[[], bool] = lambda: False,
    ) -> dict[str, Measured | str]:
        """Per name a figure, or why there is none.

        Two warm-up calls each, then `repeats` rounds through all of them.
        """
        found: dict[str, Measured | str] = {}
        peaks: dict[str, float] = {}
        for name, run in runs.items():
            if out_of_time():
                found[name] = "not measured: out of time"
                continue
            try:
                peaks[name] = self._peak(run)
            except Exception as error:  # other people's code, and ours on a device it never saw: told in the report
                found[name] = explain(error)
        times: dict[str, list[float]] = {name: [] for name in peaks}
        for _ in range(repeats):
            for name in peaks:
                times[name].append(self._once(runs[name]))
        for name, t in times.items():
            found[name] = Measured(statistics.median(t), min(t), peaks[name])
        return found

    def _peak(self, run: Callable[[], object]) -> float:
        run()  # compiles
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20

    def _once(self, run: Callable[[], object]) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._flush.zero_()  # also keeps the device busy while the host queues the call
        begin.record()
        run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end)

    def clock(self, run: Callable[[], object], seconds: float = 0.5) -> int | None:
        """MHz of the multiprocessors while `run` repeats; None where nvidia-smi does not tell."""
        device = f"GPU-{torch.cuda.get_device_properties(0).uuid}"
        query = ["--query-gpu=clocks.sm", "--format=csv,noheader,nounits", "-i", device]
        try:
            reader = subprocess.Popen(["nvidia-smi", *query], stdout=subprocess.PIPE, text=True)
        except FileNotFoundError:
            return None
        stop = time.perf_counter() + seconds
        while reader.poll() is None and time.perf_counter() < stop:
            run()
            torch.cuda.synchronize()
        out = reader.communicate()[0].split()
        return int(out[0]) if out and out[0].isdigit() else None


def explain(error: Exception) -> str:
    """The error in one line; its memory is given back.

    Raises DeviceLost if it left the device unusable.
    """
    text = f"{type(error).__name__}: {(str(error).strip() or '-').splitlines()[0][:200]}"
    error.__traceback__ = None  # its frames hold the tensors of the call
    gc.collect()
    if torch.cuda.is_available():
        try:
            torch.cuda.synchronize()
        except RuntimeError as broken:
            raise DeviceLost(text) from broken
        torch.cuda.empty_cache()
    return text
