"""What the tests of the fused head share.

Inputs, a float64 oracle, and which backends run on this machine.

Inputs for Triton on a machine without a device are float32 tensors that hold bfloat16 values: its
interpreter computes wrongly in bfloat16, and products of such numbers are the ones a device would
form.
"""

from __future__ import annotations

import math
import os

import pytest
import torch

from appo._kernels.common.backends import native_isa, triton_version
from appo.kernels import linear_logprob_entropy

ON_DEVICE = torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1"
INTERPRETED = ("triton", "cublas32")


def backend_params(*names):
    """pytest parameters for backends.

    One that cannot run here is skipped with the reason, one that uses the device is marked `gpu`.
    """
    return [pytest.param(name, marks=marks_of(name)) for name in names]


def marks_of(name):
    """Skipped with the reason where it cannot run; `gpu` where it uses the device."""
    reason = why_not(name)
    marks = [pytest.mark.skipif(bool(reason), reason=reason)]
    return [*marks, pytest.mark.gpu] if device_of(name) == "cuda" else marks


def why_not(name):
    """Why a backend cannot run here; empty if it can."""
    if name == "cpu" and native_isa() is None:
        return "the native matrix kernels do not run on this machine"
    if name in INTERPRETED and triton_version() is None:
        return "Triton is not installed"
    if name in INTERPRETED and not ON_DEVICE and os.environ.get("TRITON_INTERPRET") != "1":
        return "neither a CUDA device nor Triton's interpreter"
    return ""


def device_of(name):
    return "cuda" if name in INTERPRETED and ON_DEVICE else "cpu"


def dtype_of(name):
    """The dtype that holds bfloat16 values for this backend here."""
    return torch.float32 if name in INTERPRETED and not ON_DEVICE else torch.bfloat16


def problem(t, hidden, vocab, *, seed=0, spread=3.0):
    """h[T, H], w[V, H] bfloat16 and targets that include the first and the last id."""
    g = torch.Generator().manual_seed(seed)
    h = torch.randn(t, hidden, generator=g).bfloat16()
    w = (torch.randn(vocab, hidden, generator=g) * (spread / math.sqrt(hidden))).bfloat16()
    y = torch.randint(vocab, (t,), generator=g)
    if t > 1:
        y[0], y[1] = 0, vocab - 1
    return h, w, y


def oracle(h, w, y, *, inv_temp=1.0, softcap=None, rows=None):
    """(logp, entropy, lse) in float64 from full logits; differentiable."""
    x = h.double() @ w.double().T
    if rows is not None:
        x = x[rows]
    if softcap is not None:
        x = softcap * torch.tanh(x / softcap)
    x = x * (inv_temp[:, None].double() if isinstance(inv_temp, torch.Tensor) else inv_temp)
    logp = torch.log_softmax(x, dim=1)
    entropy = -torch.special.xlogy(logp.exp(), logp.exp()).sum(dim=1)
    return logp.gather(1, y[:, None])[:, 0], entropy, torch.logsumexp(x, dim=1)


def run(name, h, w, y, *, upstream=None, inv_temp=1.0, rows=None, **kwargs):
    """(outputs, gradients of h, w and inv_temp) of one backend, on the CPU.

    Gradients None without upstream weights.

    upstream = (d_logp, d_entropy, d_lse): factors of logp, entropy and lse in the loss.
    """
    device, dtype = device_of(name), dtype_of(name)
    leaves = [x.to(device, dtype).detach().clone().requires_grad_() for x in (h, w)]
    temperature = inv_temp
    if isinstance(inv_temp, torch.Tensor):
        temperature = inv_temp.to(device).detach().clone().requires_grad_()
    rows = rows if rows is None else rows.to(device)
    out = linear_logprob_entropy(
        *leaves, y.to(device), inv_temp=temperature, rows=rows, backend=name, **kwargs
    )
    grads = None
    if upstream is not None:
        sum((f.to(device) * x).sum() for f, x in zip(upstream, out)).backward()
        grads = [x.grad.cpu() for x in leaves]
        if isinstance(temperature, torch.Tensor):
            grads.append(temperature.grad.cpu())
    return [x.detach().cpu() for x in out], grads


def oracle_gradients(h, w, y, upstream, *, inv_temp=1.0, **kwargs):
    leaves = [x.double().requires_grad_() for x in (h, w)]
    temperature = inv_temp
    if isinstance(inv_temp, torch.Tensor):
        temperature = inv_temp.double().requires_grad_()
        leaves.append(temperature)
    out = oracle(leaves[0], leaves[1], y, inv_temp=temperature, **kwargs)
    sum((f.double() * x).sum() for f, x in zip(upstream, out)).backward()
    return [x.grad for x in leaves]


def relative(got, want):
    """‖got - want‖ / ‖want‖."""
    return float((got.double() - want).norm() / want.norm())


def assert_accurate(out, want, logp=1e-5, entropy=5e-5):
    assert (out[0].double() - want[0]).abs().max() <= logp
    assert (out[1].double() - want[1]).abs().max() <= entropy
    assert (out[2].double() - want[2]).abs().max() <= logp
    assert bool((out[0] <= 0).all()), "logp above 0"
    assert bool((out[1] >= 0).all()), "negative entropy"
