"""The C++ runner against the PyTorch runner and a float64 forward: families, dtypes, rows,
adapters, threads, reloads.

Sequences of a tree are planned, run and committed step by step; each row's hidden state is then
found by the tokens that lead to it (tests/support/native_models.py).
"""

from __future__ import annotations

import multiprocessing
from dataclasses import replace

import pytest
import torch
from support.native_models import (
    CONTEXT,
    FAMILIES,
    FLOATS,
    SHAPES,
    Forest,
    adapters,
    alone,
    config,
    error,
    errors,
    grow,
    hidden_of,
    model,
    run,
    weights,
)  # fmt: skip
from support.tiny_models import build, dense
from torch import Tensor

from appo._kernels.linear_logprob import backend_cpu as linear_cpu
from appo.errors import EngineError
from appo.rollout.native import NativeEngine
from appo.rollout.native.attention.pool import KVPool
from appo.rollout.native.model.layers import NativeLayers, unavailable
from appo.rollout.native.model.model import Model

torch.set_num_threads(1)
ISA = linear_cpu.isa()
pytestmark = pytest.mark.skipif(ISA is None, reason="no native library or no AVX2")
DTYPES = [
    FLOATS,
    pytest.param(
        torch.bfloat16,
        marks=pytest.mark.skipif(ISA != "avx512_bf16", reason="needs AVX512-BF16"),
    ),
]


@pytest.mark.parametrize("leaves", [1, 17, 50])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_float32_agrees_with_pytorch_and_float64(family, shape, leaves):
    c = config(family, shape)
    tensors = weights(c)
    ours, theirs = model(c, tensors), model(c, tensors, runner="torch")
    assert ours.native is not None and theirs.native is None
    assert errors(grow(theirs, leaves)) < 1e-6
    assert errors(grow(ours, leaves)) < 1e-6
    hidden = hidden_of(ours)
    assert error(ours.logits(hidden), hidden.double() @ ours.head.weight.double().T) < 1e-6


@pytest.mark.skipif(ISA != "avx512_bf16", reason="needs AVX512-BF16")
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_rounds_where_pytorch_rounds(family, shape):
    c = config(family, shape)
    tensors = weights(c)
    ours, theirs = (model(c, tensors, torch.bfloat16, runner) for runner in ("native", "torch"))
    assert errors(grow(ours)) < 1.1 * errors(grow(theirs)) + 5e-4
    # Rows that read only themselves leave nothing to sums in another order but the linears: without
    # the rounding behind them a seventh of the keys and values differ.
    one = config(family, shape, layers=1)
    tensors, seen, after = weights(one), [], []
    for runner in ("native", "torch"):
        m = Model(one, torch.bfloat16, torch.device("cpu"), CONTEXT, False, runner)
        m.load(tensors.items())
        layout, _ = alone(one, 64)
        pool = KVPool(1, one.kv_heads, one.head_dim, torch.bfloat16)
        pool.ensure(64)
        after.append(run(m, layout, pool))
        seen.append(torch.cat([pool.read([block], 1) for block in range(64)]))
    assert after[0].dtype == torch.bfloat16
    assert float((seen[0] == seen[1]).double().mean()) > 0.97
    assert float((after[0] == after[1]).double().mean()) > 0.95


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank", [3, 64])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_adapters_are_applied(family, rank, dtype):
    c = config(family, "ragged")
    tensors, low_rank = weights(c), adapters(c, rank)
    ours, theirs = (model(c, tensors, dtype, runner) for runner in ("native", "torch"))
    plain = hidden_of(ours)
    for m in (ours, theirs):
        m.load(low_rank.items())
    assert error(hidden_of(ours), plain.double()) > 0.1, (
        "they do nothing: a dropped one would not be seen"
    )
    bound = 1.1 * errors(grow(theirs)) + (1e-6 if dtype == FLOATS else 5e-4)
    assert errors(grow(ours)) < bound
    ours.load(tensors.items())  # full weights end them
    assert torch.equal(hidden_of(ours), plain)


def same_bits(a: Forest, b: Forest) -> bool:
    assert a.hidden.keys() == b.hidden.keys()
    return all(torch.equal(row, b.hidden[ids]) for ids, row in a.hidden.items())


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_has_the_same_bits_in_every_batch(dtype, shape, adapted):
    c = config("qwen3", shape, qkv_bias=True, layers=1)
    m = model(c, weights(c), dtype)
    if adapted:
        m.load(adapters(c, 5).items())
    whole = grow(m, 33)
    for batch in range(1, 33):
        assert same_bits(grow(m, 33, batch=batch), whole), f"{batch} rows at a time"
    for chunk in (1, 2, 7, 16, 50):
        assert same_bits(grow(m, 33, chunk=chunk), whole), f"prefilled in chunks of {chunk}"
    hidden = torch.stack(list(whole.hidden.values()))
    logits = m.logits(hidden)
    for rows in range(1, 34):
        assert torch.equal(m.logits(hidden[-rows:]), logits[-rows:])


def instruction_sets() -> list:
    known = {"avx2": [("avx2", FLOATS)], "avx512": [("avx2", FLOATS), ("avx512", FLOATS)]}
    return known.get(str(ISA), [*known["avx512"], ("avx512_bf16", torch.bfloat16)])


