"""What the native engine promises beyond numbers: costs of forks, memory, versions, stopping, noise, errors."""

import math

import numpy as np
import pytest
import torch
from tiny_models import VOCAB, build, dense, finish
from transformers import AutoModelForCausalLM

from appo.errors import EngineError, ModelError, StaleWeightsError
from appo.rollout.engine import SamplingParams
from appo.rollout.native import NativeEngine
from appo.rollout.native.sampler import Sampler, uniform

torch.set_num_threads(1)
PROMPT = np.random.default_rng(5).integers(0, VOCAB, 40).tolist()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    build("qwen3", path)
    return path


@pytest.fixture
def engine(folder):
    return NativeEngine(folder, dtype="float32", max_batch=8, prefill_chunk=16)


def counters(engine, *names):
    stats = engine.stats()
    return [stats[name] for name in names]


def check_all(model, engine, events, count):
    assert len(events) == count
    for event in events.values():
        n = len(event.token_ids)
        logp = dense(model, engine.tokens(event.seq))[0]
        np.testing.assert_allclose(event.logprobs, logp[-n:], atol=1e-5)


# -- costs ------------------------------------------------------------------------------------------------------------


def test_prompt_once_and_one_token_per_fork(engine):
    prompt = engine.add_prompt(PROMPT)
    roots = [engine.fork(prompt, len(PROMPT)) for _ in range(4)]
    for i, seq in enumerate(roots):
        engine.submit(seq, SamplingParams(6), seed=i)
    finish(engine)
    # positions 0 … 38 once, then each root runs position 39 itself and decodes 5 more
    assert counters(engine, "prefill_tokens", "decode_tokens", "forks") == [39 + 4, 4 * 5, 4]
    seq = roots[0]
    for at in (1, 2, 17, 40, 41, 45, 46):
        before = counters(engine, "prefill_tokens", "decode_tokens")
        seq = engine.fork(roots[0], at)
        engine.submit(seq, SamplingParams(3), seed=at)
        finish(engine)
        after = counters(engine, "prefill_tokens", "decode_tokens")
        assert [a - b for a, b in zip(after, before)] == [1, 2]


def test_tool_result_costs_its_tokens_and_the_last_one(engine):
    seq = engine.add_prompt(PROMPT)
    engine.submit(seq, SamplingParams(5), seed=0)
    finish(engine)
    before = engine.stats()["prefill_tokens"]
    engine.append(seq, list(range(30)))
    engine.submit(seq, SamplingParams(2), seed=0)
    finish(engine)
    assert engine.stats()["prefill_tokens"] - before == 31


def test_appended_tokens_are_prefilled_once_for_all_forks(engine):
    seq = engine.add_prompt(PROMPT)
    engine.submit(seq, SamplingParams(5), seed=0)
    finish(engine)
    engine.append(seq, [1, 2, 3, 4])
    forks = [engine.fork(seq, engine.length(seq)) for _ in range(3)]
    before = engine.stats()["prefill_tokens"]
    for i, f in enumerate(forks):
        engine.submit(f, SamplingParams(2), seed=i)
    finish(engine)
    assert (
        engine.stats()["prefill_tokens"] - before == 4 + 3
    )  # last sampled + 3 of 4 appended, then one per fork


def test_common_prompt_prefix_is_shared(folder):
    tails = [[50, 51, 52], [60, 61], [50, 70, 71, 72]]
    results = []
    for share in (True, False):
        engine = NativeEngine(folder, dtype="float32", share_prompts=share)
        seqs = [engine.add_prompt(PROMPT + tail) for tail in tails] + [
            engine.add_prompt(PROMPT[:10])
        ]
        for seq in seqs:
            engine.submit(seq, SamplingParams(4), seed=seq)
        engine.release(engine.fork(seqs[0], 3))
        results.append((finish(engine), counters(engine, "prefill_tokens", "prefix_hits_tokens")))
        if share:
            engine.release(seqs[0])  # the others stand on its tokens
            engine.submit(seqs[1], SamplingParams(2), seed=0)
            finish(engine)
            for seq in seqs[1:]:
                engine.release(seq)
            assert counters(engine, "kv_tokens", "live_nodes") == [0, 0]
    (shared, cost), (alone, full) = results
    assert cost == [40 + 3 + 3 + 4 + 10, 39 + 40] and full == [40 * 3 + 9 + 10, 0]
    for seq in shared:
        assert shared[seq].token_ids == alone[seq].token_ids
        np.testing.assert_allclose(shared[seq].logprobs, alone[seq].logprobs, atol=1e-5)


