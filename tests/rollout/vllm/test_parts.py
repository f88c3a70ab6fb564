"""Parts of the vLLM backend by themselves: weight names, reports, heads, rows of a batch."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from support.vllm_engines import table

from appo.errors import EngineError
from appo.rollout.vllm import head, reports, start, weights, worker_statistics

Q, K, V = (f"model.layers.0.self_attn.{x}_proj.weight" for x in "qkv")


def test_fused_layers_are_sent_whole(tmp_path):
    save_file({n: torch.full((2, 2), float(i)) for i, n in enumerate((Q, K, V, "model.norm.weight"))},
              tmp_path / "m.safetensors")  # fmt: skip
    loader = weights.WeightLoader(weights.Checkpoint(tmp_path), in_process=True)
    tensors, asked = loader.collect([(Q, torch.full((2, 2), 9.0))])
    assert asked == {Q} and {n: float(t[0, 0]) for n, t in tensors.items()} == {Q: 9.0, K: 1.0, V: 2.0}  # fmt: skip
    done = "model.layers.0.self_attn.qkv_proj.weight"
    llm = SimpleNamespace(collective_rpc=lambda method, kwargs: [[done]])
    loader.send(llm, tensors, asked)
    assert loader.loaded == {Q}
    # K of the folder is not K any more once it was pushed
    loader.send(llm, *loader.collect([(Q, torch.ones(2, 2)), (K, torch.ones(2, 2))]))
    with pytest.raises(EngineError, match="k_proj.*push it again"):
        loader.collect([(Q, torch.ones(2, 2))])


def test_pushed_tensors_are_copied(tmp_path):
    """The learner reuses one buffer for all of them; vLLM keeps tensors until their layer is whole."""
    save_file({n: torch.zeros(2, 2) for n in (Q, K, V)}, tmp_path / "m.safetensors")
    buffer = torch.empty(2, 2)
    loader = weights.WeightLoader(weights.Checkpoint(tmp_path), in_process=True)
    tensors, _ = loader.collect((n, buffer.fill_(i)) for i, n in enumerate((Q, K, V)))
    assert [float(tensors[n][0, 0]) for n in (Q, K, V)] == [0.0, 1.0, 2.0]


@pytest.mark.parametrize(
    ("name", "inside"),
    [
        ("model.layers.3.mlp.up_proj.weight", "model.layers.3.mlp.gate_up_proj.weight"),
        ("model.layers.3.self_attn.v_proj.bias", "model.layers.3.self_attn.qkv_proj.bias"),
        ("model.layers.3.self_attn.o_proj.weight", "model.layers.3.self_attn.o_proj.weight"),
        ("model.layers.3.self_attn.q_norm.weight", "model.layers.3.self_attn.q_norm.weight"),
        ("model.norm.weight", "model.norm.weight"),
    ],
)
def test_vllm_names(name, inside):
    assert weights.vllm_name(name) == inside


def tied_model(tied=True):
    """As vLLM on a CPU: the head multiplies by a packed copy that only `pack` renews."""
    embed, out = SimpleNamespace(weight=table(0)), SimpleNamespace(weight=table(0))
    out.packed = out.weight.clone()
    out.quant_method = SimpleNamespace(apply=lambda layer, x: x @ layer.packed.T)
    return SimpleNamespace(
        model=SimpleNamespace(embed_tokens=embed), lm_head=out,
        config=SimpleNamespace(tie_word_embeddings=tied),
    )  # fmt: skip


def test_tied_head_is_repacked_and_checked():
    model = tied_model()
    head.check_head(model)
    model.model.embed_tokens.weight = table(1)  # what a reload does
    with pytest.raises(EngineError, match="tied to the embedding"):
        head.check_head(model)

    def pack(layer):
        layer.packed = layer.weight.clone()

    head.retie(model, pack)
    head.check_head(model)
    assert torch.equal(model.lm_head.packed, table(1))


def test_untied_head_is_left_alone_and_checked():
    model = tied_model(tied=False)
    head.retie(model, lambda layer: pytest.fail("packed an untied head"))
    model.lm_head.weight = table(1)
    with pytest.raises(EngineError, match="other weights"):
        head.check_head(model)
    del model.lm_head
    head.retie(model, None)
    head.check_head(model)


def test_top_entropy_is_an_upper_bound_and_exact_when_all_is_seen():
    logp = torch.log_softmax(torch.randn(50, generator=torch.Generator().manual_seed(1)) * 3, -1)
    true = float(-(logp.exp() * logp).sum())
    order = logp.sort(descending=True).values.tolist()
    bounds = [reports.top_entropy(order[:k], 50) for k in (1, 5, 20, 49, 50)]
    assert all(a >= b - 1e-5 for a, b in itertools.pairwise(bounds)) and bounds[0] > true
    assert bounds[-1] == pytest.approx(true, abs=1e-5)


def test_entropy_with_excluded_tokens():
    logits = torch.tensor([[0.0, float("-inf"), 0.0], [1.0, 1.0, 1.0]])
    got = worker_statistics.entropy(logits, torch.ones(2, 1))
    np.testing.assert_allclose(got, [np.log(2), np.log(3)], atol=1e-6)


def test_rows_follow_the_batch():
    rows = worker_statistics.SampledEntropies()
    p = SimpleNamespace(extra_args={worker_statistics.KEY: "a"}, temperature=2.0)
    q = SimpleNamespace(extra_args={worker_statistics.KEY: "b"}, temperature=0.0)
    other = SimpleNamespace(extra_args=None, temperature=1.0)
    scored = SimpleNamespace(
        extra_args={worker_statistics.KEY: "c", worker_statistics.SCORE: 1.0}, temperature=0.0
    )
    rows.update([], [(0, p, [], []), (1, q, [], []), (2, other, [], []), (3, scored, [], [])], [])
    assert set(rows.rows) == {0, 1}
    rows.update([], [], [(0, 1, True)])
    assert rows.rows[1][:2] == ("a", 2.0) and rows.rows[0][:2] == ("b", 1.0)
    rows.update([0], [], [(1, 0, False)])
    assert set(rows.rows) == {0} and rows.rows[0][0] == "a"
    rows.update([], [(0, other, [], [])], [])  # a new request in the place of an old one
    assert rows.rows == {}


def test_environment(monkeypatch):
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "DEBUG")
    start.prepare_environment(in_process=True)
    import os

    assert os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"
    assert os.environ["VLLM_LOGGING_LEVEL"] == "DEBUG"
    assert os.environ["VLLM_USE_V2_MODEL_RUNNER"] == "0"
