"""Small models with random weights for both runners, and a float64 forward.

Trees of sequences are run through them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from appo.models.shape import ModelShape
from appo.rollout.native.attention.attention import segment_attention_torch
from appo.rollout.native.attention.pool import KVPool
from appo.rollout.native.model.layers import NativeLayers
from appo.rollout.native.model.model import Model
from appo.rollout.native.tree.block_list import BLOCK
from appo.rollout.native.tree.layout import Layout
from appo.rollout.native.tree.native_tree import make_tree

FLOATS = torch.float32
FAMILIES = {
    "llama": {},
    "llama-biased": dict(qkv_bias=True, o_bias=True, mlp_bias=True),
    "qwen2": dict(family="qwen2", qkv_bias=True),
    "qwen3": dict(family="qwen3", qk_norm=True),
}
# Sizes that fill panels of 64 columns, and sizes that end inside vectors, heads that cross panels.
SHAPES = {
    "whole": dict(hidden=128, ff=192, heads=4, kv_heads=2, head_dim=64),
    "ragged": dict(hidden=72, ff=90, heads=3, kv_heads=1, head_dim=20),
}
CONTEXT = 50


def config(family: str = "llama", shape: str = "whole", **other) -> ModelShape:
    base = dict(
        family="llama", layers=2, vocab=97, eps=1e-5, tied=True, qkv_bias=False, o_bias=False, mlp_bias=False,
        qk_norm=False, max_positions=CONTEXT, rope=dict(rope_type="default", rope_theta=1e4),
    )  # fmt: skip
    return ModelShape(**{**base, **SHAPES[shape], **FAMILIES[family], **other})


def weights(c: ModelShape, seed: int = 0) -> dict[str, Tensor]:
    """Random tensors under the names of the model; norms around 1, sums of size 1."""
    generator = torch.Generator().manual_seed(seed)
    out = {}
    for name, target in Model(
        c, FLOATS, torch.device("cpu"), CONTEXT, runner="torch"
    ).targets.items():
        values = torch.randn(target.shape, generator=generator)
        norm = "norm" in name
        out[name] = 1 + 0.3 * values if norm else values / max(target.shape[-1], 4) ** 0.5
    return out


def adapters(c: ModelShape, rank: int, seed: int = 1) -> dict[str, Tensor]:
    """lora_A and lora_B for every linear of every layer, about as large as the weights."""
    generator = torch.Generator().manual_seed(seed)
    out = {}
    for name, slice_ in Model(
        c, FLOATS, torch.device("cpu"), CONTEXT, runner="torch"
    ).slices.items():
        rows, columns = slice_.b - slice_.a, slice_.linear.weight.shape[1]
        out[f"{name}.lora_A"] = torch.randn(rank, columns, generator=generator) / columns**0.5
        out[f"{name}.lora_B"] = torch.randn(rows, rank, generator=generator) / rank**0.5
    return out


def model(
    c: ModelShape, tensors: dict[str, Tensor], dtype=FLOATS, runner="native", **layers
) -> Model:
    m = Model(c, dtype, torch.device("cpu"), CONTEXT, runner=runner)
    if layers:
        m.native = NativeLayers(c, dtype, **layers)
    m.load(tensors.items())
    return m


def run(m: Model, layout: Layout, pool: KVPool, rows: Tensor | None = None) -> Tensor:
    """Final hidden states, by the runner that the model has."""
    if m.native is not None:
        return m.native.forward(m, layout, pool, rows)

    def attention(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = torch.empty(q.shape, dtype=q.dtype)
        segment_attention_torch(q, k, v, layout, pool, layer, out)
        return out.flatten(1)

    return m.forward(layout.ids, layout.positions, attention, rows)


class Forest:
    """Sequences and their KV.

    `hidden`: what came out for each tuple of tokens that leads to a row.
    """

    def __init__(self, m: Model):
        c = m.config
        self.m, self.tree = m, make_tree()
        self.pool = KVPool(c.layers, c.kv_heads, c.head_dim, m.dtype)
        self.hidden: dict[tuple[int, ...], Tensor] = {}

    def step(self, seqs: list[int], budget: int = 1000) -> int:
        """Run what the sequences lack, at most `budget` rows of it; → how many rows that were."""
        layout = self.tree.plan(seqs, budget)
        assert isinstance(layout, Layout)
        self.pool.ensure(self.tree.span)
        hidden = run(self.m, layout, self.pool)
        self.tree.commit(layout)
        for seq in seqs:
            tokens = self.tree.tokens(seq)
            for node, count in self.tree.path(seq):
                first, start, rows = layout.rows_of.get(node, (0, 0, 0))
                for row in range(first, first + min(rows, count - start)):
                    leads = tuple(tokens[: int(layout.positions[row]) + 1])
                    self.hidden[leads] = hidden[row]
        return len(hidden)

    def prefill(self, seqs: list[int], chunk: int = 1000) -> None:
        """Until each lacks at most what the next step runs: all but the last token has KV."""
        while any(self.tree.kv(seq) < self.tree.length(seq) - 1 for seq in seqs):
            self.step(seqs, chunk)


def grow(
    m: Model, leaves: int = 17, chunk: int = 1000, batch: int = 1000, tokens: int = 2
) -> Forest:
    """A prompt, forks of it at many positions and forks of those.

    Then `tokens` more of every leaf, `batch` at a time.
    """
    generator = torch.Generator().manual_seed(leaves)
    draw = torch.randint(0, m.config.vocab, (leaves, 8 + tokens), generator=generator).tolist()
    forest = Forest(m)
    tree = forest.tree
    prompt = tree.add(torch.randint(0, m.config.vocab, (21,), generator=generator).tolist())
    forest.prefill([prompt], chunk)
    seqs: list[int] = []
    for i, ids in enumerate(draw):
        parent = prompt if i % 3 < 2 else seqs[-1]
        seqs.append(tree.fork(parent, tree.length(parent) - i % 5))
        tree.extend(seqs[-1], ids[: i % 8])
    forest.prefill(seqs, chunk)
    for t in range(tokens):
        for first in range(0, leaves, batch):
            forest.step(seqs[first : first + batch])
        for seq, ids in zip(seqs, draw):
            tree.extend(seq, [ids[8 + t]])
    return forest


def oracle(m: Model, ids: tuple[int, ...]) -> Tensor:
    """Of one sequence in float64 from the weights that m holds, without any rounding.

    [len(ids), d].
    """
    c = m.config

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return x * (x.square().mean(-1, keepdim=True) + c.eps).rsqrt() * weight.double()

    def linear(x: Tensor, part) -> Tensor:
        y = x @ part.weight.double().T
        if part.bias is not None:
            y = y + part.bias.double()
        if part.adapter is not None:
            down, up = part.adapter
            y = y + x @ down.double().T @ up.double().T
        return y

    x = m.embed[list(ids)].double()
    for layer in m.layers:
        heads = linear(norm(x, layer.norm1), layer.qkv).view(len(x), -1, c.head_dim)
        qk, v = heads[:, : c.heads + c.kv_heads], heads[:, c.heads + c.kv_heads :]
        if layer.qk_norm is not None:
            qk = norm(qk, layer.qk_norm)
        pairs = torch.view_as_complex(qk.reshape(*qk.shape[:2], -1, 2)) * m.turn[: len(x)]
        qk = torch.view_as_real(pairs).reshape(qk.shape)
        q, k, v = (
            part.transpose(0, 1).repeat_interleave(c.heads // part.shape[1], 0)
            for part in (qk[:, : c.heads], qk[:, c.heads :], v)
        )  # [Hq, T, D]
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + linear(attended.transpose(0, 1).flatten(1), layer.o)
        gate_up = linear(norm(x, layer.norm2), layer.gate_up)
        x = x + linear(F.silu(gate_up[:, : c.ff]) * gate_up[:, c.ff :], layer.down)
    return norm(x, m.norm)


def error(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


def errors(forest: Forest) -> float:
    """Of all rows of a forest, against float64."""
    keys = list(forest.hidden)
    found = torch.stack([forest.hidden[ids] for ids in keys])
    exact: dict[tuple[int, ...], Tensor] = {}
    for ids in sorted(keys, key=len, reverse=True):
        if ids not in exact:
            exact.update({ids[: i + 1]: row for i, row in enumerate(oracle(forest.m, ids))})
    return error(found, torch.stack([exact[ids] for ids in keys]))


def alone(c: ModelShape, rows: int, seed: int = 2) -> tuple[Layout, KVPool]:
    """Rows at random positions that read nothing but themselves.

    So attention returns their own values.
    """
    generator = torch.Generator().manual_seed(seed)
    index = torch.arange(rows)
    layout = Layout(
        ids=torch.randint(0, c.vocab, (rows,), generator=generator),
        positions=torch.randint(0, CONTEXT, (rows,), generator=generator),
        slots=index * BLOCK,
        segments=torch.stack((index, torch.ones_like(index)), 1),
        blocks=index,
        reads=torch.stack((index, index, index + 1, index), 1),
        limits=torch.ones_like(index),
        out_rows=index,
        seqs=[],
        rows_of={},
        decode_rows=rows,
        prefill_rows=0,
    )
    pool = KVPool(c.layers, c.kv_heads, c.head_dim, FLOATS)
    pool.ensure(rows)
    return layout, pool


def hidden_of(m: Model, rows: int = 9) -> Tensor:
    """Of a fixed batch, for tests that compare models."""
    layout, pool = alone(m.config, rows)
    if m.dtype != FLOATS:
        pool = KVPool(m.config.layers, m.config.kv_heads, m.config.head_dim, m.dtype)
        pool.ensure(rows)
    return run(m, layout, pool)
