"""What the head backend is worth to a training step.

The quickstart's learner phase, "torch" against the default.

    OMP_NUM_THREADS=1 python bench/learner/head.py [--quick] [--json FILE] [--threads N]

One mini-batch of the quickstart recipe as the learner gets it: two prompts of 134 tokens with four
root rollouts of 60 each, packed into one stream of 748 tokens; LoRA on the last layers, the tied
head frozen. Timed in one process, alternating: the whole `train_minibatch` (model and head,
forward, backward, optimiser step), and the head alone with the gradient of the hidden states.
APPO_BENCH_MODEL=folder uses a real model; by default random weights in the shape of SmolLM2-135M.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch

import appo
from appo.algo.objective import make_objective
from appo.algo.resolve import resolve
from appo.config import Config, LearnerConfig, LoraConfig, RunContext
from appo.kernels import linear_logprob_entropy
from appo.learner import Learner
from appo.packing.pack import PackedBatch, pack
from appo.types import Counts, Credit, Leaf, Node, RolloutTree, Task

sys.path.append(str(Path(__file__).resolve().parents[2]))  # the checkout, for `bench`

from bench.common import Case, parser, report, timings
from bench.engine.engine import model_folder

PROMPT, RESPONSE, PROMPTS = 134, 60, 2  # of the run that the README prints: averages per prompt


def tree(roots: int, vocab: int, rng: np.random.Generator) -> tuple[RolloutTree, list[Credit]]:
    """One prompt with `roots` answers; half of them good, half bad."""

    def ids(count: int) -> list[int]:
        return rng.integers(vocab, size=count).tolist()

    nodes = [Node(None, "prompt", 0, ids(PROMPT))]
    leaves, credits = [], []
    for root in range(roots):
        logprobs, entropy = [-2.0] * RESPONSE, [2.0] * RESPONSE
        nodes.append(Node(0, "model", PROMPT, ids(RESPONSE), logprobs, entropy, 0, (root,)))
        leaves.append(Leaf(root + 1, root))
        advantage = np.full(RESPONSE, 1.0 if root % 2 else -1.0)
        credits.append(Credit(root, advantage, np.ones(RESPONSE, bool)))
    return RolloutTree(Task("bench", [], ""), nodes, leaves), credits


def mini_batch(cfg: Config, vocab: int) -> tuple[list[PackedBatch], Counts]:
    rng = np.random.default_rng(0)
    roots = resolve(cfg.algo).roots
    trees, credits = zip(*(tree(roots, vocab, rng) for _ in range(PROMPTS)))
    rows = PROMPTS * roots
    counts = Counts(rows * RESPONSE, rows, rows)
    return pack(trees, credits, token_budget=cfg.learner.token_budget), counts


def settings(cfg: Config, quick: bool) -> LearnerConfig:
    lora = cfg.learner.lora
    adapters = LoraConfig(r=lora.r, alpha=lora.alpha, layers=2 if quick else lora.layers)
    return LearnerConfig(mode="lora", lora=adapters, lr=1e-6, zero_stage=cfg.learner.zero_stage)


def head_only(
    learner: Learner, batch: PackedBatch, backend: str, dtype: torch.dtype | None = None
) -> Callable[[], torch.Tensor]:
    """Forward and backward of the head on hidden states of this batch's size, the head frozen."""
    weight = learner.lm.lm_head.weight.detach()
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(batch.unique_tokens, weight.shape[1], generator=generator).to(weight.dtype)
    hidden, weight = hidden.to(dtype), weight.to(dtype)
    edges = batch.mask.nonzero()[:, 0]
    targets, rows = batch.target[edges], batch.source[edges]

    def run() -> torch.Tensor:
        h = hidden.detach().requires_grad_()
        out = linear_logprob_entropy(h, weight, targets, rows=rows, backend=backend)
        return torch.autograd.grad(out.logp.sum() + out.entropy.sum(), h)[0]

    return run


def main() -> None:
    options = parser(__doc__ or "")
    options.add_argument("--threads", type=int, default=1)
    args = options.parse_args()
    torch.set_num_threads(args.threads)
    cfg = appo.load_config("quickstart")
    repeats = 1 if args.quick else 7
    with tempfile.TemporaryDirectory() as scratch:
        folder = model_folder(scratch, args.quick)
        context = RunContext(dtype=cfg.model.dtype, threads=args.threads)
        with Learner(folder, settings(cfg, args.quick), seed=0, context=context) as learner:
            batches, counts = mini_batch(cfg, learner.lm.config.vocab_size)
            objective = make_objective(resolve(cfg.algo))

            def learn(backend: str) -> None:
                learner.engine.module.head_backend = backend
                learner.train_minibatch(batches, counts, objective)

            backends = {"ours": "auto", "backend torch": "torch"}
            whole = timings({n: partial(learn, b) for n, b in backends.items()}, repeats)
            alone = {n: head_only(learner, batches[0], b) for n, b in backends.items()}
            exact = head_only(learner, batches[0], "torch", torch.float64)()
            error = float((alone["ours"]().double() - exact).norm() / exact.norm())
            head = timings(alone, repeats)
    size = f"{batches[0].unique_tokens} tokens, {int(batches[0].mask.sum())} targets"
    cases = []
    for name, found in ((f"learner phase, {size}", whole), ("head alone, forward + dh", head)):
        for unit in ("wall", "cpu"):
            ms = {n: 1e3 * getattr(t, unit) for n, t in found.items()}
            ours = ms.pop("ours")
            cases.append(Case(f"{name}: {unit}", "ms", ours, variants=ms))
            print(f"{name}, {unit}: {ms['backend torch'] / ours:.2f} × cheaper than backend torch")
    cases[2].error = error
    report("Head backend in the learner (error: relative L2 of dh from float64)", cases, args)


if __name__ == "__main__":
    main()
