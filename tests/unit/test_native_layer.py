"""The C++ layers against the PyTorch runner and a float64 forward: families, dtypes, rows, adapters, threads, reloads.

Attention is replaced by a mixture of each row's own q, k and v, so that everything else is seen through it.
"""

from __future__ import annotations

import multiprocessing

import pytest
import torch
import torch.nn.functional as F
from tiny_models import build, dense
from torch import Tensor

from appo.errors import EngineError
from appo.kernels import linear_cpu
from appo.rollout.native import NativeEngine
from appo.rollout.native.layers import NativeLayers, unavailable
from appo.rollout.native.model import Model
from appo.rollout.native.weights import ModelConfig

torch.set_num_threads(1)
ISA = linear_cpu.isa()
pytestmark = pytest.mark.skipif(ISA is None, reason="no native library or no AVX2")
FLOATS = torch.float32
DTYPES = [
    FLOATS,
    pytest.param(
        torch.bfloat16,
        marks=pytest.mark.skipif(ISA != "avx512_bf16", reason="needs AVX512-BF16"),
    ),
]
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
ROWS = [1, 3, 8, 17, 64]
CONTEXT = 50


def config(family: str = "llama", shape: str = "whole", **other) -> ModelConfig:
    base = dict(
        family="llama", layers=2, vocab=97, eps=1e-5, tied=True, qkv_bias=False, o_bias=False, mlp_bias=False,
        qk_norm=False, max_positions=CONTEXT, rope=dict(rope_type="default", rope_theta=1e4),
    )  # fmt: skip
    return ModelConfig(**{**base, **SHAPES[shape], **FAMILIES[family], **other})


def weights(c: ModelConfig, seed: int = 0) -> dict[str, Tensor]:
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


def adapters(c: ModelConfig, rank: int, seed: int = 1) -> dict[str, Tensor]:
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
    c: ModelConfig, tensors: dict[str, Tensor], dtype=FLOATS, runner="native", **layers
) -> Model:
    m = Model(c, dtype, torch.device("cpu"), CONTEXT, runner=runner)
    if layers:
        m.native = NativeLayers(c, dtype, **layers)
    m.load(tensors.items())
    return m


