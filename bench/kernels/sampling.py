"""From hidden states to tokens, logprobs and entropies.

The fused head against a product followed by a sampler.

    OMP_NUM_THREADS=1 python bench/kernels/sampling.py [--quick] [--json FILE] [--threads N]

The output head of SmolLM2-135M (49,152 x 576) and one of 151,936 x 896 (Qwen2.5-0.5B), random
bfloat16 weights, float32 hidden states, temperature 0.9, per row. "ours": one pass, tile by tile.
"head alone": the same product, logits written and nothing drawn, so ours minus this is what drawing
costs. "ours, two passes": the logits are written, then drawn from in C++. "torch": the same packed
product, then softmax, entropy and an inverse-CDF draw in PyTorch. "torch head": the whole in
PyTorch, with oneDNN's packed product where it has one. The error is that of logp and entropy
against float64.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from appo.rollout.native.model.head import NativeHead
from appo.rollout.native.model.linear import Linear
from appo.rollout.native.sampling import native_sample
from appo.rollout.native.sampling.definition import SamplingRows

sys.path.append(str(Path(__file__).resolve().parents[2]))  # the checkout, for `bench`

from bench.common import Case, medians, parser, report

TEMPERATURE = 0.9


def random_weight(vocab: int, hidden: int) -> Tensor:
    generator = torch.Generator().manual_seed(vocab)
    return (hidden**-0.5 * torch.randn(vocab, hidden, generator=generator)).bfloat16()


def statistics(logits: Tensor, inv_temp: Tensor) -> tuple[Tensor, Tensor]:
    """log-probabilities [R, V] and entropies [R]."""
    logp = torch.log_softmax(logits * inv_temp[:, None], -1)
    return logp, -(logp.exp() * logp).sum(-1)


def in_torch(logits: Callable[[], Tensor], inv_temp: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    logp, entropy = statistics(logits(), inv_temp)
    cumulative = logp.exp().cumsum(-1)
    u = torch.rand(len(logp), 1) * cumulative[:, -1:]
    token = torch.searchsorted(cumulative, u).clamp_(max=logp.shape[1] - 1)
    return token, logp.gather(1, token), entropy


def case(head: NativeHead, torch_head: Linear, rows: int, repeats: int) -> Case:
    weight = torch_head.weight
    vocab, size = weight.shape
    generator = torch.Generator().manual_seed(rows)
    hidden = 3.0 * torch.randn(rows, size, generator=generator)
    inv_temp = torch.full((rows,), 1 / TEMPERATURE)
    seeds = torch.arange(rows)
    how = SamplingRows(seeds, seeds, inv_temp, torch.zeros(rows, dtype=torch.uint8))
    ours = partial(head.sample, hidden, how)
    runs: dict[str, Callable[[], object]] = {
        "ours": ours,
        "head alone": lambda: head.logits(hidden),
        "two passes": lambda: native_sample.sample(head.logits(hidden), how),
        "torch": lambda: in_torch(lambda: head.logits(hidden), inv_temp),
        "torch head": lambda: in_torch(lambda: torch_head(hidden), inv_temp),
    }
    found = {name: 1e3 / rows * seconds for name, seconds in medians(runs, repeats).items()}
    sampled = ours()
    logp, entropy = statistics(hidden.double() @ weight.double().T, inv_temp.double())
    errors = (
        logp.gather(1, sampled.tokens[:, None]).squeeze(1) - sampled.logp,
        entropy - sampled.entropy,
    )
    return Case(
        f"{vocab:,} tokens, {rows} rows",
        "ms per row",
        found["ours"],
        {name: found[name] for name in ("torch", "torch head")},
        error=max(float(e.abs().max()) for e in errors),
        variants={name: found[name] for name in ("head alone", "two passes")},
    )


@torch.inference_mode()
def main() -> None:
    options = parser(__doc__)
    options.add_argument("--threads", type=int, default=1, metavar="N", help="default 1")
    args = options.parse_args()
    torch.set_num_threads(args.threads)
    heads = ((4096, 64),) if args.quick else ((49_152, 576), (151_936, 896))
    cases = []
    for vocab, hidden in heads:
        torch_head = Linear(random_weight(vocab, hidden), None, torch.float32)
        torch_head.pack()
        head = NativeHead(vocab, hidden, torch.bfloat16)
        head.pack(torch_head.weight)
        for rows in (1, 16) if args.quick else (1, 4, 16, 32):
            cases.append(case(head, torch_head, rows, 3 if args.quick else 9))
    report("Hidden states to tokens", cases, args)


if __name__ == "__main__":
    main()