def test_decoding_does_not_starve_while_a_long_prompt_is_prefilled(engine):
    first = engine.add_prompt(PROMPT[:4])
    engine.submit(first, SamplingParams(40), seed=0)
    engine.step()
    second = engine.add_prompt(list(range(90)))
    engine.submit(second, SamplingParams(1), seed=0)
    for _ in range(6):  # 90 tokens in chunks of 16
        before = engine.length(first)
        assert not engine.step() or engine.length(second) == 91
        assert engine.length(first) == before + 1
    assert engine.length(second) == 91


# -- memory and sharing -----------------------------------------------------------------------------------------------


def test_release_frees_everything_in_any_order(engine):
    prompt = engine.add_prompt(PROMPT)
    roots = [
        engine.fork(prompt, 40) for _ in range(10)
    ]  # more than max_batch: some are evicted from their slot
    for i, seq in enumerate(roots):
        engine.submit(seq, SamplingParams(4 + i), seed=i)
    finish(engine)
    branches = [engine.fork(seq, 42) for seq in roots]
    engine.release(prompt)
    for seq in roots[::2]:
        engine.release(seq)
    for i, seq in enumerate(branches):
        engine.submit(seq, SamplingParams(5), seed=i)
    for _ in range(3):
        engine.step()
    for seq in (*branches, *roots[1::2]):  # some are still decoding
        engine.release(seq)
    stats = engine.stats()
    assert [
        stats[k] for k in ("kv_tokens", "live_sequences", "live_nodes", "running", "waiting")
    ] == [0] * 5
    assert not engine.has_work() and engine.store.block_tokens == 0
    with pytest.raises(EngineError, match="released"):
        engine.length(prompt)


def test_parent_continues_bit_identically_with_children(folder):
    runs = []
    for children in (0, 3):
        engine = NativeEngine(folder, dtype="float32", deterministic=True)
        seq = engine.add_prompt(PROMPT)
        engine.submit(seq, SamplingParams(12), seed=1)
        for _ in range(5):
            engine.step()
        kids = [engine.fork(seq, 44) for _ in range(children)]  # of a decoding sequence
        for kid in kids:
            engine.submit(kid, SamplingParams(4), seed=kid)
        runs.append(finish(engine)[seq])
    assert runs[0].token_ids == runs[1].token_ids
    assert runs[0].logprobs == runs[1].logprobs and runs[0].entropy == runs[1].entropy


def test_same_calls_same_bits(folder):
    def run():
        engine = NativeEngine(folder, dtype="bfloat16", deterministic=True, max_batch=3)
        prompt = engine.add_prompt(PROMPT)
        for i in range(5):
            engine.submit(engine.fork(prompt, 30 + i), SamplingParams(6, temperature=0.8), seed=i)
        return finish(engine)

    assert run() == run()


def test_short_segments_with_few_readers_are_read_from_the_slot(folder):
    """Eight branches, each off another root: their inherited spans are copied into their slots, results stay exact."""
    engine = NativeEngine(folder, dtype="float32", max_batch=8)
    model = AutoModelForCausalLM.from_pretrained(folder)
    prompt = engine.add_prompt(PROMPT)
    roots = [engine.fork(prompt, 40) for _ in range(8)]
    for i, seq in enumerate(roots):
        engine.submit(seq, SamplingParams(12), seed=i)
    finish(engine)
    branches = [engine.fork(seq, 44 + i) for i, seq in enumerate(roots)]
    for seq in branches:
        engine.submit(seq, SamplingParams(9 + seq % 3), seed=seq)
    for _ in range(5):
        engine.step()
    assert engine.stats()["kv_copied_tokens"] == sum(43 + i - 39 for i in range(8))
    deep = [
        engine.fork(seq, engine.length(seq)) for seq in branches[:3]
    ]  # children of nodes that hold copies
    for seq in deep:
        engine.submit(seq, SamplingParams(7), seed=seq)
    check_all(model, engine, finish(engine), count=8 + 3)
    for seq in branches:  # tool results behind a copy: a chunk of rows reads the ancestors in place
        engine.append(seq, [5, 6, 7])
        engine.submit(seq, SamplingParams(3), seed=seq)
    check_all(model, engine, finish(engine), count=8)
    for seq in (prompt, *roots, *branches, *deep):
        engine.release(seq)
    assert counters(engine, "kv_tokens", "kv_copied_tokens", "live_nodes") == [0, 0, 0]


