"""The vLLM backend on a real vLLM: numbers against transformers, cache hits, weight updates, every trap of a CPU.

Runs where vLLM is installed, which may be an environment without the rest of the test tools; one engine in this process.
"""

import importlib.util

import numpy as np
import pytest
import torch
from support.tiny_models import VOCAB, build, dense, finish

from appo.errors import EngineError, StaleWeightsError
from appo.rollout.engine import SamplingParams

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(
        importlib.util.find_spec("vllm") is None, reason="vllm cannot be imported here"
    ),
]

PROMPT = np.random.default_rng(5).integers(0, VOCAB, 70).tolist()
# The CPU attention of vLLM knows heads of 32, 64, …
WIDE = dict(hidden_size=128, num_attention_heads=4, num_key_value_heads=2, head_dim=32)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Three sets of weights of one tied model; the folder holds the first."""
    folder = tmp_path_factory.mktemp("model")
    first = build("qwen3", folder, seed=0, **WIDE)
    others = [build("qwen3", tmp_path_factory.mktemp("other"), seed=s, **WIDE) for s in (1, 2)]
    return folder, [first, *others]


@pytest.fixture(scope="module")
def started(models):
    from appo.rollout.vllm import VLLMEngine

    keep, threads = torch.set_num_threads, torch.get_num_threads()
    torch.manual_seed(11)
    state = torch.get_rng_state()
    engine = VLLMEngine(models[0], dtype="float32", max_batch=8, max_context=200)
    assert torch.set_num_threads is keep and torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), state)
    return engine


@pytest.fixture
def engine(started, models):
    """The one engine, holding the first weights."""
    if started.policy_version != 0:
        started.load_weights(models[1][0].named_parameters(), 0)
    return started


def sample(engine, ids=PROMPT, n=8, seed=1, **more):
    seq = engine.add_prompt(ids)
    engine.submit(seq, SamplingParams(n, **more), seed)
    return finish(engine)[seq]


def check(model, engine, event, temperature=1.0):
    n = len(event.token_ids)
    logp, entropy = dense(model, engine.tokens(event.seq), temperature)
    np.testing.assert_allclose(event.logprobs, logp[-n:], atol=5e-5)
    np.testing.assert_allclose(event.entropy, entropy[-n:], atol=5e-5)


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0, 1.5])
def test_statistics_are_of_the_policy_drawn_from(engine, models, temperature):
    event = sample(engine, temperature=temperature)
    check(models[1][0], engine, event, temperature or 1.0)
    if temperature == 0:
        ids = torch.tensor([engine.tokens(event.seq)])
        with torch.no_grad():
            assert models[1][0](ids).logits[0, 69:-1].argmax(-1).tolist() == event.token_ids


def test_mixed_batch(engine, models):
    """More lines than the batch holds, other temperatures and lengths beside each other, one of them greedy."""
    temperature = [0.0, 0.5, 0.8, 1.0, 1.3] * 2
    seqs = [engine.add_prompt(PROMPT[: 10 + 6 * i]) for i in range(10)]
    for i, seq in enumerate(seqs):
        engine.submit(seq, SamplingParams(3 + i, temperature=temperature[i]), seed=i)
    events = finish(engine)
    for i, seq in enumerate(seqs):
        assert len(events[seq].token_ids) == 3 + i
        check(models[1][0], engine, events[seq], temperature[i] or 1.0)


def test_top_k_keeps_the_entropy_of_the_whole(engine, models):
    event = sample(engine, n=6, top_k=4)
    ids = engine.tokens(event.seq)
    entropy = dense(models[1][0], ids)[1][-6:]
    np.testing.assert_allclose(event.entropy, entropy, atol=5e-5)
    with torch.no_grad():
        rows = models[1][0](torch.tensor([ids])).logits[0, 69:-1].double()
    kept = torch.log_softmax(rows.topk(4, -1).values, -1)
    for row, some, token, logp in zip(rows, kept, event.token_ids, event.logprobs):
        at = row.topk(4).indices.tolist().index(token)
        assert abs(float(some[at]) - logp) < 5e-5


def test_seed_decides_whatever_runs_beside(engine):
    alone = [sample(engine, seed=s).token_ids for s in range(4)]
    seqs = [engine.add_prompt(PROMPT) for _ in range(4)]
    for s, seq in enumerate(seqs):
        engine.submit(seq, SamplingParams(8), s)
    together = finish(engine)
    assert [together[seq].token_ids for seq in seqs] == alone
    assert len({tuple(t) for t in alone}) == 4


def test_long_prompt_with_a_seed(engine, models):
    """Split in two, its prefill would end vLLM: CPU generators cannot go back a draw."""
    ids = (PROMPT * 3)[:190]
    check(models[1][0], engine, sample(engine, ids, n=4))


def test_stops(engine):
    full, seen = sample(engine).token_ids, []
    event = sample(engine, stop_token_ids=frozenset({full[3]}))
    assert event.reason == "stop_token" and event.token_ids == full[: full.index(full[3]) + 1]
    event = sample(engine, stop=lambda t: bool(seen.append(t) or len(seen) == 4))
    assert (event.reason, event.token_ids, seen) == ("stop", full[:4], full[:4])
    assert len(event.entropy) == 4
    event = sample(engine, ids=(PROMPT * 3)[:198])
    assert event.reason == "length" and len(event.token_ids) == 2  # max_context


def test_fork_reads_whole_blocks(engine, models):
    event = sample(engine, n=10)
    before = engine.stats()
    child = engine.fork(event.seq, 75)
    engine.append(child, [5, 6, 7])
    engine.submit(child, SamplingParams(5), seed=3)
    got = finish(engine)[child]
    after = engine.stats()
    assert after["prefix_hits_tokens"] - before["prefix_hits_tokens"] == 64
    assert after["prefill_tokens"] - before["prefill_tokens"] == 14
    check(models[1][0], engine, got)


def test_fork_of_a_decoding_line_and_cancel(engine, models):
    seq = engine.add_prompt(PROMPT)
    engine.submit(seq, SamplingParams(20), seed=0)
    for _ in range(5):
        engine.step()
    child = engine.fork(seq, engine.length(seq))
    engine.submit(child, SamplingParams(5), seed=9)
    engine.cancel(seq)
    assert engine.tokens(seq) == PROMPT
    check(models[1][0], engine, finish(engine)[child])


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_score(engine, models, temperature):
    lines = [sample(engine, seed=s).seq for s in range(3)] + [engine.add_prompt(PROMPT[:33])]
    before = engine.stats()["scored_tokens"]
    for line, got in zip(lines, engine.score(lines, temperature), strict=True):
        logp, entropy = dense(models[1][0], engine.tokens(line), temperature)
        np.testing.assert_allclose(got.logprobs, logp, atol=5e-5)
        np.testing.assert_allclose(got.entropy, entropy, atol=5e-5)
    assert (
        engine.stats()["scored_tokens"] - before == 78 + 14 + 14 + 1
    )  # 64 and 32 tokens are shared


def test_update_reaches_every_tensor(engine, models):
    """Tied head, embedding, fused and normal layers: one wrong tensor shows in the log-probs. Old KV is not used."""
    old = sample(engine)
    for version in (1, 2):
        engine.load_weights(models[1][version].named_parameters(), version)
        assert engine.policy_version == version
        assert engine.loaded == {n for n, _ in models[1][version].named_parameters()}
        hits = engine.stats()["prefix_hits_tokens"]
        event = sample(engine)
        assert engine.stats()["prefix_hits_tokens"] == hits and event.policy_version == version
        check(models[1][version], engine, event)
    with pytest.raises(StaleWeightsError):
        engine.fork(old.seq, 70)
    scored = engine.score([old.seq])[0]
    logp = dense(models[1][2], engine.tokens(old.seq))[0]
    np.testing.assert_allclose(scored.logprobs, logp, atol=5e-5)
    hits = engine.stats()["prefix_hits_tokens"]
    child = engine.fork(old.seq, 70)
    engine.submit(child, SamplingParams(4), seed=4)
    check(models[1][2], engine, finish(engine)[child])
    assert engine.stats()["prefix_hits_tokens"] - hits == 64  # the score left its KV to fork from


def names():
    layer = "model.layers.1."
    yield from (layer + f"self_attn.{x}_proj.weight" for x in "qkvo")
    yield from (layer + f"mlp.{x}_proj.weight" for x in ("gate", "up", "down"))
    yield from (layer + f"{x}.weight" for x in ("input_layernorm", "post_attention_layernorm",
                                               "self_attn.q_norm", "self_attn.k_norm"))  # fmt: skip
    yield from ("model.norm.weight", "model.embed_tokens.weight")


@pytest.mark.parametrize("name", list(names()))
def test_each_kind_of_tensor_alone(engine, models, name, tmp_path):
    """A push may hold a single tensor, also one of a fused layer; the rest stays what the folder says."""
    import copy

    from appo.rollout.vllm.weights import WeightLoader

    engine.weights = WeightLoader(engine.weights.checkpoint, in_process=True)  # no earlier pushes
    model = copy.deepcopy(models[1][0])
    with torch.no_grad():
        weight = dict(model.named_parameters())[name]
        weight.copy_(dict(models[1][1].named_parameters())[name])
    changed = dict(dense=dense(model, PROMPT)[0], base=dense(models[1][0], PROMPT)[0])
    assert np.abs(changed["dense"] - changed["base"]).max() > 1e-3
    engine.load_weights([(name, weight)], 5)
    got = engine.score([engine.add_prompt(PROMPT)])[0]
    np.testing.assert_allclose(got.logprobs, changed["dense"], atol=5e-5)


def test_without_the_repack_the_tied_head_is_caught(engine, models, monkeypatch):
    from appo.rollout.vllm import worker

    monkeypatch.setattr(worker, "retie", lambda model, pack: None)
    with pytest.raises(Exception, match="tied to the embedding"):
        engine.load_weights(models[1][1].named_parameters(), 1)
    with pytest.raises(EngineError, match="cannot be used any more"):
        engine.load_weights(models[1][0].named_parameters(), 0)
    monkeypatch.undo()
    engine._broken = None
    engine.load_weights(models[1][0].named_parameters(), 0)


def test_push_of_the_learner_with_its_probe(engine, models):
    """`learner.weights.push`: names, versions and log-probs of probe sequences agree."""
    weights = pytest.importorskip("appo.learner.push_weights")

    class Learner:
        class cfg:
            dtype, temperature = "float32", 0.8

        def named_weights(self, gain, *, adapters):
            assert not adapters
            return iter(models[1][1].named_parameters())

        def logprobs(self, ids, temperature=None):
            return [dense(models[1][1], list(i), 0.8)[0] for i in ids]

    out = weights.push(Learner(), engine, 3, [PROMPT, PROMPT[:20]])
    assert out["push/probe_max"] < 5e-5


def test_growing_a_tree(engine, models):
    """Roots, branches in the middle of them with a tool result, all statistics as from a flat forward."""
    seq = engine.add_prompt(PROMPT)
    roots = [engine.fork(seq, 70) for _ in range(3)]
    for i, root in enumerate(roots):
        engine.submit(root, SamplingParams(12), seed=i)
    events = finish(engine)
    branches = [engine.fork(root, 70 + 3 * (i + 1)) for i, root in enumerate(roots)]
    for i, branch in enumerate(branches):
        engine.append(branch, [2, 3])
        engine.submit(branch, SamplingParams(6), seed=100 + i)
    events |= finish(engine)
    for event in events.values():
        check(models[1][0], engine, event)
    for handle in [seq, *roots, *branches]:
        engine.release(handle)
    assert engine.stats()["running"] == 0
