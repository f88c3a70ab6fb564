"""Log-probability and entropy from hidden states: time, memory and error against plain PyTorch on a CPU.

    OMP_NUM_THREADS=1 python bench/logprob.py [--quick] [--json FILE]

Peers hold the [T, V] logits: `eager bf16` multiplies in bf16 (fast, logits rounded to 8 bits), `eager fp32` widens both
factors first (as accurate as ours, much more memory). Errors are against float64 on the same bf16 inputs.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from common import Case, arguments, medians, peak_bytes, report
from torch import Tensor

from appo.kernels import linear_logprob_entropy


def eager(h: Tensor, w: Tensor, y: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    logits = (h.to(dtype) @ w.to(dtype).T).to(torch.promote_types(dtype, torch.float32))
    logp = torch.log_softmax(logits, dim=1)
    return logp.gather(1, y[:, None])[:, 0], -(logp.exp() * logp).sum(dim=1)


def main() -> None:
    args = arguments(__doc__ or "")
    tokens, hidden, vocab = (64, 128, 4096) if args.quick else (256, 896, 49_152)
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(tokens, hidden, generator=generator).bfloat16()
    w = (torch.randn(vocab, hidden, generator=generator) * 3 / hidden**0.5).bfloat16()
    y = torch.randint(vocab, (tokens,), generator=generator)
    exact = eager(h, w, y, torch.float64)

    functions: dict[str, Callable[[Tensor, Tensor], tuple[Tensor, ...]]] = {
        "ours": lambda h, w: linear_logprob_entropy(h, w, y)[:2],
        "eager bf16": lambda h, w: eager(h, w, y, torch.bfloat16),
        "eager fp32": lambda h, w: eager(h, w, y, torch.float32),
    }

    def train(name: str) -> None:
        leaves = [x.detach().requires_grad_() for x in (h, w)]
        logp, entropy = functions[name](*leaves)
        (logp.sum() + 0.01 * entropy.sum()).backward()

    def add(case: str, unit: str, values: dict[str, float], error: float | None = None) -> None:
        cases.append(Case(case, unit, values.pop("ours"), values, error))

    cases: list[Case] = []
    size = f"T={tokens} H={hidden} V={vocab:,}"
    forward = {name: (lambda f=f: f(h, w)) for name, f in functions.items()}
    both = {name: (lambda name=name: train(name)) for name in functions}
    errors = {
        name: [float((a.double() - b).abs().max()) for a, b in zip(f(h, w), exact)]
        for name, f in functions.items()
    }
    milli = {name: 1e3 * s for name, s in medians(forward, 3).items()}
    add(f"forward, {size}", "ms", milli, max(errors["ours"]))
    add("forward and backward", "ms", {name: 1e3 * s for name, s in medians(both, 3).items()})
    add("peak memory, forward", "MiB", {n: peak_bytes(f) / 2**20 for n, f in forward.items()})
    add("peak memory, both", "MiB", {n: peak_bytes(f) / 2**20 for n, f in both.items()})
    add("error of logp", "nats", {name: e[0] for name, e in errors.items()})
    add("error of entropy", "nats", {name: e[1] for name, e in errors.items()})
    report("Log-probability and entropy without a logit matrix", cases, args)


if __name__ == "__main__":
    main()
