"""RMSNorm, SwiGLU and rotary positions: native code and definitions against float64, gradients included."""

import pytest
import torch
from torch import Tensor

from appo._kernels.common import backends
from appo._kernels.fused_layers import op as fused_layers

BACKENDS = [
    "torch",
    pytest.param(
        "cpu", marks=pytest.mark.skipif(backends.native_isa() is None, reason="no native kernels")
    ),
]
# relative L2 error: a few roundings of float32, one of the 16-bit formats
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 4e-4}
SHAPES = [(1, 3), (3, 7), (5, 16), (300, 33), (520, 576)]


def made(shape: tuple[int, ...], dtype: torch.dtype, seed: int, scale: float = 1.0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(shape, generator=g, dtype=torch.float64)).to(dtype)


def with_gradients(function, inputs, d_out):
    """[output, gradient of every input]."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, d_out.to(out.dtype))]


def compare(call, inputs, d_out, backend):
    got = with_gradients(lambda *a: call(*a, backend=backend), inputs, d_out)
    want = with_gradients(lambda *a: call(*a, backend="torch"), [x.double() for x in inputs], d_out)
    for name, a, b in zip(("output", *range(len(inputs))), got, want, strict=True):
        assert a.dtype == d_out.dtype
        error = float((a.double() - b).norm() / b.norm())
        assert error <= TOLERANCE[d_out.dtype], (name, error)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", SHAPES)
def test_rms_norm(shape, dtype, backend):
    x, weight = made(shape, dtype, 0, scale=2.0), made(shape[1:], dtype, 1)
    compare(lambda x, w, backend: fused_layers.rms_norm(x, w, 1e-3, backend=backend),
            (x, weight), made(shape, dtype, 2), backend)  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", [*SHAPES, (2, 3, 2100)])
def test_swiglu(shape, dtype, backend):
    gate, up = made(shape, dtype, 0, scale=4.0), made(shape, dtype, 1)
    compare(fused_layers.swiglu, (gate, up), made(shape, dtype, 2), backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", [(1, 1, 2), (50, 3, 34), (7, 9, 64)])
def test_rotary(shape, dtype, backend):
    angle = made((shape[0], shape[2] // 2), torch.float64, 0, scale=9.0)
    wide = torch.cat([angle, angle], dim=1)  # as transformers hands them over: rows with a gap
    cos, sin = (f(wide).to(dtype)[:, : angle.shape[1]] for f in (torch.cos, torch.sin))
    compare(lambda x, backend: fused_layers.rotary(x, cos.to(x.dtype), sin.to(x.dtype), backend=backend),
            (made(shape, dtype, 1),), made(shape, dtype, 2), backend)  # fmt: skip


def test_rotary_is_what_transformers_computes():
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    q = made((6, 2, 8), torch.float64, 0)
    angle = made((6, 4), torch.float64, 1, scale=9.0)
    cos, sin = (f(torch.cat([angle, angle], 1)) for f in (torch.cos, torch.sin))
    want, _ = apply_rotary_pos_emb(*(q.transpose(0, 1)[None],) * 2, cos[None], sin[None])
    torch.testing.assert_close(
        fused_layers.rotary(q, cos[:, :4], sin[:, :4]), want[0].transpose(0, 1)
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_not_finite_numbers_stay_in_their_rows(backend):
    x = torch.ones(3, 40)
    x[1, 7] = torch.nan
    y = fused_layers.rms_norm(x, torch.ones(40), 1e-6, backend=backend)
    assert torch.isnan(y[1]).all() and torch.isfinite(y[[0, 2]]).all()
    gate = torch.tensor([torch.nan, torch.inf, -1000.0, -89.0, 0.0, 1000.0])
    out = fused_layers.swiglu(gate, torch.ones(6), backend=backend)
    assert torch.isnan(out[0]) and out[1] == torch.inf and out[4] == 0.0 and out[5] == 1000.0
    assert out[2:4].abs().max() < 1e-30


@pytest.mark.skipif(backends.native_isa() is None, reason="no native kernels")
def test_threads_and_instruction_sets():
    """The same bits for 1 and 3 threads; AVX2 agrees with the best up to the order of a sum."""
    from appo._kernels.common import native

    x, w, dy = (made(s, torch.float32, i) for i, s in enumerate([(1500, 160), (160,), (1500, 160)]))

    def gradients(isa, threads):
        y, factor, dx, dw = torch.empty_like(x), torch.empty(1500), torch.empty_like(x), torch.empty(160)  # fmt: skip
        native.require("rms_norm_forward")(x, w, 1e-6, y, factor, isa, threads)
        native.require("rms_norm_backward")(x, w, factor, dy, dx, dw, isa, threads)
        return torch.cat([y.flatten(), dx.flatten(), dw])

    one = gradients("", 1)
    assert torch.equal(one, gradients("", 3))
    torch.testing.assert_close(one, gradients("avx2", 1), rtol=1e-5, atol=1e-5)


def test_frozen_weights_get_no_gradient():
    x, w = torch.randn(4, 8), torch.ones(8)
    y = fused_layers.rms_norm(x.requires_grad_(), w, 1e-6)
    y.sum().backward()
    assert x.grad is not None and w.grad is None
    assert not fused_layers.rms_norm(x.detach(), w, 1e-6).requires_grad


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: fused_layers.rms_norm(torch.ones(2, 3), torch.ones(4), 1e-6), r"\(2, 3\) and weight \(4,\)"),
        (lambda: fused_layers.swiglu(torch.ones(2), torch.ones(3)), "expected two alike"),
        (lambda: fused_layers.rotary(torch.ones(2, 1, 4), torch.ones(2, 4), torch.ones(2, 4)), "D/2"),
        (lambda: fused_layers.swiglu(torch.ones(2), torch.ones(2), backend="fast"), "'fast'"),
        (lambda: fused_layers.swiglu(*(torch.ones(2).double(),) * 2, backend="cpu"), "float64"),
    ],
)  # fmt: skip
def test_bad_input(call, message):
    with pytest.raises((ValueError, TypeError), match=message):
        call()
