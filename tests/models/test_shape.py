"""One reader of config.json: what transformers makes of it, and a family of the user's own."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from support.tiny_models import CONFIGS, SHAPE, VOCAB, dense, finish
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaModel

from appo.errors import ConfigError, ModelError
from appo.learner.lora import add_lora
from appo.learner.policy import Policy, load_model
from appo.models.check import check_model_folder
from appo.models.shape import FAMILIES, ModelFamily, own_family, read_shape
from appo.rollout.engine import SamplingParams
from appo.rollout.native import NativeEngine

KEYS = {"hidden_size": "d_model", "num_hidden_layers": "n_layers", "num_attention_heads": "n_heads"}
NAMES = {"model.layers": "model.blocks", "mlp": "ffn"}
OWN = ModelFamily("shape_test", "OwnForCausalLM", keys=KEYS, names=NAMES)


class OwnConfig(LlamaConfig):
    model_type, attribute_map = "shape_test", KEYS


class OwnLayer(LlamaDecoderLayer):
    mlp = property(lambda self: self._modules["ffn"])


class OwnModel(LlamaModel):
    layers = property(lambda self: self._modules["blocks"])


class OwnForCausalLM(LlamaForCausalLM):
    """A Llama whose modules, and so whose tensors, have other names."""

    config_class = OwnConfig

    def __init__(self, config):
        super().__init__(config)
        self.model.__class__ = OwnModel
        for layer in self.model._modules["layers"]:
            layer.__class__ = OwnLayer
            layer._modules["ffn"] = layer._modules.pop("mlp")
        self.model._modules["blocks"] = self.model._modules.pop("layers")


AutoConfig.register("shape_test", OwnConfig)
AutoModelForCausalLM.register(OwnConfig, OwnForCausalLM)


@pytest.fixture
def own(tmp_path):
    """A folder of the user's family with random weights."""
    torch.manual_seed(0)
    model = OwnForCausalLM(OwnConfig(**SHAPE, tie_word_embeddings=False)).eval()
    model.save_pretrained(tmp_path)
    return SimpleNamespace(folder=tmp_path, model=model)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_shape_is_that_of_the_transformers_model(name, tmp_path):
    cls, extra = CONFIGS[name]
    cls(**{**SHAPE, **extra}).save_pretrained(tmp_path)
    shape = read_shape(tmp_path)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path))
    assert sorted(shape.tensors()) == sorted(p.numel() for p in model.parameters())
    layer = model.model.layers[0]
    linears = {n.rpartition(".")[2]: m for n, m in layer.named_modules() if n.endswith("_proj")}
    assert {n: (m.in_features, m.out_features) for n, m in linears.items()} == shape.linears()
    assert shape.bias == tuple(n for n in shape.linears() if linears[n].bias is not None)
    assert shape.qk_norm == hasattr(layer.self_attn, "q_norm")
    assert (shape.vocab, shape.max_positions, shape.layers) == (VOCAB, 256, 3)
    assert shape.rope["rope_type"] == model.config.rope_parameters["rope_type"]
    assert FAMILIES[shape.family].architecture == type(model).__name__


def test_older_files_and_windows():
    old = dict(model_type="llama", **SHAPE, rope_theta=5e5, rope_scaling={"type": "linear", "factor": 2.0})  # fmt: skip
    assert read_shape(old).rope == {
        "type": "linear", "factor": 2.0, "rope_type": "linear", "rope_theta": 5e5,
    }  # fmt: skip
    assert not read_shape(old).sliding
    assert read_shape(old | dict(use_sliding_window=True, sliding_window=64)).sliding
    assert not read_shape(old | dict(use_sliding_window=False, sliding_window=64)).sliding
    assert read_shape(old | dict(layer_types=["full_attention", "sliding_attention"])).sliding


def test_what_cannot_be_read(tmp_path):
    good = dict(model_type="llama", **SHAPE)
    with pytest.raises(
        ModelError, match="model_type='mamba' is not supported; use one of llama, qwen2"
    ):
        read_shape(good | {"model_type": "mamba"})
    with pytest.raises(ModelError, match="missing or malformed field 'vocab_size'"):
        read_shape({k: v for k, v in good.items() if k != "vocab_size"})
    with pytest.raises(ModelError, match="config.json: missing or malformed field"):
        (tmp_path / "config.json").write_text(json.dumps(good | {"hidden_size": None}))
        read_shape(tmp_path)


