"""Bytes, operations and workspace of the GPU kernels: the formulas against the minimum and against what a call allocates.

The drivers run with their kernels and matrix products replaced by nothing, on CPU tensors, with the plan of an H100:
what they allocate is then what a call on the device allocates, at the real size of the vocabulary.
"""

import pytest
import torch

pytest.importorskip("triton")

from appo._kernels.common.gpu import config, launch
from appo._kernels.linear_logprob import backend_cublas as linear_cublas
from appo._kernels.linear_logprob import backend_triton as linear_triton
from appo._kernels.linear_logprob.blocks import LinearCall, Upstream
from appo._kernels.linear_logprob.gpu import backward, dlogits, partial, rowgrads, rowstats

HIDDEN, VOCAB = 64, 152_064
SLACK = 64 << 10  # small vectors: copies of [N] inputs, the softcap


@pytest.fixture(scope="module")
def bench():
    """bench/common.py and bench/gpu/roofline.py."""
    from bench import common
    from bench.gpu import roofline

    return common, roofline


@pytest.fixture
def planned(monkeypatch):
    """Drivers that plan for an H100 and launch nothing."""

    def nothing(*args, **kwargs):
        return None

    monkeypatch.setattr(launch, "check_tensors", nothing)
    monkeypatch.setattr(launch, "arch", lambda device: "sm_90")
    monkeypatch.setattr(launch, "processors", lambda device: 132)
    monkeypatch.setattr(linear_triton, "partial", nothing)
    monkeypatch.setattr(linear_triton, "merge_slots_into", nothing)
    monkeypatch.setattr(linear_triton, "dlogits", nothing)
    monkeypatch.setattr(linear_cublas, "rowstats", nothing)
    monkeypatch.setattr(linear_cublas, "rowgrads", nothing)
    monkeypatch.setattr(
        linear_cublas, "float_logits", lambda h, w: torch.empty(h.shape[0], w.shape[0])
    )
    monkeypatch.setattr(backward, "product_dtype", lambda h, w: torch.bfloat16)
    monkeypatch.setattr(backward, "multiply_add", nothing)


def call(n, vocab=VOCAB):
    h, w = torch.empty(n, HIDDEN).bfloat16(), torch.empty(vocab, HIDDEN).bfloat16()
    return LinearCall(h, w, torch.zeros(n, dtype=torch.int64), None, torch.ones(n))


@pytest.mark.parametrize("n", [1, 300, 4096, 40_000])
def test_forward_workspace_of_triton(n, planned, bench):
    """16 bytes per slot and token, however many tokens: at most 80 MB."""
    what = call(n)
    peak = bench[0].peak_bytes(lambda: linear_triton.partial_stats(what))
    workspace = config.stats_workspace_bytes(n, VOCAB, "sm_90")
    slots = -(-VOCAB // config.UNIT)
    assert workspace <= min(16 * slots * n, config.STATS_BYTES)
    assert workspace + 16 * n <= peak <= workspace + 16 * n + SLACK


@pytest.mark.parametrize("n", [1, 300, 40_000])
def test_forward_workspace_of_cublas32(n, planned, bench):
    what = call(n)
    peak = bench[0].peak_bytes(lambda: linear_cublas.partial_stats(what))
    workspace = config.logit_workspace_bytes(n, VOCAB)
    assert workspace <= 32 << 20
    assert workspace + 16 * n <= peak <= workspace + 16 * n + SLACK


@pytest.mark.parametrize("n", [1, 5000, 40_000])
@pytest.mark.parametrize("need_w", [True, False])
@pytest.mark.parametrize("backend", [linear_triton, linear_cublas])
def test_backward_workspace(backend, n, need_w, planned, bench):
    """The strip, dh in float32, one block of dW in float32, and where logits are written a block of them."""
    what = call(n, vocab=20_000)
    ones = torch.ones(n)
    up = Upstream(ones, ones, ones, ones, ones)

    def run():
        return backend.gradients(what, up, True, need_w, False, torch.bfloat16)

    peak = bench[0].peak_bytes(run)
    workspace = config.gradient_workspace_bytes(n, 20_000, HIDDEN, need_w=need_w)
    results = 2 * HIDDEN * (n + 20_000 * need_w)
    logits = 32 << 20 if backend is linear_cublas else 0
    assert peak <= workspace + results + logits + SLACK
    assert peak >= workspace  # the formula does not promise more than is used


def test_formulas_of_one_launch():
    n, v, hidden = 1000, 5000, 64
    read = 2 * (n + v) * hidden
    assert partial.traffic(n, v, hidden, slots=5) == (
        read + 20 * n + 16 * 5 * n,
        2 * n * v * hidden,
    )
    assert dlogits.traffic(n, v, hidden) == (read + 2 * n * v + 32 * n, 2 * n * v * hidden)
    assert rowstats.traffic(n, v)[0] == 4 * n * v + 44 * n
    assert rowgrads.traffic(n, v)[0] == 6 * n * v + 36 * n


@pytest.mark.parametrize("n", [1, 256, 32_768, 1_048_576])
def test_distance_from_the_minimum(n, bench):
    """The fused forward adds its statistics (written, read, once each) and reads the head once per 32,768 tokens."""
    _, roofline = bench
    hidden = 4096
    least = roofline.minimum(n, hidden, VOCAB)
    assert least.bytes == 2 * n * hidden + 2 * VOCAB * hidden + 16 * n
    assert least.flop == 2 * n * VOCAB * hidden
    fused = roofline.forward_triton(n, hidden, VOCAB)
    slots = -(-VOCAB // config.UNIT)
    rounds = -(-n // fused_tokens(n))
    extra = 2 * VOCAB * hidden * (rounds - 1) + n * (32 * slots + 20)
    assert least.bytes <= fused.bytes <= least.bytes + extra
    assert least.flop <= fused.flop <= 1.01 * least.flop
    blocks = roofline.forward_cublas32(n, hidden, VOCAB)
    assert blocks.bytes >= least.bytes + 8 * n * VOCAB  # float32 logits written and read again
    assert blocks.flop >= least.flop
    back = roofline.backward_triton(n, hidden, VOCAB)
    assert 3 * least.flop <= back.flop <= 3.01 * least.flop


def fused_tokens(n):
    return config.cut(n, VOCAB, config.pick(config.PARTIAL, "sm_90", True), True, 132).tokens


def test_estimates_are_those_of_the_design(bench):
    """H100, H=4096, V=152,064: a floor of 0.415 ms for reading the head, 51.2 ms for 32,768 tokens."""
    _, roofline = bench
    one, many = (roofline.minimum(n, 4096, VOCAB) for n in (1, 32_768))
    assert one.milliseconds == pytest.approx(0.415, rel=1e-3)
    assert (one.limit, many.limit) == ("bytes", "FLOP")
    assert many.milliseconds == pytest.approx(51.2, rel=1e-3)
