"""What the native engine promises beyond numbers: costs of forks, memory, versions, stopping,
noise, errors.
"""

import numpy as np
import pytest
import torch
from support.tiny_models import PROMPT, build, dense, finish

from appo.errors import EngineError, ModelError, StaleWeightsError
from appo.rollout.engine import SamplingParams
from appo.rollout.native import NativeEngine

torch.set_num_threads(1)


def counters(engine, *names):
    stats = engine.stats()
    return [stats[name] for name in names]


# -- costs -----------------------------------------------------------------------------------------


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


# -- memory and sharing ----------------------------------------------------------------------------


def test_release_frees_everything_in_any_order(engine):
    prompt = engine.add_prompt(PROMPT)
    roots = [engine.fork(prompt, 40) for _ in range(10)]  # more than max_batch: some wait
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
    assert not engine.has_work() and engine.tree.used == 0
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


# -- weight versions -------------------------------------------------------------------------------


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


# -- bits ---


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
    """Rollouts.score_reference rests on it: Omega compares two scoring passes."""
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
    from appo.rollout.native.model import linear

    class Ops:
        _reorder_linear_weight = _linear_pointwise = staticmethod(lambda *a: pytest.fail("packed"))
        _is_mkldnn_bf16_supported = staticmethod(lambda: False)

    class Torch:
        mkldnn = Ops

    weight = torch.zeros(4, 4, dtype=torch.bfloat16)
    monkeypatch.setattr(linear.torch, "ops", Torch)
    assert not linear.can_pack(weight, torch.bfloat16) and linear.can_pack(weight, torch.float32)
