"""Log-prob and entropy from hidden states on a CPU, ours against every peer in one run.

Time, memory, error.

    OMP_NUM_THREADS=1 python bench/kernels/linear_logprob.py [--quick] [--json FILE] [--threads N] [--repeats N] [--limit SECONDS]
                                           [--only TEXT] [--peers NAME,…]

Sections: forward and forward+backward (gradients of h and w, the gradient of the entropy included)
with those that can; log-prob only, so that peers without an entropy take part; memory at 32,768
tokens. Columns:

    wall, CPU          medians of alternating calls; CPU is summed over threads and suffers less
                       from neighbours
    GF/s per core      2·T·H·V (8·T·H·V with backward) over CPU-seconds, the same count for all
    extra, kept        resident memory in a fresh process: what a call holds at its peak, results
                       included, and what the first call leaves behind (packed weights, compiled
                       code)
    errors             largest against float64 on the same bf16 inputs; for gradients the relative
                       L2 distance

Peers that are not installed or fail are listed below the tables. `ours` is backend "auto".
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

sys.path.append(str(Path(__file__).resolve().parents[2]))  # the checkout, for `bench`

from bench.common import (
    Case,
    Resident,
    in_fresh_process,
    parser,
    report_by_implementation,
    resident_bytes,
    timings,
)
from bench.kernels.peers import Implementation, implementations

MIB = 2**20


class Shape(NamedTuple):
    tokens: int
    hidden: int
    vocab: int

    def __str__(self) -> str:
        return f"T={self.tokens:,} H={self.hidden} V={self.vocab:,}"

    def gflop(self, per: int) -> float:
        """per·T·H·V in 10⁹: 2 for a forward; 8 with a backward that computes the logits again."""
        return per * self.tokens * self.hidden * self.vocab / 1e9


FULL = [Shape(256, 896, 151_936), Shape(1024, 576, 49_152)]
QUICK = [Shape(96, 64, 4099)]
LONG = [
    Shape(32_768, 896, 4096),
    Shape(32_768, 896, 16_384),
]  # V enters nobody's workspace but eager's
LONG_QUICK = [Shape(2048, 64, 4096)]


class Problem(NamedTuple):
    """h[T, H], w[V, H] bf16, y[T] and the upstream gradients of logp and entropy."""

    h: Tensor
    w: Tensor
    y: Tensor
    d_logp: Tensor
    d_entropy: Tensor


def problem(shape: Shape) -> Problem:
    """Logits of deviation 4, as sharp as those of a trained model."""
    g = torch.Generator().manual_seed(0)
    h = torch.randn(shape.tokens, shape.hidden, generator=g).bfloat16()
    w = torch.randn(shape.vocab, shape.hidden, generator=g).mul_(4 / shape.hidden**0.5).bfloat16()
    y = torch.randint(shape.vocab, (shape.tokens,), generator=g)
    return Problem(h, w, y, *torch.randn(2, shape.tokens, generator=g).unbind())


class Exact(NamedTuple):
    logp: Tensor
    entropy: Tensor
    dh: Tensor
    dw: Tensor


def exact(p: Problem, with_entropy: bool) -> Exact:
    """Values and gradients in float64; the gradients are kept in float32."""
    w = p.w.double()
    logp = torch.log_softmax(p.h.double() @ w.T, dim=1)  # [T, V]
    prob = logp.exp()
    entropy = -torch.linalg.vecdot(prob, logp)
    d_logp, d_entropy = p.d_logp.double()[:, None], p.d_entropy.double()[:, None]
    slope = d_logp + d_entropy * (logp + entropy[:, None]) if with_entropy else d_logp
    g = prob.mul_(-slope).scatter_add_(1, p.y[:, None], d_logp)
    picked = logp.gather(1, p.y[:, None])[:, 0]
    return Exact(picked, entropy, (g @ w).float(), (g.T @ p.h.double()).float())


def score(run: Callable[..., tuple[Tensor, ...]], p: Problem) -> tuple[Tensor, ...]:
    with torch.no_grad():
        return run(p.h, p.w, p.y)


def train(run: Callable[..., tuple[Tensor, ...]], p: Problem) -> tuple[Tensor, ...]:
    """Gradients of h and w."""
    h, w = (x.detach().requires_grad_() for x in (p.h, p.w))
    upstream = (p.d_logp, p.d_entropy)
    out = run(h, w, p.y)
    return torch.autograd.grad(out, (h, w), upstream[: len(out)])


def errors(out: tuple[Tensor, ...], want: Exact, backward: bool) -> list[float]:
    """Per output: largest absolute error, or relative L2 of (dh, dw), the worse of the two."""
    if backward:
        pairs = zip(out, (want.dh, want.dw))
        return [max(float((a.float() - b).norm() / b.norm()) for a, b in pairs)]
    return [float((a.double() - b).abs().max()) for a, b in zip(out, (want.logp, want.entropy))]


def memory(name: str, shape: Shape, backward: bool, threads: int) -> Resident | None:
    """To be run in a fresh process.

    A small call before loads the code, so that it is not counted as kept.
    """
    torch.set_num_threads(threads)
    chosen = next(i for i in implementations()[0] if i.name == name)
    step = train if backward else score
    assert chosen.both is not None
    if not chosen.compiled:
        step(chosen.both, problem(Shape(16, shape.hidden, 64)))
    return resident_bytes(partial(step, chosen.both, problem(shape)))


def memory_cases(
    names: list[str], shape: Shape, backward: bool, threads: int, prefix: str = ""
) -> list[Case]:
    """What each implementation holds and keeps; empty where the system does not tell."""
    found = {name: in_fresh_process(memory, name, shape, backward, threads) for name in names}
    if found["ours"] is None:
        return []
    return [
        case(f"{prefix}extra", "MiB", {name: r.peak / MIB for name, r in found.items()}),
        case(f"{prefix}kept", "MiB", {name: r.kept / MIB for name, r in found.items()}),
    ]


def case(name: str, unit: str, values: dict[str, float], higher: bool = False) -> Case:
    """Split one figure per implementation into ours, our variants and peers."""
    variants = {n: v for n, v in values.items() if n.startswith("ours, ")}
    peers = {n: v for n, v in values.items() if not n.startswith("ours")}
    return Case(name, unit, values["ours"], peers, higher_is_better=higher, variants=variants)


def section(
    shape: Shape,
    found: list[Implementation],
    with_entropy: bool,
    backward: bool,
    notes: dict[str, str],
    args: argparse.Namespace,
) -> list[Case]:
    """Time all implementations that can do this, alternating.

    Then their errors and, in full, their memory.
    """
    p = problem(shape)
    want = exact(p, with_entropy)
    step = train if backward else score
    runs: dict[str, Callable[[], tuple[Tensor, ...]]] = {}
    slow: dict[str, Callable[[], tuple[Tensor, ...]]] = {}
    wrong: dict[str, list[float]] = {}
    for one in found:
        function = one.both if with_entropy else one.logp
        if function is None:
            continue
        if not with_entropy:
            function = partial(_only_logp, function)
        run = partial(step, function, p)
        if one.slow and not _affordable(one.name, partial(step, function), p, args.limit, notes):
            continue
        try:
            out = run()  # the warm-up call
        except Exception as error:  # somebody else's code on our machine: told below the table
            if one.ours:
                raise
            notes[one.name] = f"fails: {type(error).__name__}: {str(error).splitlines()[0]}"
            continue
        wrong[one.name] = errors(out, want, backward)
        (slow if one.slow else runs)[one.name] = run
        del out
    times = timings(runs, args.repeats, warm=False) | timings(slow, 1, warm=False)
    work = shape.gflop(8 if backward else 2)
    cases = [
        case("wall", "ms", {n: 1e3 * t.wall for n, t in times.items()}),
        case("CPU", "s", {n: t.cpu for n, t in times.items()}),
        case("GF/s per core", "", {n: work / t.cpu for n, t in times.items()}, higher=True),
    ]
    labels = ["relL2 dh, dw"] if backward else ["error logp", "error entropy"]
    for i, label in enumerate(labels[: 1 if backward or not with_entropy else 2]):
        cases.append(case(label, "" if backward else "nats", {n: e[i] for n, e in wrong.items()}))
    if with_entropy and not args.quick:  # a process each: seconds
        cases += memory_cases(list(times), shape, backward, args.threads)
    return cases


def _only_logp(function: Callable[..., tuple[Tensor, ...]], *inputs: Tensor) -> tuple[Tensor]:
    return function(*inputs)[:1]


def _affordable(
    name: str, step: partial[tuple[Tensor, ...]], p: Problem, limit: float, notes: dict[str, str]
) -> bool:
    """Time 1/16 of the tokens first.

    A call that would take longer than `limit` seconds is left out, and said so.
    """
    few = max(1, p.y.shape[0] // 16)
    part = p._replace(h=p.h[:few], y=p.y[:few], d_logp=p.d_logp[:few], d_entropy=p.d_entropy[:few])
    start = time.process_time()
    step(part)
    expected = (time.process_time() - start) * p.y.shape[0] / few
    if expected > limit:
        where = f"V={p.w.shape[0]:,}, {step.func.__name__}: about {expected:.0f} CPU-seconds a call"
        notes[name] = "; ".join(filter(None, (notes.get(name, "left out"), where)))
    return expected <= limit


def main() -> None:
    options = parser(__doc__ or "")
    options.add_argument("--threads", type=int, default=1)
    options.add_argument("--repeats", type=int, default=5)
    options.add_argument(
        "--limit", type=float, default=60, help="CPU-seconds for a call of a slow peer"
    )
    options.add_argument("--only", default="", help="sections whose title holds this text")
    options.add_argument("--peers", default="", help="names, separated by commas; all if empty")
    args = options.parse_args()
    torch.set_num_threads(args.threads)
    found, notes = implementations()
    if args.peers:
        found = [i for i in found if i.ours or i.name in args.peers.split(",")]
    if args.quick:
        for one in [i for i in found if i.compiled]:
            notes[one.name] = "left out with --quick: compiling takes half a minute"
        found = [i for i in found if not i.compiled]
    sections: dict[str, list[Case]] = {}
    for shape in QUICK if args.quick else FULL:
        for with_entropy in (True, False):
            for backward in (False, True):
                what = "log-prob and entropy" if with_entropy else "log-prob only"
                way = "forward and backward" if backward else "forward"
                title = f"{what}, {way}, {shape}, bf16"
                if args.only not in title:
                    continue
                print(title, file=sys.stderr)  # the tables come at the end, minutes later
                sections[title] = section(shape, found, with_entropy, backward, notes, args)
    long: list[Case] = []
    names = ["ours", "eager bf16", *([] if args.quick else ["ours, backend torch", "eager fp32"])]
    for shape in () if args.only else LONG_QUICK if args.quick else LONG:
        long += memory_cases(names, shape, False, args.threads, f"{shape}: ")
    if long:
        sections["memory of many tokens, forward"] = long
    big = FULL[0]._replace(tokens=LONG[0].tokens)
    notes["by formula"] = (
        f"float32 logits of {big}: {4 * big.tokens * big.vocab / 2**30:.1f} GiB; bf16 half of it"
    )
    report_by_implementation(sections, notes, args)


if __name__ == "__main__":
    main()
