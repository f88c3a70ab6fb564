"""The native engine against a flat forward by transformers: every family, every way a sequence can
come about.
"""

import random

import numpy as np
import pytest
import torch
from support.engine_watch import Watch
from support.tiny_models import CONFIGS, VOCAB, build, dense, finish
from transformers import AutoModelForCausalLM

from appo.errors import EngineError, ModelError
from appo.rollout.engine import SamplingParams
from appo.rollout.native import NativeEngine

torch.set_num_threads(1)
RUNNERS = ["torch", "native"]
FAMILIES = ["llama", "qwen2", "qwen3"]


def prompt_ids(n: int, seed: int = 1) -> list[int]:
    return np.random.default_rng(seed).integers(0, VOCAB, n).tolist()


def make(folder, runner, **settings):
    try:
        return NativeEngine(folder, runner=runner, **settings)
    except EngineError as e:
        assert runner == "native"
        pytest.skip(str(e))


def check(model, engine, event, tolerance: float) -> None:
    """Logprobs and entropies of an event = those of the flat sequence."""
    ids, n = engine.tokens(event.seq), len(event.token_ids)
    assert ids[-n:] == event.token_ids
    logp, entropy = dense(model, ids)
    np.testing.assert_allclose(event.logprobs, logp[-n:], atol=tolerance, rtol=tolerance)
    np.testing.assert_allclose(event.entropy, entropy[-n:], atol=tolerance, rtol=tolerance)


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


def random_tree(engine, rng) -> list[int]:
    """Forks at every position modulo 16 off a root with a tool result in it, then forks of forks,
    four deep; → leaves.
    """

    def grow(seqs, least, limit):
        for seq in seqs:
            params = SamplingParams(rng.randint(least, limit), temperature=0.9)
            engine.submit(seq, params, seed=rng.randrange(2**40))
        finish(engine)

    prompt = engine.add_prompt(prompt_ids(19, seed=rng.randrange(99)))
    root = engine.fork(prompt, 19)
    grow([root], 14, 14)
    engine.append(root, prompt_ids(5, seed=9))
    grow([root], 9, 9)
    n = engine.length(root)
    level = [engine.fork(root, n - i) for i in range(16)]  # the first one at the last token
    leaves = [root, *level]
    for depth in range(3):
        grow(level, 2, 20 if depth else 6)
        tools = [seq for seq in level if rng.random() < 0.3]
        for seq in tools:
            engine.append(seq, prompt_ids(rng.randint(1, 18), seed=depth))
        grow(tools, 1, 3)
        parents = rng.sample(level, 5)
        level = [
            engine.fork(seq, engine.length(seq) - rng.choice((0, 0, 1, 3, 8))) for seq in parents
        ]
        leaves += level
    grow(level, 4, 4)
    return leaves


def flat_logits(model, ids) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0, :-1].float()


def distance(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Relative to the size of the row: [rows]."""
    return (a.double() - b.double()).norm(dim=-1) / b.double().norm(dim=-1)


@pytest.mark.parametrize("runner", RUNNERS)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_along_every_leaf_of_a_random_tree(family, runner, tmp_path):
    """As they were when each token was drawn or prefilled, in whatever batch; memory is watched
    meanwhile.
    """
    model = build(family, tmp_path)
    settings = dict(dtype="float32", max_batch=5, prefill_chunk=23, kv_tokens=1600)
    engine = make(tmp_path, runner, **settings)
    watch = Watch(engine, keep=True)
    leaves = random_tree(engine, random.Random(family))
    assert max(len(engine.tree.path(seq)) for seq in leaves) >= 5
    for seq in leaves:
        worst = distance(watch.along(seq), flat_logits(model, engine.tokens(seq))).max()
        assert worst < 1e-5, (seq, worst)
    scores = engine.score(leaves)
    for seq, scored in zip(leaves, scores):
        logp, entropy = dense(model, engine.tokens(seq))
        np.testing.assert_allclose(scored.logprobs, logp, rtol=2e-5, atol=2e-5)
        np.testing.assert_allclose(scored.entropy, entropy, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("runner", RUNNERS)
@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_is_no_worse_than_transformers(family, runner, tmp_path):
    """Error against float32 along the leaves of a tree, beside that of transformers in bfloat16."""
    model = build(family, tmp_path)
    low = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    engine = make(tmp_path, runner, dtype="bfloat16", max_batch=8)
    watch = Watch(engine, keep=True)
    ours, theirs = [], []
    for seq in random_tree(engine, random.Random(family)):
        ids = engine.tokens(seq)
        exact = flat_logits(model, ids)
        ours.append(distance(watch.along(seq), exact))
        theirs.append(distance(flat_logits(low, ids), exact))
    assert torch.cat(ours).mean() <= torch.cat(theirs).mean()
    assert torch.cat(ours).quantile(0.95) <= 1.1 * torch.cat(theirs).quantile(0.95)


def test_sharded_and_wrong_folders(tmp_path):
    folder = tmp_path / "llama"
    model = build("llama", folder)
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
