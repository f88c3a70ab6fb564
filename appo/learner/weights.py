"""New weights into a rollout engine, and the proof that they arrived.

A rollout engine that kept one old tensor samples from a policy nobody trains, silently. So every push is counted
and summed on the way, and afterwards engine and learner score the same probe sequences.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from appo.errors import LearnerError
from appo.learner.lora import MergeGain

# dtype → (what is compared, limit). Measured on SmolLM2-135M against the native engine: float32 3e-5 at most, and
# 8e-2 when one of 70 adapted tensors is skipped. bfloat16 rounds each engine's sums differently: 0.03 … 0.06 on average
# (single tokens 0.4), which hides one skipped tensor of a young adapter; there the probe finds gross errors only.
TOLERANCE = {"float32": ("max", 1e-3), "bfloat16": ("mean", 0.15)}


class Engine(Protocol):
    """The part of a rollout engine that a push needs."""

    policy_version: int

    def load_weights(self, named_tensors: Iterable[tuple[str, Any]], version: int) -> None: ...

    def add_prompt(self, token_ids: Sequence[int]) -> int: ...

    def score(self, seqs: Sequence[int], temperature: float = 1.0) -> Sequence[Any]: ...

    def release(self, seq: int) -> None: ...


class Source(Protocol):
    """The part of a learner that a push needs."""

    cfg: Any  # .dtype, .temperature

    def named_weights(
        self, gain: MergeGain | None = None, *, adapters: bool = False
    ) -> Iterator[tuple[str, Tensor]]: ...

    def logprobs(
        self, token_ids: Sequence[Sequence[int]], temperature: float | None = None
    ) -> list[np.ndarray]: ...


class Tap:
    """Passes (name, tensor) pairs on and keeps what went by: number, bytes, CRC-32 over names and values."""

    def __init__(self, source: Iterable[tuple[str, Tensor]]):
        self.source = source
        self.names: set[str] = set()
        self.bytes = self.crc = 0
        self.drained = False

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in self.source:
            raw = tensor.detach().cpu().contiguous().view(torch.uint8).flatten().numpy()
            self.crc = zlib.crc32(raw, zlib.crc32(name.encode(), self.crc))
            self.names.add(name)
            self.bytes += raw.size
            yield name, tensor
        self.drained = True


def push(
    learner: Source,
    engine: Engine,
    version: int,
    probe_ids: Sequence[Sequence[int]],
    tolerance: float | None = None,
) -> dict[str, float]:
    """Load the learner's weights into `engine` as policy `version` and check them on the probe sequences.

    `tolerance` limits the difference of log-probs at the training temperature: the largest of all tokens in float32,
    their mean in bfloat16; None takes TOLERANCE. Returns metrics, among them `push/adapter_gain`: how
    much of the adapters survived the cast of merged weights (1: all, 0: the engine sees the base model; 1 where the
    engine applies adapters itself). Raises LearnerError when weights were left over, when the engine reports another
    version, or when engine and learner disagree.
    """
    gain = MergeGain()
    # An engine that applies adapters gets them exactly; any other gets merged weights.
    applied = bool(getattr(engine, "accepts_adapters", False))
    tap = Tap(learner.named_weights(gain, adapters=applied))
    engine.load_weights(tap, version)
    if not tap.drained:
        raise LearnerError(
            f"push of policy version {version}: the engine stopped reading after {len(tap.names)} tensors; "
            "load_weights must take all of them"
        )
    # In bfloat16 one missing tensor hides in the noise of the probe, so an engine that can tell is asked by name.
    missing = tap.names - getattr(engine, "loaded", tap.names)
    if missing:
        raise LearnerError(
            f"push of policy version {version}: {len(missing)} of {len(tap.names)} tensors did not arrive in the engine, for "
            f"example {min(missing)!r}"
        )
    if engine.policy_version != version:
        raise LearnerError(
            f"push of policy version {version}: the engine reports version {engine.policy_version} afterwards"
        )
    metrics = {
        "push/tensors": float(len(tap.names)),
        "push/bytes": float(tap.bytes),
        "push/crc32": float(tap.crc),
        "push/adapter_gain": gain.value,
    }
    return metrics | _probe(learner, engine, version, probe_ids, tolerance)


def _probe(
    learner: Source,
    engine: Engine,
    version: int,
    probe_ids: Sequence[Sequence[int]],
    tolerance: float | None,
) -> dict[str, float]:
    theirs = _engine_logprobs(engine, probe_ids, learner.cfg.temperature)
    mine = learner.logprobs(probe_ids)
    gap = np.abs(np.concatenate([a - b for a, b in zip(theirs, mine, strict=True)]))
    worst, mean = float(gap.max()), float(gap.mean())
    kind, limit = TOLERANCE[learner.cfg.dtype]
    limit = limit if tolerance is None else tolerance
    seen = worst if kind == "max" else mean
    if not seen <= limit:  # NaN disagrees
        raise LearnerError(
            f"engine and learner disagree after push of policy version {version}: log-probs of "
            f"{len(probe_ids)} probe sequences differ by {worst:.3g} at most and {mean:.3g} on average, and the "
            f"{kind} may be {limit:g} in {learner.cfg.dtype}. A tensor did not arrive or was loaded wrongly"
        )
    return {"push/probe_max": worst, "push/probe_mean": mean}


def _engine_logprobs(
    engine: Engine, probe_ids: Sequence[Sequence[int]], temperature: float
) -> list[np.ndarray]:
    """Log-probs of tokens 1 … n-1 of each probe, from the engine's own forward; its handles are given back."""
    seqs = [engine.add_prompt(list(ids)) for ids in probe_ids]
    try:
        return [np.asarray(s.logprobs, np.float32) for s in engine.score(seqs, temperature)]
    finally:
        for seq in seqs:
            engine.release(seq)
