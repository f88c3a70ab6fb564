"""Every backend against float64 on the same inputs, on the device.

Values, gradients, repeatability.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from appo.kernels import linear_logprob_entropy

sys.path.append(str(Path(__file__).resolve().parents[2]))  # the checkout, for `bench`

from bench.gpu.rows import Rows, Shape, inputs
from bench.gpu.timing import explain

LIMITS = {"logp": 1e-5, "entropy": 5e-5, "dh": 4e-3, "dw": 4e-3}
ALL_DTYPES = Shape(129, 64, 1100)  # the other shapes are run in bfloat16
SMALL = [Shape(1, 64, 17), Shape(3, 72, 65), ALL_DTYPES, Shape(128, 896, 32_001)]
LARGE = [Shape(1000, 896, 1024), Shape(257, 3584, 152_064)]


def variants(shape: Shape, device: str) -> dict[str, dict[str, Any]]:
    n = shape.tokens
    warm = torch.linspace(0.3, 1.5, n, device=device)
    backwards = torch.arange(n - 1, -1, -1, device=device) // 2  # repeats, falling
    return {
        "": {},
        ", temperature per token, softcap 30": {"inv_temp": warm, "softcap": 30.0},
        ", rows": {"rows": backwards},
    }


def matrix(
    rows: Rows,
    quick: bool,
    device: str = "cuda",
    backends: tuple[str, ...] = ("triton", "cublas32", "torch"),
) -> None:
    for shape in SMALL if quick else SMALL + LARGE:
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            if dtype != torch.bfloat16 and shape != ALL_DTYPES:
                continue
            for label, options in variants(shape, device).items():
                for backend in backends:
                    if rows.out_of_time():
                        return rows.note("out of time: cases from here on were not run")
                    name = str(dtype).removeprefix("torch.")
                    case = f"{backend} {name} {shape}{label}"
                    try:
                        values, error = compare(shape, device, dtype, backend, options)
                        rows.add(case, error, **values)
                    except Exception as failure:
                        rows.add(case, explain(failure))


def compare(
    shape: Shape, device: str, dtype: torch.dtype, backend: str, options: dict[str, Any]
) -> tuple[dict[str, Any], str | None]:
    """Errors of one case, and what is not as it must be."""
    h, w, y = inputs(shape, device, dtype)
    up = torch.linspace(-1, 1, 2 * shape.tokens, device=device).view(2, -1)

    def once(some: slice = slice(None)) -> list[Tensor]:
        leaves = [x.detach().requires_grad_() for x in (h, w)]
        chosen = {k: v[some] if isinstance(v, Tensor) and v.ndim else v for k, v in options.items()}
        h_in = leaves[0] if "rows" in options else leaves[0][some]
        out = linear_logprob_entropy(h_in, leaves[1], y[some], backend=backend, **chosen)
        grads = torch.autograd.grad(out[:2], leaves, list(up[:, some]))
        return [out.logp.detach(), out.entropy.detach(), *grads]

    got, again = once(), once()
    want = reference(h, w, y, up, **options)
    values: dict[str, Any] = {
        name: float((a.double() - b).abs().max()) for name, a, b in zip(LIMITS, got[:2], want)
    } | {
        name: float((a.double() - b).norm() / b.norm().clamp(min=1e-300))
        for name, a, b in zip(("dh", "dw"), got[2:], want[2:])
    }
    wrong = [
        f"{k} is off by {values[k]:.1e}, allowed {LIMITS[k]:.0e}"
        for k in LIMITS
        if not values[k] <= LIMITS[k]
    ]
    if not bool((got[0] <= 0).all() and (got[1] >= 0).all()):
        wrong.append("logp above 0 or entropy below 0")
    if not all(torch.equal(a, b) for a, b in zip(got, again)):
        wrong.append("two runs differ")
    if backend == "triton":
        half = slice(0, (shape.tokens + 1) // 2)
        if not all(torch.equal(a[half], b) for a, b in zip(got[:2], once(half)[:2])):
            wrong.append("half of the batch gives other bits")
    return values, "; ".join(wrong) or None


def reference(
    h: Tensor,
    w: Tensor,
    y: Tensor,
    up: Tensor,
    inv_temp: float | Tensor = 1.0,
    softcap: float | None = None,
    rows: Tensor | None = None,
) -> list[Tensor]:
    """logp, entropy, dh, dw in float64 from the whole logit matrix."""
    leaves = [x.double().requires_grad_() for x in (h, w)]
    x = leaves[0] @ leaves[1].T if rows is None else leaves[0][rows] @ leaves[1].T
    if softcap is not None:
        x = softcap * torch.tanh(x / softcap)
    x = x * (inv_temp[:, None].double() if isinstance(inv_temp, Tensor) else inv_temp)
    logp = torch.log_softmax(x, dim=1)
    out = [logp.gather(1, y[:, None])[:, 0], -(logp.exp() * logp).sum(1)]
    return [x.detach() for x in (*out, *torch.autograd.grad(out, leaves, list(up.double())))]