def test_rows_that_hold_a_copy_skip_the_shared_call(engine, folder):
    """The middle one of three readers has the prompt in its slot: the shared call must not count it twice."""
    prompt = engine.add_prompt(PROMPT)
    roots = [engine.fork(prompt, 40) for _ in range(3)]
    for i, seq in enumerate(roots):
        engine.submit(seq, SamplingParams(9), seed=i)
    for _ in range(5):
        engine.step()
    with torch.inference_mode():
        engine.store.localise(engine.tree.get(roots[1]), engine.tree.get(prompt), 39)
    check_all(AutoModelForCausalLM.from_pretrained(folder), engine, finish(engine), count=3)


def test_cancel_drops_tokens_and_spares_children(engine):
    seq = engine.add_prompt(PROMPT)
    engine.submit(seq, SamplingParams(20), seed=1)
    for _ in range(8):
        engine.step()
    kept = engine.fork(seq, engine.length(seq))
    ids = engine.tokens(kept)
    engine.cancel(seq)
    assert engine.length(seq) == 40 and not engine.has_work() and engine.tokens(kept) == ids
    for s in (seq, kept):
        engine.submit(s, SamplingParams(6), seed=1)
    events = finish(engine)
    assert engine.tokens(kept)[:-6] == ids
    assert engine.tokens(seq)[:45] == ids[:45]  # the same noise draws the same tokens again
    for event in events.values():
        assert len(event.token_ids) == 6
    engine.release(seq)
    engine.release(kept)
    assert counters(engine, "kv_tokens", "live_nodes") == [0, 0]


def test_kv_limit(folder):
    engine = NativeEngine(folder, dtype="float32", kv_tokens=60)
    with pytest.raises(EngineError, match="alone it needs 139 tokens"):
        engine.submit(engine.add_prompt(PROMPT), SamplingParams(100), seed=0)
    prompt = engine.add_prompt(PROMPT)
    roots = [engine.fork(prompt, 40) for _ in range(3)]
    for seq in roots:
        engine.submit(seq, SamplingParams(8), seed=seq)
    peak = 0
    events = {}
    while len(events) < 2:  # 39 + 8 each: two fit at a time, the third waits
        events.update({e.seq: e for e in engine.step()})
        peak = max(peak, engine.stats()["kv_tokens"])
    assert peak <= 60
    with pytest.raises(EngineError, match="needs 8 tokens of KV but only 5"):
        engine.step()
    engine.release(roots[0])
    events.update(finish(engine))
    assert sorted(events) == roots


# -- weight versions --------------------------------------------------------------------------------------------------


