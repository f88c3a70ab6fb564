"""Sweeps over our own settings, and one table against everybody else's implementation.

Times are CUDA-event milliseconds.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from appo._kernels.common.stats import LN2, Stats, finish
from appo._kernels.linear_logprob.backends import module
from appo._kernels.linear_logprob.blocks import LinearCall, Upstream

sys.path.append(str(Path(__file__).resolve().parents[2]))  # the checkout, for `bench`

from bench.gpu.rows import Rows, Shape, inputs
from bench.gpu.timing import Stopwatch, explain
from bench.kernels.peers import Implementation, implementations, ours

SWEEP = Shape(32_768, 3584, 152_064), Shape(4096, 3584, 152_064)
SWEEP_QUICK = (Shape(4096, 896, 151_936),)
PEERS = Shape(4096, 896, 151_936), Shape(4096, 3584, 152_064), Shape(32_768, 3584, 152_064)
PEERS_QUICK = (Shape(1024, 896, 151_936), Shape(1024, 896, 152_064))
DEVICE = "cuda"
BLOCKS = [(t, v) for t in (4096, 8192, 32_768) for v in (1024, 2048, 4096, 8192)]


def call_of(shape: Shape) -> LinearCall:
    h, w, y = inputs(shape, DEVICE)
    return LinearCall(h, w, y, None, torch.ones(shape.tokens, device=DEVICE))


def forward(rows: Rows, quick: bool, watch: Stopwatch) -> None:
    """The fused kernel.

    How token blocks are grouped, in how many pieces the epilogue runs, warps, stages, one at a
    time.
    """
    run = module("triton").partial_stats
    for shape in SWEEP_QUICK if quick else SWEEP:
        if rows.out_of_time():
            return rows.note(f"out of time: {shape} was not run")
        call = call_of(shape)
        runs: dict[str, Callable[[], object]] = {"default": partial(run, call)}
        runs["wide slots (not deterministic)"] = partial(run, call._replace(deterministic=False))
        for label, tile in neighbours(default_tile("PARTIAL", call)):
            runs[label] = partial(run, call, tile=tile)
        rows.timed(str(shape), watch, runs, shape.product, repeats=5)


def default_tile(table: str, call: LinearCall) -> Any:
    """The shipped tile for this device."""
    from appo._kernels.common.gpu import config, launch

    return config.pick(getattr(config, table), launch.arch(call.h.device), True)


def neighbours(tile: Any) -> Iterator[tuple[str, Any]]:
    """Tiles that differ from the shipped one in one setting.

    Those it has no room for fail and are listed as such.
    """
    settings = {
        "group": (4, 8, 16, 32),
        "pieces": (1, 2, 4),
        "warps": (4, 8),
        "stages": (tile.stages - 1, tile.stages + 1),
        "columns": (128, 256),
    }
    for name, values in settings.items():
        for value in values:
            if value != getattr(tile, name) and value > 0:
                yield f"{name} {value}", replace(tile, **{name: value})


def cublas32(rows: Rows, quick: bool, watch: Stopwatch) -> None:
    """Float32 logit blocks: which size keeps the matrix product fast and the block in L2."""
    run = module("cublas32").partial_stats
    for shape in SWEEP_QUICK if quick else SWEEP:
        if rows.out_of_time():
            return rows.note(f"out of time: {shape} was not run")
        call = call_of(shape)
        runs: dict[str, Callable[[], object]] = {"default": partial(run, call)}
        for block in blocks_within(shape):
            runs[f"{block[0]:,} × {block[1]:,}"] = partial(run, call, block=block)
        rows.timed(str(shape), watch, runs, shape.product, repeats=5)


def backward(rows: Rows, quick: bool, watch: Stopwatch) -> None:
    """Gradients of h and w, by both backends, in blocks of several sizes."""
    for shape in SWEEP_QUICK if quick else SWEEP:
        call = call_of(shape)
        up = upstream(call)
        for name in ("triton", "cublas32"):
            if rows.out_of_time():
                return rows.note(f"out of time: {name} {shape} and later were not run")
            wanted = (call, up, True, True, False, torch.bfloat16)
            run = partial(module(name).gradients, *wanted)
            runs: dict[str, Callable[[], object]] = {"default": run}
            for block in blocks_within(shape):
                runs[f"{block[0]:,} × {block[1]:,}"] = partial(in_strips, block, run)
            rows.timed(f"{name} {shape}", watch, runs, 3 * shape.product, repeats=3)


def in_strips(block: tuple[int, int], run: Callable[[], object]) -> object:
    """`run` with another size of the strip of gradients than the one in the table."""
    from appo._kernels.linear_logprob.gpu import backward

    with mock.patch.object(backward, "gradient_block", return_value=block):
        return run()


def blocks_within(shape: Shape) -> list[tuple[int, int]]:
    return [block for block in BLOCKS if block[0] <= shape.tokens]


def upstream(call: LinearCall) -> Upstream:
    """A gradient of ones for logp and of 0.01 for the entropy."""
    stats = Stats(*module("torch").partial_stats(call))
    _, entropy, _ = finish(stats)
    ones = torch.ones_like(entropy)
    return Upstream(stats.m, torch.log2(stats.s), -ones - 0.01 * entropy, 0.01 * LN2 * ones, ones)


def peers(rows: Rows, quick: bool, watch: Stopwatch) -> None:
    """Forward, and forward with backward.

    log-prob with entropy for those who can, log-prob alone for all.
    """
    torch.set_default_device(
        "cuda"
    )  # peers written for a CPU make their buffers where they are told to
    found, missing = on_a_gpu()
    for name, why in missing.items():
        rows.note(f"{name}: {why}")
    for shape in PEERS_QUICK if quick else PEERS:
        h, w, y = inputs(shape, DEVICE)
        some = slice(0, min(256, shape.tokens))
        exact = torch.log_softmax(h[some].double() @ w.double().T, 1).gather(1, y[some, None])[:, 0]
        for what, backward_too in (("forward", False), ("forward + backward", True)):
            for with_entropy in (True, False):
                if rows.out_of_time():
                    return rows.note(f"out of time: {shape}, {what} and later were not run")
                runs = {
                    one.name: partial(step, function, h, w, y, 1 + with_entropy, backward_too)
                    for one in found
                    if (function := one.both if with_entropy else one.logp) is not None
                    and not (one.compiled and quick)
                }
                given = "logp and entropy" if with_entropy else "logp"
                flop = shape.product * (4 if backward_too else 1)
                rows.timed(f"{shape}, {what}, {given}", watch, runs, flop, 3 if quick else 7)
        errors(rows, shape, found, (h[some], w, y[some]), exact)
        torch.cuda.empty_cache()


def on_a_gpu() -> tuple[list[Implementation], dict[str, str]]:
    """bench/kernels/peers.py on a GPU.

    With our GPU backends for our CPU one, and Cut-Cross-Entropy's kernels for its CPU path.
    """
    found, missing = implementations()
    mine = []
    for backend in ("triton", "cublas32", "torch"):
        run = partial(ours, backend=backend)
        mine.append(Implementation(f"ours, {backend}", run, run, ours=True))
    theirs = [x for x in found if not x.ours and not x.slow and x.name != "Cut-Cross-Entropy"]
    if "cut-cross-entropy" not in missing:
        for impl in ("cce", "cce_exact"):
            name = f"Cut-Cross-Entropy, {impl}"
            theirs.append(Implementation(name, None, partial(cut_cross_entropy, impl=impl)))
    return mine + theirs, missing


def cut_cross_entropy(h: Tensor, w: Tensor, y: Tensor, impl: str) -> tuple[Tensor]:
    from cut_cross_entropy import linear_cross_entropy

    return (-linear_cross_entropy(h, w, y, reduction="none", impl=impl),)


def step(
    function: Callable[..., tuple[Tensor, ...]],
    h: Tensor,
    w: Tensor,
    y: Tensor,
    outputs: int,
    backward_too: bool,
) -> object:
    """One call; with backward the gradients of h and w from the first `outputs` outputs."""
    if not backward_too:
        with torch.no_grad():
            return function(h, w, y)
    leaves = [x.detach().requires_grad_() for x in (h, w)]
    out = function(*leaves, y)[:outputs]
    return torch.autograd.grad(out, leaves, [torch.ones_like(x) for x in out])


def errors(
    rows: Rows,
    shape: Shape,
    found: list[Implementation],
    sample: tuple[Tensor, Tensor, Tensor],
    exact: Tensor,
) -> None:
    """Largest distance of log-probs from float64 on the first tokens of the same inputs."""
    for one in found:
        if one.compiled:
            continue
        try:
            with torch.no_grad():
                logp = one.logp(*sample)[0]
            worst = float((logp.double() - exact).abs().max())
            rows.add(f"{shape}, error of logp: {one.name}", nats=worst)
        except Exception as error:
            rows.add(f"{shape}, error of logp: {one.name}", explain(error), ours=one.ours)
