"""The learner's exchanged forwards are the model's own functions: outputs and every gradient."""

import pytest
import torch
from support.tiny_models import CONFIGS, PROMPT, build

from appo.learner.fused_layers import fuse
from appo.learner.policy import ATTENTION, load_model


def gradients(lm, **how):
    """{"output": last hidden states, name: gradient} of a sum with fixed random factors."""
    out = lm.model(input_ids=torch.tensor([PROMPT]), use_cache=False, **how).last_hidden_state
    factors = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=out.dtype)
    names, weights = zip(*lm.model.named_parameters())
    found = torch.autograd.grad((out * factors).sum(), weights)
    return dict(zip(names, found)) | {"output": out.detach()}


def float64_norm(self, x):
    return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon)


def float64_model(name, folder, monkeypatch):
    """Their norm is float32 inside."""
    lm = build(name, folder).double()
    monkeypatch.setattr(type(lm.model.norm), "forward", float64_norm)
    return lm


@pytest.mark.parametrize("name", CONFIGS)
def test_fused_model_equals_the_original(name, tmp_path, monkeypatch):
    lm = float64_model(name, tmp_path, monkeypatch)
    want = gradients(lm)
    lm.set_attn_implementation(ATTENTION)
    keys = list(lm.state_dict())
    got = gradients(fuse(lm), subtree_end=torch.full((len(PROMPT),), len(PROMPT)))
    assert list(lm.state_dict()) == keys
    for key, value in want.items():
        error = float((got[key] - value).norm() / value.norm())
        assert error <= 1e-12, (key, error)


def test_bfloat16_is_no_worse_than_the_original(tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        exact = gradients(float64_model("qwen3", tmp_path, patched))
    subtree_end = {"subtree_end": torch.full((len(PROMPT),), len(PROMPT))}
    lm = build("qwen3", tmp_path).bfloat16()
    lm.set_attn_implementation(ATTENTION)
    before, after = gradients(lm, **subtree_end), gradients(fuse(lm), **subtree_end)

    def errors(found):
        return [float((found[k].double() - v).norm() / v.norm()) for k, v in exact.items()]

    assert sum(errors(after)) <= 1.05 * sum(errors(before))


def test_every_block_is_exchanged_where_models_are_loaded(tmp_path):
    build("qwen3", tmp_path)
    lm = load_model(tmp_path, torch.float32)
    layer = lm.model.layers[0]
    parts = (
        layer.self_attn,
        layer.self_attn.q_norm,
        layer.mlp,
        layer.input_layernorm,
        lm.model.norm,
    )
    assert all(type(part).__name__.startswith("Fused") for part in parts)


def test_the_original_runs_where_there_is_no_native_code(tmp_path, monkeypatch):
    monkeypatch.setattr("appo.learner.fused_layers.choose", lambda backend, x: "torch")
    lm = build("qwen3", tmp_path)
    lm.set_attn_implementation(ATTENTION)
    subtree_end = {"subtree_end": torch.full((len(PROMPT),), len(PROMPT))}
    want, got = gradients(lm, **subtree_end), gradients(fuse(lm), **subtree_end)
    assert all(torch.equal(got[key], value) for key, value in want.items())


def test_another_activation_stays_as_it_is(tmp_path):
    lm = build("llama", tmp_path, hidden_act="gelu")
    fuse(lm)
    assert type(lm.model.layers[0].mlp).__name__ == "LlamaMLP"
