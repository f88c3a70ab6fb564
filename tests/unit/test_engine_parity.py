"""The native engine against a flat forward by transformers: every family, every way a sequence can come about."""

import numpy as np
import pytest
import torch
from tiny_models import CONFIGS, VOCAB, build, dense, finish

from appo.errors import ModelError
from appo.rollout.engine import SamplingParams
from appo.rollout.native import NativeEngine
from appo.rollout.native.attention import attend, attend_reference, merge

torch.set_num_threads(1)


def prompt_ids(n: int, seed: int = 1) -> list[int]:
    return np.random.default_rng(seed).integers(0, VOCAB, n).tolist()


def check(model, engine, event, tolerance: float) -> None:
    """Logprobs and entropies of an event = those of the flat sequence."""
    ids, n = engine.tokens(event.seq), len(event.token_ids)
    assert ids[-n:] == event.token_ids
    logp, entropy = dense(model, ids)
    np.testing.assert_allclose(event.logprobs, logp[-n:], atol=tolerance, rtol=0)
    np.testing.assert_allclose(event.entropy, entropy[-n:], atol=tolerance, rtol=0)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    return build("llama", folder), folder


@pytest.mark.parametrize("name", CONFIGS)
def test_every_family_agrees_with_transformers(name, tmp_path):
    model = build(name, tmp_path)
    engine = NativeEngine(tmp_path, dtype="float32", max_batch=3, prefill_chunk=7)
    ids = prompt_ids(33)
    prompt = engine.add_prompt(ids)
    roots = [engine.fork(prompt, len(ids)) for _ in range(4)]
    for i, seq in enumerate(roots):
        engine.submit(seq, SamplingParams(6 + i), seed=i)
    events = finish(engine)
    assert sorted(events) == sorted(roots)
    for event in events.values():
        check(model, engine, event, 1e-4)
    for scored, seq in zip(engine.score(roots, temperature=0.7), roots):
        logp, entropy = dense(model, engine.tokens(seq), 0.7)
        np.testing.assert_allclose(scored.logprobs, logp, atol=1e-4, rtol=0)
        np.testing.assert_allclose(scored.entropy, entropy, atol=1e-4, rtol=0)


def test_fork_at_every_position_and_depth(llama):
    model, folder = llama
    engine = NativeEngine(folder, dtype="float32", max_batch=8, prefill_chunk=16)
    ids = prompt_ids(12)
    root = engine.add_prompt(ids)
    engine.submit(root, SamplingParams(10), seed=3)
    finish(engine)
    engine.append(root, prompt_ids(5, seed=9))
    engine.submit(root, SamplingParams(4), seed=4)
    finish(engine)
    level = [engine.fork(root, at) for at in range(1, engine.length(root) + 1)]
    for depth in range(3):
        for i, seq in enumerate(level):
            engine.submit(seq, SamplingParams(5), seed=100 * depth + i)
        for event in finish(engine).values():
            check(model, engine, event, 1e-5)
        # forks of forks: inside the own tokens, at the last token, and after appended tool tokens
        for seq in level[::3]:
            engine.append(seq, [7, 8, 9])
        level = [engine.fork(s, engine.length(s) - i % 6) for i, s in enumerate(level[::2])]


def test_bfloat16_stays_close(llama):
    model, folder = llama
    engine = NativeEngine(folder, dtype="bfloat16")
    seq = engine.add_prompt(prompt_ids(20))
    engine.submit(seq, SamplingParams(16), seed=0)
    event = finish(engine)[seq]
    logp, _ = dense(model.bfloat16(), engine.tokens(seq))
    model.float()
    assert np.abs(np.asarray(event.logprobs) - logp[-16:]).mean() < 0.1


def test_sharded_and_wrong_folders(llama, tmp_path):
    model, folder = llama
    model.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    NativeEngine(tmp_path / "sharded", dtype="float32")
    with pytest.raises(ModelError, match="no config.json"):
        NativeEngine(tmp_path)
    text = (folder / "config.json").read_text()
    (tmp_path / "config.json").write_text(text.replace('"llama"', '"mamba"'))
    with pytest.raises(ModelError, match="mamba"):
        NativeEngine(tmp_path)
    (tmp_path / "config.json").write_text(text.replace('"default"', '"yarn"'))
    with pytest.raises(ModelError, match="yarn"):
        NativeEngine(tmp_path)


@pytest.mark.parametrize("dtype,tolerance", [(torch.float32, 2e-6), (torch.bfloat16, 2e-2)])
def test_attention_over_segments_is_attention(dtype, tolerance):
    torch.manual_seed(0)
    q = torch.randn(1, 2, 5, 16).to(dtype)
    k, v = torch.randn(1, 2, 40, 16).to(dtype), torch.randn(1, 2, 40, 16).to(dtype)
    whole, lse = attend_reference(q, k, v)
    parts = [attend(q, k[:, :, a:b], v[:, :, a:b]) for a, b in ((0, 3), (3, 31), (31, 40))]
    merged = merge(torch.stack([o[0] for o, _ in parts]), torch.stack([x[0] for _, x in parts]))
    torch.testing.assert_close(merged, whole[0], atol=tolerance, rtol=0)
    torch.testing.assert_close(
        attend(q, k, v)[1], lse, atol=1e-3 if dtype is torch.bfloat16 else 1e-5, rtol=0
    )
    for causal in (False, True):
        mask = (
            None
            if causal
            else torch.zeros(5, 40, dtype=dtype).masked_fill_(torch.arange(40) > 20, -torch.inf)
        )
        ours, theirs = (f(q, k, v, causal=causal, mask=mask) for f in (attend, attend_reference))
        torch.testing.assert_close(ours[0], theirs[0], atol=tolerance, rtol=0)
