"""The layers of one decode step, without attention: C++ against the PyTorch runner's operations and the bare products.

    OMP_NUM_THREADS=1 python bench/decode_step.py [--quick] [--json FILE] [--threads N]

All layers of SmolLM2-135M in bfloat16 at 1 to 32 rows and for a prefill chunk; attention is replaced by a tensor that is
ready. "torch": the PyTorch runner, oneDNN's packed linears included. "products alone": the same packed weights and
micro-kernels with neither norm, rotation, silu nor residual, what no step can beat. The head turns float32 hidden states
into float32 logits; "torch" does that from a float32 copy of the weights. The error is that of our result against
float64, relative (head only: in the layers both runners round in the same places).
APPO_BENCH_MODEL=folder uses a real model; by default random weights in the shape of SmolLM2-135M.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from common import Case, medians, parser, report
from engine import model_folder
from torch import Tensor

from appo.kernels import native
from appo.rollout.native.layers import PARTS
from appo.rollout.native.model import Model
from appo.rollout.native.weights import read_config, read_tensors

CONTEXT = 512
BFLOAT = torch.bfloat16


def load(folder: Path, runner: str) -> Model:
    m = Model(read_config(folder), BFLOAT, torch.device("cpu"), CONTEXT, runner=runner)
    m.load(read_tensors(folder))
    return m


class Step:
    """What one step of `rows` rows needs: the residual stream, positions, attention's result."""

    def __init__(self, m: Model, rows: int):
        c = m.config
        generator = torch.Generator().manual_seed(rows)
        self.x = m.embed[torch.randint(0, c.vocab, (rows,), generator=generator)].float()
        self.positions = torch.randint(0, CONTEXT, (rows,), generator=generator)
        width = c.heads * c.head_dim
        self.attended = (0.1 * torch.randn(rows, width, generator=generator)).to(BFLOAT)

    def attention(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.attended


def whole(m: Model, step: Step) -> Callable[[], Tensor]:
    def run() -> Tensor:
        x = step.x.clone()
        if m.native is None:
            m._layers(x, step.positions, step.attention)
        else:
            m.native.forward(x, m.turn, step.positions, step.attention)
        return x

    return run


class Products:
    """Every linear of every layer as nothing but a packed product: bfloat16 numbers in, float32 sums out."""

    def __init__(self, m: Model, threads: int):
        self.threads = threads
        make, pack = (native.function(f"layer_head{f}", "cpu") for f in ("", "_pack"))
        self.product = native.function("layer_head_logits", "cpu")
        self.heads = []
        for layer in m.layers:
            for part in PARTS:
                weight = getattr(layer, part).weight
                self.heads.append((make(*weight.shape, True, ""), weight.shape))
                pack(self.heads[-1][0], weight, threads)

    def run(self, rows: int) -> Callable[[], None]:
        shapes = {shape for _, shape in self.heads}
        to = {out: torch.empty(rows, out) for out, _ in shapes}
        of = {size: torch.randn(rows, size).to(BFLOAT) for _, size in shapes}

        def run() -> None:
            for head, (out, size) in self.heads:
                self.product(head, of[size], to[out], self.threads)

        return run


def relative(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact.double()).norm() / exact.double().norm())


def layers_case(ours: Model, theirs: Model, products: Products, rows: int, repeats: int) -> Case:
    step = Step(ours, rows)
    runs = {
        "ours": whole(ours, step),
        "torch": whole(theirs, step),
        "products alone": products.run(rows),
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
    runs = {"ours": ours._pack, "torch": theirs._pack}
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
    cases = [layers_case(ours, theirs, products, n, repeats) for n in rows]
    cases.append(layers_case(ours, theirs, products, 64 if args.quick else 512, min(repeats, 5)))
    cases += [head_case(ours, theirs, n, repeats) for n in rows]
    cases += packing_cases(ours, theirs)
    report("Layers of a decode step, bfloat16", cases, args)


if __name__ == "__main__":
    main()
