"""New weights into a rollout engine, and the proof that they arrived.

A rollout engine that kept one old tensor samples from a policy nobody trains, silently. So every
push is counted and summed on the way, and afterwards engine and learner score the same probe
sequences.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from appo.config import RunContext
from appo.dist.ranks import Ranks
from appo.errors import LearnerError
from appo.learner.lora import CastRetention

# dtype → (what is compared, limit). Measured on SmolLM2-135M against the native engine: float32
# 3e-5 at most, and 8e-2 when one of 70 adapted tensors is skipped. bfloat16 rounds each engine's
# sums differently: 0.03 … 0.06 on average (single tokens 0.4), which hides one skipped tensor of a
# young adapter; there the probe finds gross errors only.
TOLERANCE = {"float32": ("max", 1e-3), "bfloat16": ("mean", 0.15)}


class Engine(Protocol):
    """The part of a rollout engine that a push needs."""

    policy_version: int

    def load_weights(self, named_tensors: Iterable[tuple[str, Any]], version: int) -> None:
        """Replace weights by (Hugging Face name, tensor) pairs; they are version `version`."""

    def add_prompt(self, token_ids: Sequence[int]) -> int:
        """A new sequence of these tokens; → its handle."""

    def score(self, seqs: Sequence[int], temperature: float = 1.0) -> Sequence[Any]:
        """Log-probabilities of the sequences' tokens under the weights as they are."""

    def release(self, seq: int) -> None:
        """Give a handle back."""


class Source(Protocol):
    """The part of a learner that a push needs."""

    context: RunContext
    ranks: Ranks

    def named_weights(
        self, retention: CastRetention | None = None, *, adapters: bool = False
    ) -> Iterator[tuple[str, Tensor]]:
        """(Hugging Face name, tensor) pairs, adapters merged unless asked for by themselves."""

    def logprobs(
        self, token_ids: Sequence[Sequence[int]], temperature: float | None = None
    ) -> list[np.ndarray]:
        """The learner's own log-probabilities of the same tokens, one array per sequence."""


class ChecksumStream:
    """Passes (name, tensor) pairs on and keeps what went by: names, bytes, a checksum.

    The checksum is a CRC-32 over, tensor by tensor, its name, its bytes added up as 64-bit
    integers, and SAMPLES of those spread evenly. The sum covers every byte: one changed value
    always shows. Several can go unseen only where their changes cancel in the sum and miss the
    samples (values that changed places, say). It runs where the tensor is, at the speed of memory:
    14 ms for SmolLM2-135M on one core, a fifth of what a CRC of all bytes takes there, and no copy
    to the host on a GPU.
    """

    SAMPLES = 64

    def __init__(self, source: Iterable[tuple[str, Tensor]]):
        self.source = iter(source)
        self.names: set[str] = set()
        self.bytes = self.crc = 0
        self.drained = False

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in self.source:
            self.crc = zlib.crc32(_digest(tensor), zlib.crc32(name.encode(), self.crc))
            self.names.add(name)
            self.bytes += tensor.nbytes
            yield name, tensor
        self.drained = True

    def skip_rest(self) -> None:
        """Let what the engine did not take go by.

        Under ZeRO-3 other ranks wait for our part of each tensor.
        """
        for _ in self.source:
            pass


