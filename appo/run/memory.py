"""What a run needs in memory, computed from shapes before anything is loaded: bytes on each rank.

The formulas are those of what the code really keeps: the states of DeepSpeed's optimisers as
`appo.learner.zero` sets them up, and what autograd saves of a Llama or Qwen layer between forward
and backward. `bench/learner/memory.py` prints them for large models and compares them with what is
measured on small ones. Sizes are bytes, lengths tokens.

With P parameters of w bytes (2 for bfloat16), of which T are trained, on R ranks:

| ZeRO | weights | gradients | masters (float32) | moments (float32) |
|---|---|---|---|---|
| 0, float32 | wP | 4T | none | 8T |
| 1, bfloat16 | wP | 6T: float32 sums, and those of one backward | 4T/R | 8T/R |
| 1, float32 | wP | 4T | 4T/R | 8T/R |
| 2 | wP | 4T/R | 4T/R | 8T/R |
| 3 | wP/R | 4T/R | 4T/R | 8T/R |

Stage 2, and 1 in float32, keep one more copy of the first trained tensor (an embedding that is not
tied). Offloading moves masters, moments and gradients to the host and adds buffers there:
`staging`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from appo.algo.algorithm import Algorithm
from appo.config import Config
from appo.models.shape import LINEARS, ModelShape

if TYPE_CHECKING:
    from appo.run.plan import Plan

WIDTH = {"bfloat16": 2, "float32": 4}

# DeepSpeed's settings, in elements: the largest buffer that gradients are summed in and the largest
# parameter that ZeRO-3 does not divide (both as appo.learner.zero has them), and what ZeRO-3
# gathers at a time (its own choice).
BUCKET = 50_000_000
KEPT_WHOLE = 100_000
LIVE = 1_000_000_000


@dataclass(frozen=True)
class Training:
    """What decides how much the learner keeps.

    lora_r 0: all parameters are trained. fused: norms and MLPs in one pass
    (`appo.learner.fused_layers`, on a CPU), which keep less than the modules of transformers do.
    """

    dtype: str = "bfloat16"
    zero_stage: int = 1
    world: int = 1
    offload: str = "none"
    checkpointing: bool = False
    fused: bool = False
    lora_r: int = 0
    lora_layers: int | None = None  # the last ones; None: all
    lora_targets: Sequence[str] = LINEARS

    @property
    def width(self) -> int:
        """Bytes of a number of the weight dtype."""
        return WIDTH[self.dtype]


@dataclass(frozen=True)
class State:
    """What the learner keeps between steps, on one rank, in bytes.

    `host`: names of rows that `offload` moves there.
    """

    weights: float
    gradients: float
    masters: float
    moments: float
    copy: float = 0.0  # of the first trained tensor
    staging: float = 0.0  # what offloading needs beside them, on the host
    host: frozenset[str] = frozenset()

    @property
    def total(self) -> float:
        """All of it, device and host together, in bytes."""
        return (
            self.weights + self.gradients + self.masters + self.moments + self.copy + self.staging
        )


def adapters(shape: ModelShape, t: Training) -> list[int]:
    """Elements of every LoRA tensor: A [r, inputs] and B [outputs, r] of each target."""
    targets = [s for name, s in shape.linears().items() if name in t.lora_targets]
    layers = shape.layers if t.lora_layers is None else min(t.lora_layers, shape.layers)
    return [t.lora_r * side for _ in range(layers) for pair in targets for side in pair]


def state(shape: ModelShape, t: Training) -> State:
    """Weights, gradients and optimiser of one rank; the table in the docstring of the module."""
    added = adapters(shape, t) if t.lora_r else []
    everything = [*shape.tensors(), *added]
    trained = added or everything
    total, learned = sum(everything), sum(trained)
    weights, part = float(t.width * total), learned / t.world
    if t.zero_stage == 3:
        share = sum(-(-n // t.world) for n in everything)
        whole = sum(n for n in everything if n <= KEPT_WHOLE) if t.world > 1 else 0
        weights = float(t.width * (share + whole))
        part = float(sum(-(-n // t.world) for n in trained))
    if t.zero_stage == 0:
        return State(weights, 4.0 * learned, 0.0, 8.0 * learned)
    gradients, copy, staging = 4.0 * part, 0.0, 0.0
    moved = t.offload != "none"
    own = (
        t.zero_stage == 1 and t.dtype == "bfloat16" and not moved
    )  # DeepSpeed has an optimiser of its own for it
    if t.zero_stage == 1:
        gradients = (6.0 if own else 4.0) * learned
    if t.zero_stage < 3 and not own and not shape.tied:
        copy = float(t.width * (added[0] if added else shape.vocab * shape.hidden))
    if moved:
        staging = 4.0 * part if t.zero_stage == 3 else t.width * (part + 2.0 * max(trained))
        staging += 4.0 * part * (t.zero_stage == 1)
    host = {"masters", "moments", "gradients"} if moved else set()
    host |= {"weights"} if t.offload == "all" else set()
    return State(weights, gradients, 4.0 * part, 8.0 * part, copy, staging, frozenset(host))


# -- one micro-batch -------------------------------------------------------------------------------


def layer_token(shape: ModelShape, t: Training) -> int:
    """Bytes that one transformer layer saves for its backward, per token.

    A norm keeps its input, 1/rms and (in the modules of transformers, for the gradient of its
    weight) the normalised row, the linear layers their input; attention q, k, v, its output and a
    log-sum-exp per head; the MLP its two inner rows (in transformers: three) and their product.
    Frozen weights need no inputs: with LoRA only what adapters read is kept.
    """
    w, q, k, i = t.width, shape.query, shape.key, shape.ff

    def reads(*names: str) -> bool:
        return not t.lora_r or any(n in t.lora_targets for n in names)

    total = 2 * _norm(t, shape.hidden, 1)
    total += (
        w * shape.hidden * (reads("q_proj", "k_proj", "v_proj") + reads("gate_proj", "up_proj"))
    )
    if shape.qk_norm:
        total += _norm(t, q, shape.heads) + _norm(t, k, shape.kv_heads)
    total += w * (2 * q + 2 * k) + 4 * shape.heads
    total += w * i * ((2 if t.fused else 3) + reads("down_proj"))
    return total + w * t.lora_r * sum(n in t.lora_targets for n in LINEARS)


def _norm(t: Training, size: int, rows: int) -> int:
    """What RMSNorm keeps of `rows` rows that have `size` elements together."""
    if t.fused:
        return t.width * size + 4 * rows
    return 4 * size + 4 * rows + (0 if t.lora_r else t.width * size)


def saved(shape: ModelShape, t: Training, tokens: int, edges: int | None = None) -> float:
    """Bytes alive between forward and backward of a packed stream of `tokens` with `edges` targets.

    default: as many.

    With gradient checkpointing a layer keeps its input alone. No [tokens, vocabulary] tensor is
    part of it; what the head keeps for its backward on a CPU: `head_kept`.
    """
    edges = tokens if edges is None else edges
    w, h = t.width, shape.hidden
    layers = shape.layers if not t.lora_r else min(t.lora_layers or shape.layers, shape.layers)
    each = w * h if t.checkpointing else layer_token(shape, t)
    ends = _norm(t, h, 1) + w * h  # the last norm and its output, which the head reads
    turns = 0 if t.checkpointing else 2 * w * shape.head_dim  # cosines and sines of the positions
    return float(tokens * (layers * each + ends + turns + 12) + edges * 36)


def recomputed(shape: ModelShape, t: Training, tokens: int) -> float:
    """Bytes beyond `saved` while the backward of one layer runs.

    Its saved rows again where it was checkpointed, and the gradients of a row of the MLP and of a
    hidden state; the others take the place of saved rows that are done.
    """
    again = layer_token(shape, t) if t.checkpointing else 0
    return float(tokens * (again + t.width * (shape.ff + shape.hidden)))


def head_kept(shape: ModelShape, t: Training, edges: int, room: int = 128 << 20) -> float:
    """Bytes the fused head keeps on a CPU in bfloat16, within `room`; none elsewhere.

    See `appo._kernels.linear_logprob.op`.
    """
    if t.dtype != "bfloat16":
        return 0.0
    whole = edges * (64 + -(-shape.vocab // 256) * 576)
    return float(min(whole, room)) if whole <= 2 * room else 0.0


def bucket(shape: ModelShape, t: Training) -> float:
    """Bytes of the float32 buffer that gradients are summed in.

    DeepSpeed also makes it for one rank.
    """
    if t.zero_stage == 0 or (t.zero_stage == 1 and t.dtype == "bfloat16" and t.offload == "none"):
        return 0.0
    return 4.0 * min(BUCKET, sum(adapters(shape, t) if t.lora_r else shape.tensors()))


def exchanged(shape: ModelShape, t: Training) -> float:
    """Bytes for talking to other ranks.

    `bucket`, and from two ranks on the largest gradient before it is divided and, under ZeRO-3, the
    weights that are whole at a time.
    """
    buffer = bucket(shape, t)
    if t.world == 1 or not buffer:
        return buffer
    largest = max(adapters(shape, t) if t.lora_r else shape.tensors())
    whole = min(LIVE, shape.parameters) * t.width if t.zero_stage == 3 else 0
    return buffer + (4.0 + t.width) * largest + whole


# -- the engine ------------------------------------------------------------------------------------


def packed(shape: ModelShape, dtype: str) -> int:
    """Bytes of the native engine's second copy, laid out for the CPU.

    Linear layers and head, without padding.
    """
    layer = sum(a * b for a, b in shape.linears().values())
    return WIDTH[dtype] * (layer * shape.layers + shape.vocab * shape.hidden)


def kv_token(shape: ModelShape, dtype: str) -> int:
    """Bytes of keys and values of one token."""
    return 2 * shape.layers * shape.key * WIDTH[dtype]


@dataclass(frozen=True)
class Row:
    """One line of the table.

    What, how many bytes on one rank, and whether they lie in the host's memory.
    """

    name: str
    bytes: float
    host: bool = False


def training_of(cfg: Config, world: int, gpu: bool) -> Training:
    """What the configuration says about the learner, on `world` ranks."""
    c, lora = cfg.learner, cfg.learner.mode == "lora"
    return Training(
        dtype=cfg.model.dtype, zero_stage=c.zero_stage, world=world, offload=c.offload,
        checkpointing=c.gradient_checkpointing, fused=not gpu, lora_r=c.lora.r if lora else 0, lora_layers=c.lora.layers,
        lora_targets=tuple(c.lora.targets),
    )  # fmt: skip


def estimate(
    shape: ModelShape,
    cfg: Config,
    algo: Algorithm,
    world: int = 1,
    *,
    context: int,
    gpu: bool = False,
) -> list[Row]:
    """The large tensors of one rank when everything is in use at once.

    That is with the largest possible batch and the longest rollouts.

    context: the longest sequence the model can have. gpu: on an accelerator the native engine keeps
    no second copy of its weights and the head nothing for its backward; without one, all of it is
    host memory anyway.
    """
    t = training_of(cfg, world, gpu)
    s, tokens = state(shape, t), cfg.learner.token_budget
    engine = t.width * shape.parameters
    if cfg.rollout.engine == "native" and not gpu:
        engine += packed(shape, cfg.model.dtype)
    head = 0.0 if gpu else head_kept(shape, t, tokens)
    rows = [
        Row("weights", s.weights + s.copy, "weights" in s.host),
        Row("gradients", s.gradients, "gradients" in s.host),
        Row("buffers of offloading", s.staging, True),
        Row("masters and Adam moments", s.masters + s.moments, "moments" in s.host),
        Row("activations", saved(shape, t, tokens) + head),
        Row("backward of one layer", recomputed(shape, t, tokens)),
        Row("exchange between ranks", exchanged(shape, t)),
        Row("engine weights", float(engine)),
        Row("KV cache", float(_kv_tokens(cfg, algo, world, context) * kv_token(shape, cfg.model.dtype))),
    ]  # fmt: skip
    return [r for r in rows if r.bytes]


def _kv_tokens(cfg: Config, algo: Algorithm, world: int, context: int) -> int:
    """Tokens with keys and values if every rollout of a step runs to its limit.

    rollout.kv_tokens is the most.
    """
    prompts = -(-cfg.prompts_per_step // world)
    longest = min(2 * cfg.rollout.max_new_tokens, context)
    most = longest * algo.rollouts * prompts * (1 + cfg.staleness)
    return min(most, cfg.rollout.kv_tokens or most)


def card_row(p: Plan) -> tuple[str, str]:
    """The line of the start-up card."""
    import torch

    gpu = torch.cuda.is_available()
    shape = p.shape
    rows = estimate(shape, p.cfg, p.algo, p.ranks, context=p.model.context, gpu=gpu)
    total = sum(r.bytes for r in rows if not (gpu and r.host)) / 2**30
    each = " a rank" if p.ranks > 1 else ""
    parts = ", ".join(f"{r.name} {r.bytes / 2**20:.0f} MiB{' (host)' * r.host}" for r in rows)
    return (
        "memory",
        f"tensors up to {total:.1f} GiB{each}, Python and PyTorch 1 to 2 GiB more ({parts})",
    )