class Mixture:
    """Stands for attention: [M, Hq·D] from each row's own q, k, v; keeps a copy of what it was given."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self.seen += [q.clone(), k.clone(), v.clone()]
        group = q.shape[1] // k.shape[1]
        k, v = (x.repeat_interleave(group, 1) for x in (k, v))
        return (0.5 * q * torch.tanh(k) + v).reshape(len(q), -1)


def inputs(c: ModelConfig, rows: int, seed: int = 2) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, c.vocab, (rows,), generator=generator)
    return ids, torch.randint(0, CONTEXT, (rows,), generator=generator)


def forward(m: Model, ids: Tensor, positions: Tensor) -> Tensor:
    return m.forward(ids, positions, Mixture(), None)


def oracle(m: Model, ids: Tensor, positions: Tensor) -> Tensor:
    """The same in float64 from the weights that m holds, without any rounding."""
    c, attention = m.config, Mixture()

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

    x = m.embed[ids].double()
    for i, layer in enumerate(m.layers):
        heads = linear(norm(x, layer.norm1), layer.qkv).view(len(x), -1, c.head_dim)
        qk, v = heads[:, : c.heads + c.kv_heads], heads[:, c.heads + c.kv_heads :]
        if layer.qk_norm is not None:
            qk = norm(qk, layer.qk_norm)
        pairs = torch.view_as_complex(qk.reshape(*qk.shape[:2], -1, 2)) * m.turn[positions]
        qk = torch.view_as_real(pairs).reshape(qk.shape)
        x = x + linear(attention(i, qk[:, : c.heads], qk[:, c.heads :], v), layer.o)
        gate_up = linear(norm(x, layer.norm2), layer.gate_up)
        x = x + linear(F.silu(gate_up[:, : c.ff]) * gate_up[:, c.ff :], layer.down)
    return norm(x, m.norm)


def error(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_float32_agrees_with_pytorch_and_float64(family, shape, rows):
    c = config(family, shape)
    tensors, (ids, positions) = weights(c), inputs(c, rows)
    ours, theirs = model(c, tensors), model(c, tensors, runner="torch")
    assert ours.native is not None and theirs.native is None
    exact = oracle(ours, ids, positions)
    assert error(forward(theirs, ids, positions), exact) < 1e-6
    assert error(forward(ours, ids, positions), exact) < 1e-6
    hidden = forward(ours, ids, positions)
    logits = hidden.double() @ ours.head.weight.double().T
    assert error(ours.logits(hidden), logits) < 1e-6


@pytest.mark.skipif(ISA != "avx512_bf16", reason="needs AVX512-BF16")
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_rounds_where_pytorch_rounds(family, shape, rows):
    c = config(family, shape)
    tensors, (ids, positions) = weights(c), inputs(c, rows)
    ours, theirs = (model(c, tensors, torch.bfloat16, runner) for runner in ("native", "torch"))
    exact = oracle(ours, ids, positions)
    bound = 1.1 * error(forward(theirs, ids, positions), exact) + 5e-4
    assert error(forward(ours, ids, positions), exact) < bound
    seen, after = [], []  # of one layer: what attention was given, and the residuals
    one = config(family, shape, layers=1)
    first = weights(one)
    for runner in ("native", "torch"):
        m = model(one, first, torch.bfloat16, runner)
        attention, x = Mixture(), m.embed[ids].float()
        if m.native is None:
            m._layers(x, positions, attention)
        else:
            m.native.forward(x, m.turn, positions, attention)
        seen.append(torch.cat([part.flatten() for part in attention.seen]))
        after.append(x)
    # Only sums in another order differ. With one rounding more or less, half of the residuals would.
    assert float((seen[0] == seen[1]).double().mean()) > 0.97
    assert float((after[0] == after[1]).double().mean()) > 0.97


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank", [3, 64])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_adapters_are_applied(family, rank, dtype):
    c = config(family, "ragged")
    tensors, low_rank, (ids, positions) = weights(c), adapters(c, rank), inputs(c, 9)
    ours, theirs = (model(c, tensors, dtype, runner) for runner in ("native", "torch"))
    plain = forward(ours, ids, positions)
    for m in (ours, theirs):
        m.load(low_rank.items())
    exact = oracle(ours, ids, positions)
    assert error(plain, exact) > 0.1, "the adapters do nothing: a dropped one would not be seen"
    torch_error = error(forward(theirs, ids, positions), exact)
    assert error(forward(ours, ids, positions), exact) < 1.1 * torch_error + (
        1e-6 if dtype == FLOATS else 5e-4
    )
    ours.load(tensors.items())  # full weights end them
    assert torch.equal(forward(ours, ids, positions), plain)


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_has_the_same_bits_in_every_batch(dtype, shape, adapted):
    c = config("qwen3", shape, qkv_bias=True)
    m = model(c, weights(c), dtype)
    if adapted:
        m.load(adapters(c, 5).items())
    ids, positions = inputs(c, 130)
    whole = forward(m, ids, positions)
    logits = m.logits(whole)
    for rows in (*ROWS, 96, 127):
        for first in (0, 130 - rows):
            part = slice(first, first + rows)
            assert torch.equal(forward(m, ids[part], positions[part]), whole[part])
            assert torch.equal(m.logits(whole[part]), logits[part])


def instruction_sets() -> list:
    known = {"avx2": [("avx2", FLOATS)], "avx512": [("avx2", FLOATS), ("avx512", FLOATS)]}
    return known.get(str(ISA), [*known["avx512"], ("avx512_bf16", torch.bfloat16)])


@pytest.mark.parametrize("isa,dtype", instruction_sets())
def test_threads_do_not_change_bits(isa, dtype):
    c = config("qwen2", "whole", hidden=512, ff=640)  # large enough for threads to be used
    tensors = weights(c)
    for rows in (8, 200):
        ids, positions = inputs(c, rows)
        results = []
        for threads in (1, 2, 3):
            m = model(c, tensors, dtype, isa=isa, threads=threads)
            hidden = forward(m, ids, positions)
            results.append((hidden, m.logits(hidden)))
        assert error(results[0][0], oracle(m, ids, positions)) < (1e-6 if dtype == FLOATS else 3e-2)
        for hidden, logits in results[1:]:
            assert torch.equal(hidden, results[0][0])
            assert torch.equal(logits, results[0][1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_reloaded_weights_are_used(dtype):
    c = config("qwen3")
    m, (ids, positions) = model(c, weights(c, 0), dtype), inputs(c, 5)
    before, size = forward(m, ids, positions), m.native.packed_bytes
    other = weights(c, 7)
    m.load(other.items())
    fresh = model(c, other, dtype)
    assert torch.equal(forward(m, ids, positions), forward(fresh, ids, positions))
    assert not torch.equal(forward(m, ids, positions), before)
    assert m.native.packed_bytes == size and m.native.pack_seconds > 0
    one = "model.layers.1.mlp.up_proj.weight"
    m.load([(one, torch.zeros_like(other[one]))])
    fresh.load((other | {one: torch.zeros_like(other[one])}).items())
    assert torch.equal(forward(m, ids, positions), forward(fresh, ids, positions))


@pytest.mark.skipif(ISA != "avx512_bf16", reason="needs AVX512-BF16")
def test_float32_logits_of_a_bfloat16_head_are_not_rounded():
    c = config(vocab=1000)
    m = model(c, weights(c), torch.bfloat16)
    hidden = torch.randn(7, c.hidden, generator=torch.Generator().manual_seed(3))
    exact = hidden.double() @ m.head.weight.double().T
    assert m.logits(hidden).dtype == FLOATS and error(m.logits(hidden), exact) < 3e-7
    assert error(m.logits(hidden.bfloat16()), exact) < 3e-3  # of the rounded hidden state
    rounded = hidden.bfloat16().double() @ m.head.weight.double().T
    assert error(m.logits(hidden.bfloat16()), rounded) < 3e-7


def test_infinite_and_nan_rows_stay_alone():
    c = config("qwen3", "ragged")
    m, (ids, positions) = model(c, weights(c)), inputs(c, 8)
    clean = forward(m, ids, positions)
    ids = ids.clone()
    ids[3] = (int(ids.max()) + 1) % c.vocab
    while int((ids == ids[3]).sum()) > 1:
        ids[3] = (ids[3] + 1) % c.vocab
    for value in (float("nan"), float("inf")):
        m.embed[ids[3]] = value
        found = forward(m, ids, positions)
        others = torch.arange(8) != 3
        assert found[3].isnan().all() and torch.equal(found[others], clean[others])


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("runner", ["torch", "native"])
def test_engine_scores_as_transformers_does_on_both_runners(family, runner, tmp_path):
    reference = build(family, tmp_path)
    engine = NativeEngine(tmp_path, dtype="float32", runner=runner, prefill_chunk=7)
    ids = torch.randint(0, 97, (25,), generator=torch.Generator().manual_seed(4)).tolist()
    scored = engine.score([engine.add_prompt(ids)])[0]
    logp, entropy = dense(reference, ids)
    torch.testing.assert_close(
        torch.from_numpy(scored.logprobs).double(), torch.from_numpy(logp), atol=1e-4, rtol=0
    )
    torch.testing.assert_close(
        torch.from_numpy(scored.entropy).double(), torch.from_numpy(entropy), atol=1e-4, rtol=0
    )
    assert (engine.stats()["packed_bytes"] > 0) == (runner == "native")


def test_bad_input_is_refused(tmp_path):
    c = config()
    m, (ids, positions) = model(c, weights(c)), inputs(c, 4)
    with pytest.raises(ValueError, match=r"positions\[1\] is 50, expected 0 … 49"):
        forward(m, ids, torch.tensor([0, 50, 1, 2]))
    with pytest.raises(TypeError, match="attended must be float32"):
        m.forward(ids, positions, lambda i, q, k, v: Mixture()(i, q, k, v).double(), None)
    with pytest.raises(ValueError, match="attended has"):
        m.forward(ids, positions, lambda i, q, k, v: v, None)
    with pytest.raises(ValueError, match="hidden"):
        m.logits(torch.randn(2, c.hidden + 1))
    with pytest.raises(ValueError, match="isa is 'mmx'"):
        NativeLayers(c, FLOATS, isa="mmx")
    assert "even" in str(unavailable(config(head_dim=19), FLOATS, torch.device("cpu")))
    assert "cuda" in str(unavailable(c, FLOATS, torch.device("cuda")))
    with pytest.raises(EngineError, match="float16"):
        Model(c, torch.float16, torch.device("cpu"), CONTEXT, runner="native")
    build("llama", tmp_path)
    with pytest.raises(EngineError, match="runner='fast'"):
        NativeEngine(tmp_path, runner="fast")


def _child(m: Model, ids: Tensor, positions: Tensor, want: Tensor) -> None:
    raise SystemExit(0 if torch.equal(forward(m, ids, positions), want) else 1)


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="no fork here")
def test_a_forked_process_has_its_own_threads():
    c = config(hidden=512, ff=640)
    m, (ids, positions) = model(c, weights(c), threads=2), inputs(c, 64)
    want = forward(m, ids, positions)
    child = multiprocessing.get_context("fork").Process(
        target=_child, args=(m, ids, positions, want), daemon=True
    )
    child.start()
    child.join(30)
    code = child.exitcode
    child.kill()
    assert code == 0, "None: the child waits for threads that only its parent has"
