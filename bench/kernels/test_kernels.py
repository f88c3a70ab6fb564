"""The cases of bench/kernels/linear_logprob.py for pytest-benchmark, at small sizes.

`pytest bench --benchmark-only`.

Not part of the tests: `pytest` alone collects tests/ and nothing else.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parents[2]))  # the checkout, for `bench`

from bench.kernels.peers import implementations

sys.path.append(str(Path(__file__).parent))  # at the end: see bench/common.py


TOKENS, HIDDEN, VOCAB = 96, 64, 4099
FOUND = [
    i for i in implementations()[0] if not i.slow
]  # compiled ones included: the warm-up is not timed


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def problem():
    """h[T, H], w[V, H] bfloat16, y[T]; the same draw for all."""
    g = torch.Generator().manual_seed(0)
    h = torch.randn(TOKENS, HIDDEN, generator=g).bfloat16()
    w = torch.randn(VOCAB, HIDDEN, generator=g).mul_(4 / HIDDEN**0.5).bfloat16()
    return h, w, torch.randint(VOCAB, (TOKENS,), generator=g)


def forward(run, h, w, y):
    with torch.no_grad():
        return run(h, w, y)


def backward(run, h, w, y):
    leaves = [x.detach().requires_grad_() for x in (h, w)]
    return torch.autograd.grad(sum(x.sum() for x in run(*leaves, y)), leaves)


@pytest.mark.parametrize("one", FOUND, ids=lambda i: i.name)
@pytest.mark.parametrize("step", [forward, backward])
@pytest.mark.parametrize("what", ["both", "logp"])
def test_head(benchmark, problem, one, step, what):
    run = getattr(one, what)
    if run is None:
        pytest.skip("gives no entropy")
    benchmark.group = f"{step.__name__}, {what}"
    benchmark.pedantic(step, (run, *problem), rounds=5, warmup_rounds=1)