def test_an_own_family_is_read_by_its_own_keys(own):
    assert "d_model" in json.loads((own.folder / "config.json").read_text())
    shape = read_shape(own.folder, OWN)
    assert (shape.hidden, shape.layers, shape.heads) == (32, 3, 4)
    assert shape.tensor("model.layers.2.mlp.up_proj.weight") == "model.blocks.2.ffn.up_proj.weight"
    assert shape.tensor("model.norm.weight") == "model.norm.weight"
    with pytest.raises(ModelError, match="'shape_test' is not supported"):
        read_shape(own.folder)
    (own.folder / "tokenizer.json").write_text("{}")
    (own.folder / "tokenizer_config.json").write_text('{"chat_template": "x"}')
    assert check_model_folder(own.folder, OWN).layers == 3
    with pytest.raises(ModelError, match=r"'OwnForCausalLM'; supported are Llama.*model\.family"):
        check_model_folder(own.folder)


@pytest.mark.parametrize("runner", ["torch", "auto"])
def test_engine_and_learner_agree_on_an_own_family(own, runner):
    """log-probs within 1e-5 in float32, before and after the learner's weights are pushed."""
    policy = Policy(load_model(own.folder, torch.float32, OWN))
    engine = NativeEngine(own.folder, dtype="float32", runner=runner, family=OWN)
    assert engine.model.targets.keys() == {n for n, _ in policy.lm.named_parameters()}
    ids = np.random.default_rng(2).integers(0, VOCAB, 21).tolist()
    for version in range(2):
        if version:
            with torch.no_grad():
                for weight in policy.lm.parameters():
                    weight.add_(0.02 * torch.randn_like(weight))
            engine.load_weights(policy.lm.named_parameters(), version)
        prompt = engine.add_prompt(ids)
        seq = engine.fork(prompt, len(ids))
        engine.submit(seq, SamplingParams(12), seed=version)
        (event,) = finish(engine).values()
        tokens = engine.tokens(seq)
        theirs = learner_logp(policy, tokens)
        np.testing.assert_allclose(event.logprobs, theirs[-12:], atol=1e-5, rtol=0)
        np.testing.assert_allclose(engine.score([seq])[0].logprobs, theirs, atol=1e-5, rtol=0)
        if not version:
            np.testing.assert_allclose(theirs, dense(own.model, tokens)[0], atol=1e-5, rtol=0)


def learner_logp(policy, tokens):
    """Log-probs of tokens 1 … by the learner's own forward."""
    n = len(tokens)
    batch = SimpleNamespace(
        token_ids=torch.tensor(tokens), position_ids=torch.arange(n),
        subtree_end=torch.full((n,), n, dtype=torch.int32), source=torch.arange(n - 1),
        target=torch.tensor(tokens[1:]), mask=torch.ones(n - 1, dtype=torch.bool),
    )  # fmt: skip
    with torch.no_grad():
        return policy(batch).logp.numpy()


def test_adapters_find_the_blocks_of_an_own_family(own):
    lm = load_model(own.folder, torch.float32, OWN)
    add_lora(lm, r=2, alpha=4.0, targets=["up_proj"], layers=1)
    trained = {n for n, p in lm.named_parameters() if p.requires_grad}
    assert len(trained) == 2 and all(n.startswith("model.blocks.2.ffn.up_proj") for n in trained)


def test_what_is_not_a_family(tmp_path, monkeypatch):
    (tmp_path / "shape_families.py").write_text(
        "from appo.models.shape import ModelFamily\n"
        "GOOD = ModelFamily('mine', 'MineForCausalLM')\n"
        "TAKEN = ModelFamily('llama', 'MineForCausalLM')\n"
        "ODD = ModelFamily('mine', 'MineForCausalLM', keys={'hiden_size': 'd_model'})\n"
        "OTHER = 'llama'\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert own_family(None) is None
    assert own_family("shape_families:GOOD").architecture == "MineForCausalLM"
    for name, said in {
        "TAKEN": "has the model_type 'llama', which is built in",
        "ODD": "renames the key 'hiden_size', which is none of Llama's",
        "OTHER": "is of type str; expected: an appo.models.shape.ModelFamily",
    }.items():
        with pytest.raises(ConfigError, match=f"model.family is 'shape_families:{name}'.*{said}"):
            own_family(f"shape_families:{name}")