def test_new_weights_make_old_kv_unusable_until_scored(folder, tmp_path):
    engine = NativeEngine(folder, dtype="float32", prefill_chunk=16)
    other = build("qwen3", tmp_path, seed=1)
    prompt = engine.add_prompt(PROMPT)
    roots = [engine.fork(prompt, 40) for _ in range(3)]
    for i, seq in enumerate(roots):
        engine.submit(seq, SamplingParams(8), seed=i)
    with pytest.raises(EngineError, match="3 sequences are decoding"):
        engine.load_weights(other.named_parameters(), version=1)
    assert {e.policy_version for e in finish(engine).values()} == {0}
    untouched = engine.add_prompt(PROMPT[20:])

    engine.load_weights(other.named_parameters(), version=1)
    assert engine.policy_version == 1 and engine.stats()["kv_tokens"] == 0
    for call in (
        lambda: engine.fork(roots[0], 42),
        lambda: engine.submit(roots[0], SamplingParams(2), seed=0),
        lambda: engine.fork(prompt, 40),
    ):
        with pytest.raises(StaleWeightsError, match="score"):
            call()
    fresh = engine.add_prompt(PROMPT)  # does not stand on the stale prompt
    for seq in (untouched, fresh):
        engine.submit(seq, SamplingParams(3), seed=0)
    for event in finish(engine).values():
        assert event.policy_version == 1
        np.testing.assert_allclose(
            event.logprobs, dense(other, engine.tokens(event.seq))[0][-3:], atol=1e-4
        )

    scored = engine.score(roots[:2], temperature=0.8)
    assert (
        engine.stats()["scored_tokens"] == 39 + 2 * 8
    )  # the prompt once; a root's last token is not run
    for s, seq in zip(scored, roots):
        logp, entropy = dense(other, engine.tokens(seq), 0.8)
        assert s.policy_version == 1 and len(s.logprobs) == engine.length(seq) - 1
        assert s.logprobs.dtype == s.entropy.dtype == np.float32
        np.testing.assert_allclose(s.logprobs, logp, atol=1e-4)
        np.testing.assert_allclose(s.entropy, entropy, atol=1e-4)

    before = engine.stats()["prefill_tokens"]
    branches = [engine.fork(roots[i % 2], 41 + i) for i in range(6)]
    for seq in branches:
        engine.submit(seq, SamplingParams(4), seed=seq)
    events = finish(engine)
    assert engine.stats()["prefill_tokens"] - before == 6
    for seq in branches:
        np.testing.assert_allclose(
            events[seq].logprobs, dense(other, engine.tokens(seq))[0][-4:], atol=1e-4
        )
    with pytest.raises(StaleWeightsError):
        engine.fork(roots[2], 42)


def test_score_of_current_sequences_leaves_kv_alone(engine, folder):
    prompt = engine.add_prompt(PROMPT)
    roots = [engine.fork(prompt, 40) for _ in range(2)]
    for i, seq in enumerate(roots):
        engine.submit(seq, SamplingParams(6), seed=i)
    events = finish(engine)
    kv = engine.stats()["kv_tokens"]
    for scored, seq in zip(engine.score(roots), roots):
        np.testing.assert_allclose(scored.logprobs[-6:], events[seq].logprobs, atol=1e-5)
        np.testing.assert_allclose(scored.entropy[-6:], events[seq].entropy, atol=1e-5)
    assert engine.stats()["kv_tokens"] == kv
    one = engine.add_prompt([3])
    assert len(engine.score([one])[0].logprobs) == 0


def test_load_weights_checks_before_it_writes(engine, folder):
    seq = engine.add_prompt(PROMPT)
    good = engine.score([seq])[0].logprobs
    norm = torch.zeros(32)
    for bad, match in (
        ([("model.norm.weight", norm), ("model.nrm.weight", norm)], "model.nrm.weight"),
        ([("model.norm.weight", norm), ("model.embed_tokens.weight", norm)], "shape"),
        ([], "empty"),
    ):
        with pytest.raises(ModelError, match=match):
            engine.load_weights(bad, version=2)
    assert engine.policy_version == 0
    np.testing.assert_array_equal(engine.score([seq])[0].logprobs, good)


def test_tied_head_follows_the_embedding(engine, tmp_path):
    other = build("qwen3", tmp_path, seed=3)
    engine.load_weights(other.state_dict().items(), version=1)  # names lm_head.weight too
    seq = engine.add_prompt(PROMPT)
    np.testing.assert_allclose(engine.score([seq])[0].logprobs, dense(other, PROMPT)[0], atol=1e-4)


# -- stopping and errors ----------------------------------------------------------------------------------------------