@pytest.mark.parametrize("isa,dtype", instruction_sets())
def test_threads_do_not_change_bits(isa, dtype):
    c = config("qwen2", "whole", hidden=512, ff=640)  # large enough for threads to be used
    tensors, results, logits = weights(c), [], []
    for threads in (1, 2, 3):
        m = model(c, tensors, dtype, isa=isa, threads=threads)
        results.append(grow(m, 33))
        results.append(grow(m, 33, batch=5, chunk=30))
        logits.append(m.logits(torch.stack(list(results[0].hidden.values()))))
    assert errors(results[0]) < (2e-6 if dtype == FLOATS else 3e-2)
    assert all(same_bits(forest, results[0]) for forest in results[1:])
    assert all(torch.equal(some, logits[0]) for some in logits[1:])


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_chosen_rows_are_those_of_all_rows(dtype):
    c = config("qwen3")
    m = model(c, weights(c), dtype)
    layout, _ = alone(c, 20)
    pool = KVPool(c.layers, c.kv_heads, c.head_dim, dtype)
    pool.ensure(20)
    whole = m.native.forward(m, layout, pool)
    kept = pool.read(range(20), 320).clone()
    for rows in ([3], [19, 0, 7], [5, 5, 5], [*range(20)], [*range(20)] * 2, []):
        pool.fill_nan(range(20))
        some = m.native.forward(m, layout, pool, torch.tensor(rows, dtype=torch.int64))
        assert torch.equal(some, whole[rows])
        slots = layout.slots
        assert torch.equal(pool.read(range(20), 320)[..., slots, :], kept[..., slots, :])


@pytest.mark.parametrize("dtype", DTYPES)
def test_reloaded_weights_are_used(dtype):
    c = config("qwen3")
    m = model(c, weights(c, 0), dtype)
    before, size = hidden_of(m), m.native.packed_bytes
    other = weights(c, 7)
    m.load(other.items())
    fresh = model(c, other, dtype)
    assert torch.equal(hidden_of(m), hidden_of(fresh))
    assert not torch.equal(hidden_of(m), before)
    assert m.native.packed_bytes == size and m.native.pack_seconds > 0


@pytest.mark.parametrize("tied", [True, False])
def test_one_reloaded_tensor_is_used(tied):
    """Only the layer, or the head, that it belongs to is packed again."""
    c = config("qwen3", tied=tied, qkv_bias=True)
    tensors = weights(c)
    m = model(c, tensors)
    for name in m.targets:
        tensors[name] = tensors[name].flip(0) * 0.5
        m.load([(name, tensors[name])])
        hidden, fresh = hidden_of(m), model(c, tensors)
        assert torch.equal(hidden, hidden_of(fresh)), name
        assert torch.equal(m.logits(hidden), fresh.logits(hidden)), name


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
    m = model(c, weights(c))
    layout, pool = alone(c, 8)
    layout.ids[:] = torch.arange(8)
    clean = run(m, layout, pool)
    for value in (float("nan"), float("inf")):
        m.embed[3] = value
        found = run(m, layout, pool)
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
    m = model(c, weights(c))
    layout, pool = alone(c, 4)

    def run_with(**tables):
        m.native.forward(m, replace(layout, **tables), pool)

    with pytest.raises(ValueError, match=r"positions\[1\] is 50, expected 0 … 49"):
        run_with(positions=torch.tensor([0, 50, 1, 2]))
    with pytest.raises(ValueError, match=r"ids\[3\] is 97, expected 0 … 96"):
        run_with(ids=torch.tensor([0, 50, 1, 97]))
    with pytest.raises(ValueError, match="positions has 3 items, expected 4"):
        run_with(positions=torch.arange(3))
    with pytest.raises(TypeError, match="ids has the wrong dtype"):
        run_with(ids=layout.ids.int())
    with pytest.raises(ValueError, match=r"out_rows\[0\] is 4, expected 0 … 3"):
        m.native.forward(m, layout, pool, torch.tensor([4]))
    with pytest.raises(EngineError, match="the KV pool is .*plain.*; the model needs"):
        m.native.forward(m, layout, KVPool(2, 2, 64, FLOATS, layout="plain"))
    with pytest.raises(ValueError, match="hidden"):
        m.logits(torch.randn(2, c.hidden + 1))
    with pytest.raises(ValueError, match="isa is 'mmx'"):
        NativeLayers(c, FLOATS, isa="mmx")
    assert "even" in str(unavailable(config(head_dim=19), FLOATS, torch.device("cpu")))
    assert "256" in str(unavailable(config(head_dim=258), FLOATS, torch.device("cpu")))
    assert "cuda" in str(unavailable(c, FLOATS, torch.device("cuda")))
    with pytest.raises(EngineError, match="float16"):
        Model(c, torch.float16, torch.device("cpu"), CONTEXT, runner="native")
    build("llama", tmp_path)
    with pytest.raises(EngineError, match="runner='fast'"):
        NativeEngine(tmp_path, runner="fast")


def _child(m: Model, want: Tensor) -> None:
    raise SystemExit(0 if torch.equal(hidden_of(m, 64), want) else 1)


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="no fork here")
def test_a_forked_process_has_its_own_threads():
    c = config(hidden=512, ff=640)
    m = model(c, weights(c), threads=2)
    child = multiprocessing.get_context("fork").Process(
        target=_child, args=(m, hidden_of(m, 64)), daemon=True
    )
    child.start()
    child.join(30)
    code = child.exitcode
    child.kill()
    assert code == 0, "None: the child waits for threads that only its parent has"
