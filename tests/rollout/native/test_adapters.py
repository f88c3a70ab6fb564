"""Adapters applied in the engine give the log-probs of the adapted model, and leave the weights
alone.
"""

import pytest
import torch
from support.tiny_models import build, dense

from appo.errors import ModelError
from appo.learner.lora import adapter_tensors, add_lora, merged_tensors
from appo.rollout.native import NativeEngine


def adapted(family, folder, seed=0):
    lm = build(family, folder)
    add_lora(lm, r=4, alpha=6.0, layers=1)
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in lm.named_parameters():
            if "lora_" in name:
                p.copy_(0.2 * torch.randn(p.shape, generator=g))
    return lm


def scored(engine, ids):
    seq = engine.add_prompt(ids)
    out = engine.score([seq])[0].logprobs
    engine.release(seq)
    return torch.from_numpy(out)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_applied_merged_and_transformers_agree(family, tmp_path):
    lm = adapted(family, tmp_path)
    ids = torch.randint(
        0, lm.config.vocab_size, (24,), generator=torch.Generator().manual_seed(1)
    ).tolist()
    want = torch.from_numpy(dense(lm, ids)[0]).float()

    engine = NativeEngine(tmp_path, dtype="float32")
    base = scored(engine, ids)
    engine.load_weights(adapter_tensors(lm), 1)
    assert (base - want).abs().max() > 1e-2, (
        "the adapters do nothing: the test would not see a dropped one"
    )
    torch.testing.assert_close(scored(engine, ids), want, atol=1e-4, rtol=0)
    engine.load_weights(
        merged_tensors(lm), 2
    )  # merged weights replace applied adapters, they do not add up
    torch.testing.assert_close(scored(engine, ids), want, atol=1e-4, rtol=0)
    engine.load_weights(adapter_tensors(lm), 3)
    assert (scored(engine, ids) - want).abs().max() > 1e-2  # now twice: merged and applied


def test_half_an_adapter_or_a_wrong_shape_is_refused(tmp_path):
    pairs = dict(adapter_tensors(adapted("llama", tmp_path)))
    engine = NativeEngine(tmp_path, dtype="float32")
    down = next(k for k in pairs if k.endswith("lora_A"))
    with pytest.raises(ModelError, match="push both"):
        engine.load_weights([(down, pairs[down])], 1)
    up = down.replace("lora_A", "lora_B")
    with pytest.raises(ModelError, match="push both"):
        engine.load_weights([(up, pairs[up])], 1)
    with pytest.raises(ModelError, match="do not fit"):
        engine.load_weights([(down, pairs[down]), (up, pairs[up][:-1])], 1)
    with pytest.raises(ModelError, match="no linear of that name"):
        engine.load_weights(
            [("model.layers.9.x" + s, pairs[down]) for s in (".lora_A", ".lora_B")], 1
        )


def test_a_part_of_a_fused_adapter_is_refused_and_nothing_changes(tmp_path):
    pairs = dict(adapter_tensors(adapted("llama", tmp_path)))
    engine = NativeEngine(tmp_path, dtype="float32")
    engine.load_weights(pairs.items(), 1)
    ids = list(range(20))
    before = scored(engine, ids)
    q = {k: v for k, v in pairs.items() if ".q_proj." in k}
    with pytest.raises(ModelError, match="push all"):
        engine.load_weights(q.items(), 2)
    assert engine.policy_version == 1 and torch.equal(scored(engine, ids), before)