def test_reasons_to_stop(engine):
    seq = engine.add_prompt(PROMPT)
    free = engine.fork(seq, 40)
    engine.submit(free, SamplingParams(10), seed=7)
    drawn = finish(engine)[free].token_ids
    seen = []
    stop = engine.fork(seq, 40)
    engine.submit(stop, SamplingParams(10, stop=lambda t: seen.append(t) or len(seen) == 4), seed=7)
    event = finish(engine)[stop]
    assert (event.reason, event.token_ids, seen) == ("stop", drawn[:4], drawn[:4])
    ended = engine.fork(seq, 40)
    engine.submit(ended, SamplingParams(10, stop_token_ids=frozenset(drawn[3:])), seed=7)
    event = finish(engine)[ended]
    assert event.reason == "stop_token" and event.token_ids == drawn[: len(event.token_ids)]
    assert event.token_ids[-1] in drawn[3:]
    long = engine.add_prompt([1] * 250)
    engine.submit(long, SamplingParams(100), seed=0)
    event = finish(engine)[long]
    assert (event.reason, len(event.token_ids), engine.length(long)) == ("length", 6, 256)
    with pytest.raises(EngineError, match="needs 257"):
        engine.submit(long, SamplingParams(1), seed=0)


def test_misuse_is_an_error_that_says_what_to_do(engine):
    seq = engine.add_prompt(PROMPT)
    engine.submit(seq, SamplingParams(5), seed=0)
    for call, match in (
        (lambda: engine.length(99), "unknown"),
        (lambda: engine.fork(seq, 0), "1 … 40"),
        (lambda: engine.fork(seq, 41), "1 … 40"),
        (lambda: engine.submit(seq, SamplingParams(5), seed=0), "already"),
        (lambda: engine.append(seq, [1]), "decoding"),
        (lambda: engine.score([seq]), "decoding"),
        (lambda: engine.add_prompt([]), "empty"),
        (lambda: engine.add_prompt([VOCAB]), "vocabulary"),
        (lambda: engine.add_prompt([0] * 257), "max_context=256"),
        (
            lambda: engine.submit(engine.add_prompt([1]), SamplingParams(0), seed=0),
            "max_new_tokens=0",
        ),
        (
            lambda: engine.submit(
                engine.add_prompt([1]), SamplingParams(1, temperature=-1), seed=0
            ),
            "temperature",
        ),
        (
            lambda: engine.submit(engine.add_prompt([1]), SamplingParams(1, top_p=0), seed=0),
            "top_p",
        ),
    ):
        with pytest.raises(EngineError, match=match):
            call()
    assert (
        engine.step() == [] and engine.length(seq) == 40
    )  # first chunk of the prompt only: nothing broke


# -- sampling ---------------------------------------------------------------------------------------------------------


def sampled(logits, params, n=1, first=0):
    sampler = Sampler(logits.shape[-1], torch.device("cpu"))
    sampler.rows([params] * n)
    return sampler.sample(logits.expand(n, -1), [uniform(11, first + t) for t in range(n)])


@pytest.mark.parametrize("cut", [dict(), dict(top_k=5), dict(top_p=0.7), dict(top_k=9, top_p=0.8)])
def test_draws_follow_the_distribution_they_report(cut):
    torch.manual_seed(2)
    logits = 1.5 * torch.randn(1, 20)
    n = 4000
    tokens, logp, entropy = sampled(logits, SamplingParams(1, temperature=0.9, **cut), n)
    reported = {t: math.exp(l) for t, l in zip(tokens, logp)}
    p = torch.softmax(logits[0].double() / 0.9, -1)
    keep = torch.ones(20, dtype=torch.bool)
    order = p.argsort(descending=True)
    if "top_k" in cut:
        keep[order[cut["top_k"] :]] = False
    q = torch.where(keep, p, 0.0)
    if "top_p" in cut:
        q = q / q.sum()
        q[order[(q[order].cumsum(0) - q[order]) >= cut["top_p"]]] = 0.0
    q = q / q.sum()
    assert all(abs(reported[t] - q[t].item()) < 1e-6 for t in reported)
    assert abs(entropy[0] + (p * p.log()).sum().item()) < 1e-6  # of the full vocabulary
    counts = torch.bincount(torch.tensor(tokens), minlength=20).double()
    assert counts[q == 0].sum() == 0
    expected = n * q[q > 0]
    chi2 = ((counts[q > 0] - expected) ** 2 / expected).sum().item()
    dof = max(int((q > 0).sum()) - 1, 1)
    assert chi2 < dof + 5 * math.sqrt(2 * dof) + 5


