"""The memory table.

What the large recipes need on each of 8 GPUs, and how far the formulas are from what is measured.

    OMP_NUM_THREADS=1 python bench/learner/memory.py [--quick] [--json FILE]

The table is computed by `appo.run.memory` from the models' published shapes; nothing of that size
is loaded. The formulas are then compared with small models: tensors of a DeepSpeed engine between
backward and step (ZeRO 0 to 3, on one rank and, by torchrun, on two), storages that autograd saves
in a forward, the native engine's own KV pool, and the most that was alive at once in a forward and
backward (PyTorch's profiler). `error` is (formula - measured) / measured.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import appo
from appo.algo.resolve import resolve
from appo.config import LearnerConfig, LoraConfig, RunContext
from appo.learner import Learner
from appo.learner import policy as forward
from appo.learner.policy import Policy, load_model
from appo.models.shape import read_shape
from appo.packing.pack import PackedBatch, pack_sequences
from appo.rollout.native import NativeEngine
from appo.run import memory
from appo.run.memory import Training
from appo.types import Counts

sys.path.append(str(Path(__file__).resolve().parents[2]))  # the checkout, for `bench`

from bench.common import _write, parser, peak_bytes

BUDGET = 80e9  # bytes of one GPU
# CUDA context, kernels' workspace, vLLM's activations and graphs, fragments: an allowance, not
# measured
RESERVE = 6e9
WORLD = 8

# Published config.json of the models that the recipes name.
QWEN = dict(head_dim=128, tie_word_embeddings=False)
MODELS = {
    "reasoning_7b": QWEN | dict(
        model_type="qwen2", hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28,
        num_key_value_heads=4, vocab_size=152064, max_position_embeddings=32768),
    "deepsearch_8b": QWEN | dict(
        model_type="qwen3", hidden_size=4096, intermediate_size=12288, num_hidden_layers=36, num_attention_heads=32,
        num_key_value_heads=8, vocab_size=151936, max_position_embeddings=40960),
    "deepsearch_14b": QWEN | dict(
        model_type="qwen3", hidden_size=5120, intermediate_size=17408, num_hidden_layers=40, num_attention_heads=40,
        num_key_value_heads=8, vocab_size=151936, max_position_embeddings=40960),
}  # fmt: skip

SMALL = dict(
    hidden_size=64, intermediate_size=160, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, vocab_size=512,
    max_position_embeddings=4096, head_dim=16,
)  # fmt: skip
FAMILIES = {
    "qwen3 tied": ("qwen3", dict(tie_word_embeddings=True)),
    "qwen3": ("qwen3", dict(tie_word_embeddings=False, num_key_value_heads=1)),
    "qwen2": ("qwen2", dict(tie_word_embeddings=False)),
    "llama biased": ("llama", dict(tie_word_embeddings=True, attention_bias=True, mlp_bias=True)),
}


@dataclass
class Check:
    """One comparison, in bytes.

    `bound`: the largest |error| that counts as agreement; None: shown only.
    """

    name: str
    formula: float
    measured: float
    bound: float | None

    @property
    def error(self) -> float:
        return (self.formula - self.measured) / self.measured if self.measured else self.formula

    @property
    def good(self) -> bool:
        return self.bound is None or abs(self.error) <= self.bound


def make_model(folder: Path, family: str) -> Path:
    """Random weights in a Hugging Face folder."""
    from transformers import AutoConfig, AutoModelForCausalLM

    model_type, extra = FAMILIES[family]
    config = AutoConfig.for_model(model_type, **(SMALL | extra))
    if not (folder / "config.json").exists():
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def stream(tokens: int) -> PackedBatch:
    """Sequences of 64 tokens side by side: every token but the first of each is a target."""
    return pack_sequences([list(range(64))] * (tokens // 64))


# -- what the learner keeps ------------------------------------------------------------------------


def storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    """Address → bytes of the distinct storages behind some tensors."""
    found = (t.untyped_storage() for t in tensors)
    return {s.data_ptr(): s.nbytes() for s in found if s.nbytes()}


def alive() -> Iterator[Tensor]:
    """Every tensor that Python can reach, gradients included."""
    gc.collect()
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # looking at an object may ask a deprecated module for its class
        for thing in gc.get_objects():
            if issubclass(type(thing), Tensor):
                yield thing
                if thing.is_leaf and thing.grad is not None:
                    yield thing.grad


def loss(stats: Any, batch: PackedBatch, counts: Counts) -> tuple[Tensor, dict]:
    return stats.logp.sum() / counts.tokens, {}


def state_checks(folder: Path, family: str, dtype: str, settings: LearnerConfig) -> list[Check]:
    """Weights, masters and moments tensor by tensor.

    Then everything that is alive between two micro-batches.
    """
    before = storages(alive())
    batches, counts = [stream(64), stream(64)], Counts(128, 2, 2)
    found: list[dict[int, int]] = []

    def look(done: int, total: int) -> None:
        if done == 0:
            found.append(storages(alive()))

    with Learner(folder, settings, seed=0, context=RunContext(dtype=dtype)) as learner:
        learner.train_minibatch(batches, counts, loss)  # makes the moments
        learner.on_micro_batch = look
        learner.train_minibatch(batches, counts, loss)
        world, optimizer = learner.world, learner.engine.optimizer
        weights = [
            x for p in learner.lm.parameters() for x in (p.data, getattr(p, "ds_tensor", p.data))
        ]
        kept = optimizer.optimizer.state if settings.zero_stage else optimizer.state
        moments = [v for s in kept.values() for k, v in s.items() if k.startswith("exp_avg")]
        parts = {
            "weights": weights,
            "masters": kept if settings.zero_stage else [],
            "moments": moments,
        }
        got = {name: float(sum(storages(part).values())) for name, part in parts.items()}
    everything = sum(n for address, n in found[0].items() if address not in before)
    lora = settings.lora.r if settings.mode == "lora" else 0
    t = Training(dtype, settings.zero_stage, world, settings.offload, lora_r=lora)
    shape = read_shape(folder)
    want, buffer = memory.state(shape, t), memory.bucket(shape, t)
    if settings.zero_stage == 2 and settings.offload == "none":
        buffer = 0.0  # given back after each micro-batch
    where = f"{family}, {dtype}, {settings.mode}, ZeRO {settings.zero_stage}, "
    where += f"offload {settings.offload}, " if settings.offload != "none" else ""
    where += f"rank 1 of {world}"
    bound = 0.02 if settings.offload == "none" or settings.zero_stage == 3 else 0.15
    return [
        Check(f"{where}: weights", want.weights, got["weights"], 0.0),
        Check(f"{where}: masters", want.masters, got["masters"], 0.0),
        Check(f"{where}: moments", want.moments, got["moments"], 0.0),
        Check(f"{where}: all with gradients", want.total + buffer, float(everything), bound),
    ]


def settings_grid(quick: bool) -> list[tuple[str, LearnerConfig]]:
    """(dtype, stage, offload) of full fine-tuning, and LoRA."""
    grid = [
        ("float32", 0, "none"),
        ("float32", 1, "none"),
        ("bfloat16", 1, "none"),
        ("bfloat16", 2, "none"),
    ]
    grid += [("bfloat16", 3, "none"), ("bfloat16", 3, "optimizer")]
    if not quick:
        grid += [("float32", 2, "none"), ("float32", 3, "none"), ("bfloat16", 3, "all")]
        grid += [
            (d, s, "optimizer")
            for d, s in (("float32", 1), ("float32", 2), ("bfloat16", 1), ("bfloat16", 2))
        ]
    out = [(d, LearnerConfig(zero_stage=s, offload=o)) for d, s, o in grid]
    adapters = [
        LearnerConfig(mode="lora", lora=LoraConfig(r=8), zero_stage=s)
        for s in ((3,) if quick else (1, 2, 3))
    ]
    return out + [("bfloat16", c) for c in adapters]


def all_state_checks(scratch: Path, quick: bool) -> list[Check]:
    """The same grid on however many ranks this process is one of."""
    out = []
    for family in ("qwen2",) if quick else ("qwen2", "qwen3 tied"):
        folder = make_model(scratch / family, family)
        for dtype, settings in settings_grid(quick):
            out += state_checks(folder, family, dtype, settings)
    return out


def on_two_ranks(scratch: Path, quick: bool) -> list[Check]:
    """`all_state_checks` under torchrun; what rank 0 measured."""
    result = scratch / "ranks.json"
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        __file__,
    ]
    command += ["--part", str(scratch), *(["--quick"] if quick else [])]
    subprocess.run(command, check=True, timeout=900, stdout=subprocess.DEVNULL)
    return [Check(**row) for row in json.loads(result.read_text())]


# -- one micro-batch, one cache --------------------------------------------------------------------


def saved_by_autograd(policy: Policy, batch: PackedBatch) -> float:
    """Bytes of the storages that a forward saves, each once.

    Weights and the batch itself are not counted.
    """
    known = storages([*policy.parameters(), *policy.buffers(), *vars_of(batch)])
    kept: list[Tensor] = []

    def keep(t: Tensor) -> Tensor:
        kept.append(t.detach())
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        stats = policy(batch)
    found = storages(kept)
    del stats
    return float(sum(n for address, n in found.items() if address not in known))


def vars_of(batch: PackedBatch) -> list[Tensor]:
    return [v for v in vars(batch).values() if isinstance(v, Tensor)]


def activation_checks(
    folder: Path, family: str, dtype: str, checkpointing: bool, tokens: int, fused: bool
) -> list[Check]:
    t = Training(dtype, checkpointing=checkpointing, fused=fused)
    shape, batch = read_shape(folder), stream(tokens)
    with contextlib.ExitStack() as stack:
        if not fused:  # as on a GPU
            stack.enter_context(mock.patch.object(forward, "fuse", lambda lm: lm))
        lm = load_model(folder, getattr(torch, dtype))
    policy = Policy(lm, gradient_checkpointing=checkpointing).train()
    edges = int(batch.mask.sum())
    formula = memory.saved(shape, t, tokens, edges) + memory.head_kept(shape, t, edges)
    where = f"{family}, {dtype}, {tokens} tokens{', checkpointing' if checkpointing else ''}"
    where += ", fused" if fused else ""
    checks = [Check(f"{where}: saved by forward", formula, saved_by_autograd(policy, batch), 0.1)]

    def step() -> None:
        policy(batch).logp.sum().backward()

    step()  # the gradients are there before
    head = memory.head_kept(shape, t, edges)  # given back before the layers' turn comes
    peak = formula + max(0.0, memory.recomputed(shape, t, tokens) - head)
    return [
        *checks,
        Check(f"{where}: peak of forward and backward", peak, float(peak_bytes(step)), 0.2),
    ]


def kv_checks(folder: Path, family: str, dtype: str) -> list[Check]:
    engine = NativeEngine(folder, dtype=dtype)
    stats, shape = engine.stats(), read_shape(folder)
    tokens = 16  # of a block of the pool
    measured = float(stats["block_bytes"])
    found = [
        Check(
            f"{family}, {dtype}: KV of {tokens} tokens",
            float(tokens * memory.kv_token(shape, dtype)),
            measured,
            0.0,
        )
    ]
    if stats["packed_bytes"]:
        packed = float(memory.packed(shape, dtype))
        found.append(
            Check(
                f"{family}, {dtype}: packed copy of the weights",
                packed,
                float(stats["packed_bytes"]),
                0.155,
            )
        )
    return found


def small_checks(scratch: Path, quick: bool) -> list[Check]:
    out = []
    for family in ("qwen3 tied", "qwen2") if quick else FAMILIES:
        folder = make_model(scratch / family, family)
        tensors = load_model(folder, torch.float32).parameters()
        out.append(
            Check(
                f"{family}: parameters",
                read_shape(folder).parameters,
                sum(p.numel() for p in tensors),
                0.0,
            )
        )
        for dtype in ("bfloat16", "float32"):
            for checkpointing in (False, True):
                for tokens in (512,) if quick else (512, 2048):
                    for fused in (True, False):
                        out += activation_checks(
                            folder, family, dtype, checkpointing, tokens, fused
                        )
            out += kv_checks(folder, family, dtype)
    return out


# -- the table -------------------------------------------------------------------------------------


def table() -> dict[str, dict[str, memory.Row]]:
    """Recipe → rows, on one of 8 ranks."""
    out = {}
    for name, config in MODELS.items():
        cfg = appo.load_config(name)
        rows = memory.estimate(
            read_shape(config),
            cfg,
            resolve(cfg.algo),
            WORLD,
            context=config["max_position_embeddings"],
            gpu=True,
        )
        out[name] = {r.name: r for r in rows}
    return out


def show(recipes: dict[str, dict[str, memory.Row]], checks: list[Check]) -> None:
    from rich.console import Console
    from rich.table import Table

    sheet = Table(title=f"GB on each of {WORLD} GPUs (computed; h: in host memory)")
    for column in ("", *recipes):
        sheet.add_column(column, justify="left" if not column else "right")
    parameters = [f"{read_shape(MODELS[n]).parameters / 1e9:.2f} billion" for n in recipes]
    sheet.add_row("parameters", *parameters)
    for name in dict.fromkeys(name for rows in recipes.values() for name in rows):
        found = [rows.get(name) for rows in recipes.values()]
        sheet.add_row(
            name, *("" if r is None else f"{r.bytes / 1e9:.1f}{' h' * r.host}" for r in found)
        )
    sheet.add_row("allowance (not measured)", *[f"{RESERVE / 1e9:.1f}"] * len(recipes))
    sheet.add_row(
        f"on the GPU, of {BUDGET / 1e9:.0f}",
        *(f"{on_gpu(rows) / 1e9:.1f}" for rows in recipes.values()),
    )
    sheet.add_row(
        "at start, before weights are divided",
        *(f"{at_start(name, rows) / 1e9:.1f}" for name, rows in recipes.items()),
    )

    errors = Table(title="Formula against measurement (small models, this machine)")
    for column in ("what", "formula", "measured", "error", "bound"):
        errors.add_column(column, justify="left" if column == "what" else "right")
    for c in checks:
        bound = "" if c.bound is None else f"{c.bound:.0%}" + ("" if c.good else "  EXCEEDED")
        errors.add_row(c.name, f"{c.formula:,.0f}", f"{c.measured:,.0f}", f"{c.error:+.1%}", bound)
    for one in (sheet, errors):
        Console(width=150).print(one)


def at_start(name: str, rows: dict[str, memory.Row]) -> float:
    """Beside the engine every rank loads the whole model, which ZeRO-3 then divides."""
    whole = memory.WIDTH["bfloat16"] * read_shape(MODELS[name]).parameters
    return RESERVE + whole + rows["engine weights"].bytes + rows["KV cache"].bytes


def on_gpu(rows: dict[str, memory.Row]) -> float:
    return RESERVE + sum(r.bytes for r in rows.values() if not r.host)


def main() -> int:
    options = parser(__doc__ or "")
    options.add_argument(
        "--part", type=Path, help="measure as one rank of torchrun; used by the script itself"
    )
    args = options.parse_args()
    torch.set_num_threads(1)
    if args.part:
        checks = all_state_checks(args.part, args.quick)
        if os.environ["RANK"] == "0":
            (args.part / "ranks.json").write_text(json.dumps([asdict(c) for c in checks]))
        return 0
    with tempfile.TemporaryDirectory() as scratch:
        checks = small_checks(Path(scratch), args.quick)
        if not args.quick:
            checks += all_state_checks(Path(scratch), args.quick)
        checks += on_two_ranks(Path(scratch), args.quick)
    recipes = table()
    show(recipes, checks)
    sheet = {name: {r.name: asdict(r) for r in rows.values()} for name, rows in recipes.items()}
    found = [asdict(c) | {"error": c.error, "good": c.good} for c in checks]
    _write(
        args,
        recipes=sheet,
        on_gpu={n: max(on_gpu(r), at_start(n, r)) for n, r in recipes.items()},
        checks=found,
    )
    bad = [c.name for c in checks if not c.good]
    print(
        f"{len(checks) - len(bad)} of {len(checks)} within their bound"
        + "".join(f"\n  not: {n}" for n in bad)
    )
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
