"""A whole decode step in C++ beside its packed products alone; its parts beside PyTorch's.

    OMP_NUM_THREADS=1 python bench/engine/decode_step.py [--quick] [--json FILE] [--threads N]

"step": one row of every sequence, 512 shared positions of a prompt and 200 of its own each, from
token ids to drawn tokens with logprob and entropy: embedding, all layers, attention over the block
pool, head, draw. "products alone": the packed weights, head included, and the micro-kernels of the
same step with nothing else, on the same numbers of rows. "layers": rows that read only themselves,
against the PyTorch runner's operations (oneDNN's packed linears included) with attention's result
ready made. The head turns float32 hidden states into float32 logits; "torch" does that from a
float32 copy of the weights. The error is that of our result against float64, relative (head only:
in the layers both runners round in the same places). SmolLM2-135M in bfloat16:
APPO_BENCH_MODEL=folder uses a real model, by default random weights in its shape.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from appo._kernels.common import native
from appo.rollout.engine import SamplingParams
from appo.rollout.native.attention.pool import KVPool
from appo.rollout.native.model.layers import PARTS
from appo.rollout.native.model.model import Model
from appo.rollout.native.model.weights import read_config, read_tensors
from appo.rollout.native.sampling.sampler import TokenSampler
from appo.rollout.native.tree.layout import Layout
from appo.rollout.native.tree.native_tree import make_tree

sys.path.append(str(Path(__file__).resolve().parents[2]))  # the checkout, for `bench`

from bench.common import Case, medians, parser, report
from bench.engine.engine import model_folder

CONTEXT = 1024
SHARED, OWN = 512, 200
BFLOAT = torch.bfloat16


def load(folder: Path, runner: str) -> Model:
    m = Model(read_config(folder), BFLOAT, torch.device("cpu"), CONTEXT, runner=runner)
    m.load(read_tensors(folder))
    return m


class Step:
    """The next step of `rows` sequences that share a prompt; their KV is noise."""

    def __init__(self, m: Model, rows: int, shared: int, own: int):
        c = m.config
        self.m, self.tree = m, make_tree()
        self.pool = KVPool(c.layers, c.kv_heads, c.head_dim, BFLOAT)
        prompt = self.tree.add([i % c.vocab for i in range(shared + 1)])
        self._pretend([prompt])
        seqs = [self.tree.fork(prompt, shared + 1) for _ in range(rows)]
        for i, seq in enumerate(seqs):
            self.tree.extend(seq, [(7 * j + i) % c.vocab for j in range(own)])
        while any(self.tree.kv(seq) < self.tree.length(seq) - 1 for seq in seqs):
            self._pretend(seqs)
        for arena in self.pool.arenas:
            arena.normal_(std=0.1)
        self.layout = self._plan(seqs)
        assert len(self.layout.ids) == rows
        self.sampler = TokenSampler(c.vocab, torch.device("cpu"), m)
        self.sampler.rows([SamplingParams(1)] * rows, seqs)
        self.seeds, self.positions = [*range(rows)], [shared + own + 1] * rows

    def _plan(self, seqs: list[int]) -> Layout:
        layout = self.tree.plan(seqs, 1_000_000)
        assert isinstance(layout, Layout)
        self.pool.ensure(self.tree.span)
        return layout

    def _pretend(self, seqs: list[int]) -> None:
        self.tree.commit(self._plan(seqs))

    def forward(self) -> Tensor:
        assert self.m.native is not None
        return self.m.native.forward(self.m, self.layout, self.pool, self.layout.out_rows)

    def run(self) -> None:
        self.sampler.sample(self.forward(), self.seeds, self.positions)


def layers_in_torch(m: Model, rows: int) -> Callable[[], Tensor]:
    c = m.config
    generator = torch.Generator().manual_seed(rows)
    ids = torch.randint(0, c.vocab, (rows,), generator=generator)
    attended = (0.1 * torch.randn(rows, c.heads * c.head_dim, generator=generator)).to(BFLOAT)
    return lambda: m.forward(ids, torch.zeros_like(ids), lambda *_: attended, None)


class Products:
    """Every linear of every layer as nothing but a packed product.

    bfloat16 numbers in, float32 sums out.
    """

    def __init__(self, m: Model, threads: int):
        self.threads, self.head = threads, m.native.head
        self.hidden = m.config.hidden
        make, pack = (native.require(f"decoder_head{f}") for f in ("", "_pack"))
        self.product = native.require("decoder_head_logits")
        self.linears = []
        for layer in m.layers:
            for part in PARTS:
                weight = getattr(layer, part).weight
                self.linears.append((make(*weight.shape, True, ""), weight.shape))
                pack(self.linears[-1][0], weight, threads)

    def run(self, rows: int, head: bool) -> Callable[[], None]:
        """head: the output layer too, of float32 hidden states as the step has them."""
        shapes = {shape for _, shape in self.linears}
        to = {out: torch.empty(rows, out) for out, _ in shapes}
        of = {size: torch.randn(rows, size).to(BFLOAT) for _, size in shapes}
        hidden = torch.randn(rows, self.hidden)

        def run() -> None:
            for linear, (out, size) in self.linears:
                self.product(linear, of[size], to[out], self.threads)
            if head:
                self.head.logits(hidden)

        return run


def relative(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact.double()).norm() / exact.double().norm())


def step_case(ours: Model, products: Products, rows: int, own: int, repeats: int) -> Case:
    step = Step(ours, rows, SHARED, own)
    hidden = step.forward()
    runs: dict[str, Callable[[], object]] = {
        "ours": step.run,
        "products alone": products.run(rows, head=True),
        "forward": step.forward,
        "head and draw": lambda: step.sampler.sample(hidden, step.seeds, step.positions),
    }
    found = {name: 1e3 * seconds for name, seconds in medians(runs, repeats).items()}
    whole = found.pop("ours")
    return Case(f"step, {rows} rows, {SHARED} + {own} positions", "ms", whole, variants=found)


def layers_case(ours: Model, theirs: Model, products: Products, rows: int, repeats: int) -> Case:
    step = Step(ours, rows, 0, 0)
    runs = {
        "ours": step.forward,
        "torch": layers_in_torch(theirs, rows),
        "products alone": products.run(rows, head=False),
    }
    found = {name: 1e3 * seconds for name, seconds in medians(runs, repeats).items()}
    return Case(
        f"{ours.config.layers} layers, {rows} rows",
        "ms",
        found["ours"],
        {"torch": found["torch"]},
        variants={"products alone": found["products alone"]},
    )


def head_case(ours: Model, theirs: Model, rows: int, repeats: int) -> Case:
    hidden = torch.randn(rows, ours.config.hidden, generator=torch.Generator().manual_seed(rows))
    runs: dict[str, Callable[[], object]] = {
        "ours": partial(ours.logits, hidden),
        "torch": partial(theirs.logits, hidden),
        "bfloat16 hidden": partial(ours.logits, hidden.to(BFLOAT)),
    }
    found = {name: 1e3 * seconds for name, seconds in medians(runs, repeats).items()}
    exact = hidden.double() @ ours.head.weight.double().T
    return Case(
        f"head, {rows} rows",
        "ms",
        found["ours"],
        {"torch": found["torch"]},
        error=relative(ours.logits(hidden), exact),
        variants={"bfloat16 hidden": found["bfloat16 hidden"]},
    )


def packing_cases(ours: Model, theirs: Model) -> list[Case]:
    """Seconds to make the packed copies, as every `load_weights` does."""
    assert ours.native is not None
    runs = {
        "ours": lambda: ours.native.pack(ours, ours.targets),
        "torch": lambda: theirs._pack(theirs.targets),
    }
    seconds = medians(runs, 3)
    megabytes = ours.native.packed_bytes / 1e6
    name = f"packing all weights ({megabytes:.0f} MB)"
    return [Case(name, "ms", 1e3 * seconds["ours"], {"torch": 1e3 * seconds["torch"]})]


@torch.inference_mode()
def main() -> None:
    options = parser(__doc__)
    options.add_argument("--threads", type=int, default=1, metavar="N", help="default 1")
    args = options.parse_args()
    torch.set_num_threads(args.threads)
    repeats = 3 if args.quick else 15
    with tempfile.TemporaryDirectory() as scratch:
        folder = model_folder(scratch, args.quick)
        ours, theirs = load(folder, "native"), load(folder, "torch")
    products = Products(ours, args.threads)
    rows = (1, 16) if args.quick else (1, 8, 16, 32)
    own = 20 if args.quick else OWN
    cases = [step_case(ours, products, n, own, repeats) for n in rows]
    cases += [layers_case(ours, theirs, products, n, repeats) for n in rows]
    cases.append(layers_case(ours, theirs, products, 64 if args.quick else 512, min(repeats, 5)))
    cases += [head_case(ours, theirs, n, repeats) for n in rows]
    cases += packing_cases(ours, theirs)
    report("A decode step, bfloat16", cases, args)


if __name__ == "__main__":
    main()