@pytest.mark.parametrize("vocab", [2, 255, 256, 257, 3000])
@pytest.mark.parametrize("scale", [0.0, 1.0, 50.0, 300.0])
def test_statistics_against_float64(vocab, scale):
    torch.manual_seed(vocab)
    logits = scale * torch.randn(9, vocab) + 100.0
    sampler = Sampler(vocab, torch.device("cpu"))
    sampler.rows([SamplingParams(1, temperature=1.3)] * 9)
    tokens, logp, entropy = sampler.sample(logits, [uniform(0, t) for t in range(9)])
    exact = torch.log_softmax((logits * torch.tensor(1 / 1.3)).double(), -1)
    ref = exact[torch.arange(9), torch.tensor(tokens)]
    ref_entropy = -(exact.exp() * exact).sum(-1)
    tolerance = 5e-5 if scale <= 50 else 3e-4
    np.testing.assert_allclose(logp, ref, atol=tolerance)
    np.testing.assert_allclose(entropy, ref_entropy, atol=tolerance)
    assert max(logp) <= 0.0 and min(entropy) >= 0.0


def test_extreme_noise_and_greedy():
    logits = torch.full((1, 300), -1e4)
    logits[0, 17] = 0.0
    logits[0, 290] = -1.0
    sampler = Sampler(300, torch.device("cpu"))
    sampler.rows([SamplingParams(1)] * 2 + [SamplingParams(1, temperature=0)])
    tokens, logp, entropy = sampler.sample(logits.expand(3, -1), [0.0, 1.0 - 2.0**-53, 0.99])
    assert tokens == [17, 290, 17]  # never an entry of zero probability
    assert logp[2] == logp[0] < 0 < entropy[2]
    noise = [uniform(seed, t) for seed in (0, 1, 2**63, -5) for t in range(2000)]
    assert 0 <= min(noise) and max(noise) < 1 and len(set(noise)) == len(noise)
    assert abs(np.mean(noise) - 0.5) < 0.01
    assert abs(np.corrcoef(noise[:2000], noise[2000:4000])[0, 1]) < 0.08


def test_tokens_do_not_depend_on_the_batch(folder):
    def run(alone):
        engine = NativeEngine(folder, dtype="float32", max_batch=1 if alone else 8)
        prompts = [PROMPT[i:] + [i] for i in range(5)]
        seqs = [engine.add_prompt(p) for p in (prompts if alone else prompts[::-1])]
        seeds = range(5) if alone else range(5)[::-1]
        for seq, seed in zip(seqs, seeds):
            engine.submit(seq, SamplingParams(10), seed=seed)
        events = finish(engine)
        return {seed: events[seq].token_ids for seq, seed in zip(seqs, seeds)}

    assert run(True) == run(False)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_scoring_twice_gives_the_same_bits(dtype, tmp_path):
    """Rollouts.remember rests on it: Omega compares two scoring passes."""
    build("llama", tmp_path)
    engine = NativeEngine(tmp_path, dtype=dtype)
    prompt = engine.add_prompt(list(range(20, 50)))
    seqs = [engine.fork(prompt, 30) for _ in range(4)]
    for i, seq in enumerate(seqs):
        engine.submit(seq, SamplingParams(12 + i), i)
    while engine.has_work():
        engine.step()
    first = engine.score(seqs)
    engine.load_weights(engine_weights(tmp_path), 1)
    second = engine.score(seqs)
    for a, b in zip(first, second, strict=True):
        assert np.array_equal(a.logprobs, b.logprobs) and np.array_equal(a.entropy, b.entropy)


def engine_weights(folder):
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors").items()


def test_a_cpu_without_bfloat16_support_falls_back_to_plain_linears(tmp_path, monkeypatch):
    from appo.rollout.native import model

    class Ops:
        _reorder_linear_weight = _linear_pointwise = staticmethod(lambda *a: pytest.fail("packed"))
        _is_mkldnn_bf16_supported = staticmethod(lambda: False)

    class Torch:
        mkldnn = Ops

    weight = torch.zeros(4, 4, dtype=torch.bfloat16)
    monkeypatch.setattr(model.torch, "ops", Torch)
    assert not model.can_pack(weight, torch.bfloat16) and model.can_pack(weight, torch.float32)