def _digest(tensor: Tensor) -> bytes:
    """Sum and sample of a tensor's 64-bit words, and the bytes that fill none."""
    raw = tensor.detach().contiguous().view(-1).view(torch.uint8)
    if raw.storage_offset() % 8:  # a part of a larger one need not begin at a whole word
        raw = raw.clone()
    whole = raw.numel() // 8 * 8
    words = raw[:whole].view(torch.int64)
    sample = words[:: max(1, words.numel() // ChecksumStream.SAMPLES)]
    head = torch.cat([words.sum()[None], sample]).cpu().numpy().tobytes()  # the sum wraps around
    return head + raw[whole:].cpu().numpy().tobytes()


def push(
    learner: Source,
    engine: Engine,
    version: int,
    probe_ids: Sequence[Sequence[int]],
    tolerance: float | None = None,
) -> dict[str, float]:
    """Load the learner's weights into `engine` as policy `version`.

    They are checked on the probe sequences.

    Collective: every rank fills an engine of its own, tensor by tensor, and probes it. `tolerance`
    limits the difference of log-probs at the training temperature: the largest of all tokens in
    float32, their mean in bfloat16; None takes TOLERANCE. Returns metrics, among them
    `push/adapter_gain`: how much of the adapters survived the cast of merged weights (1: all, 0:
    the engine sees the base model; 1 where the engine applies adapters itself).

    Raises LearnerError, on all ranks alike, when on one of them weights were left over, the engine
    reports another version or disagrees with the learner, and when ranks did not send the same
    weights.
    """
    retention = CastRetention()
    # An engine that applies adapters gets them exactly; any other gets merged weights.
    applied = bool(getattr(engine, "accepts_adapters", False))
    stream = ChecksumStream(learner.named_weights(retention, adapters=applied))
    problem: str | Exception | None
    try:
        engine.load_weights(stream, version)
        problem = _not_taken(stream, engine, version)
    except Exception as error:
        problem = error
    stream.skip_rest()
    _agree(learner.ranks, problem, stream.crc)
    try:
        theirs = _engine_logprobs(engine, probe_ids, learner.context.temperature)
    except Exception as error:
        theirs, problem = [], error
    mine = learner.logprobs(probe_ids)  # all ranks or none
    worst = mean = math.nan
    if problem is None:
        gap = np.abs(np.concatenate([a - b for a, b in zip(theirs, mine, strict=True)]))
        worst, mean = float(gap.max()), float(gap.mean())
        problem = _disagreement(
            worst, mean, learner.context.dtype, tolerance, version, len(probe_ids)
        )
    _agree(learner.ranks, problem, 0)
    return {
        "push/tensors": float(len(stream.names)),
        "push/bytes": float(stream.bytes),
        "push/crc32": float(stream.crc),
        "push/adapter_gain": retention.value,
        "push/probe_max": worst,
        "push/probe_mean": mean,
    }


def _not_taken(stream: ChecksumStream, engine: Engine, version: int) -> str | None:
    """What the engine did not take of what it was given, or None."""
    begin = f"push of policy version {version}: "
    if not stream.drained:
        return f"{begin}the engine stopped reading after {len(stream.names)} tensors; load_weights must take all of them"
    # In bfloat16 one missing tensor hides in the noise of the probe, so an engine that can tell is
    # asked by name.
    missing = stream.names - getattr(engine, "loaded", stream.names)
    if missing:
        return f"{begin}{len(missing)} of {len(stream.names)} tensors did not arrive in the engine, for example {min(missing)!r}"
    if engine.policy_version != version:
        return f"{begin}the engine reports version {engine.policy_version} afterwards"
    return None


def _disagreement(
    worst: float, mean: float, dtype: str, tolerance: float | None, version: int, probes: int
) -> str | None:
    """In words, when log-probs of engine and learner differ by more than they may."""
    kind, limit = TOLERANCE[dtype]
    limit = limit if tolerance is None else tolerance
    if (worst if kind == "max" else mean) <= limit:  # NaN is above
        return None
    return (
        f"engine and learner disagree after push of policy version {version}: log-probs of {probes} probe sequences differ "
        f"by {worst:.3g} at most and {mean:.3g} on average, and the {kind} may be {limit:g} in {dtype}. A tensor did not "
        "arrive or was loaded wrongly"
    )


def _agree(ranks: Ranks, problem: str | Exception | None, checksum: int) -> None:
    """Raise on all ranks what went wrong on any; alone, an engine's own error stays what it is."""
    if ranks.world == 1 and isinstance(problem, Exception):
        raise problem
    said = f"{type(problem).__name__}: {problem}" if isinstance(problem, Exception) else problem
    each = ranks.all_gather((said, checksum), "push")
    wrong = [
        f"rank {r}: {why}" if ranks.world > 1 else why for r, (why, _) in enumerate(each) if why
    ]
    if not wrong and len({crc for _, crc in each}) > 1:
        sums = ", ".join(f"{crc:08x} on rank {r}" for r, (_, crc) in enumerate(each))
        wrong = [
            f"ranks do not hold the same weights: checksum {sums}; start the run again from its checkpoint"
        ]
    if wrong:
        raise LearnerError("; ".join(wrong)) from (
            problem if isinstance(problem, Exception) else None
        )


def _engine_logprobs(
    engine: Engine, probe_ids: Sequence[Sequence[int]], temperature: float
) -> list[np.ndarray]:
    """Log-probs of tokens 1 … n-1 of each probe, from the engine's own forward.

    Its handles are given back.
    """
    seqs = [engine.add_prompt(list(ids)) for ids in probe_ids]
    try:
        return [np.asarray(s.logprobs, np.float32) for s in engine.score(seqs, temperature)]
    finally:
        for seq in seqs:
            engine.release(seq)
