"""New weights in the vLLM backend: what is stale, what is refused, what is never read again."""

import numpy as np
import pytest
from support.fake_vllm import EMBED, FakeLLM, dense
from support.vllm_engines import OTHER, PROMPT, make, run, sample, submit, table

from appo.errors import EngineError, StaleWeightsError
from appo.rollout.native.tree.segment_tree import SegmentTree
from appo.rollout.vllm.sequences import Sequences


@pytest.mark.parametrize("in_process", [True, False])
def test_new_weights_are_the_ones_used(folder, in_process):
    engine = make(folder, in_process=in_process)
    sample(engine)
    engine.load_weights([(EMBED, table(1))], 1)
    assert engine.policy_version == 1 and engine.loaded == {EMBED}
    event = sample(engine)  # the same prompt: its old KV must not be hit
    assert event.policy_version == 1
    np.testing.assert_allclose(
        event.logprobs, dense(table(1), PROMPT + event.token_ids)[0][-8:], atol=1e-5
    )
    assert engine.stats()["prefix_hits_tokens"] == 0
    assert FakeLLM.last.resets == 1


def test_the_salt_alone_keeps_old_kv_out(folder):
    engine = make(folder)
    sample(engine)
    core = FakeLLM.last.llm_engine
    FakeLLM.last.reset_prefix_cache = lambda: True  # says so and does nothing
    for load in (1, 1):  # a version that is loaded twice is two sets of weights
        engine.load_weights([(EMBED, table(load))], 1)
        event = sample(engine)
        want = dense(table(load), PROMPT + event.token_ids)[0][-8:]
        np.testing.assert_allclose(event.logprobs, want, atol=1e-5)
    assert len({r.salt for r in core.seen}) == 3


def test_the_fake_shows_stale_kv_and_a_stale_head(folder):
    """Otherwise the tests above could not fail."""
    engine = make(folder)
    sample(engine)
    salt = engine.decoder.salt
    FakeLLM.last.reset_prefix_cache = lambda: True
    engine.load_weights([(EMBED, table(1))], 1)
    engine.decoder.relabel(salt)
    event = sample(engine)
    want = dense(table(1), PROMPT + event.token_ids)[0][-8:]
    assert np.abs(event.logprobs - want).max() > 0.05
    FakeLLM.last.retie = False
    engine.load_weights([(EMBED, table(2))], 2)
    event = sample(engine)
    assert np.abs(event.logprobs - dense(table(2), PROMPT + event.token_ids)[0][-8:]).max() > 0.05


def test_refused_cache_reset_ends_the_engine(folder):
    engine = make(folder)
    FakeLLM.last.reset_answer = False
    with pytest.raises(EngineError, match="kept its prefix cache"):
        engine.load_weights([(EMBED, table(1))], 1)
    with pytest.raises(EngineError, match="cannot be used any more"):
        sample(engine)


def test_a_tensor_that_vllm_did_not_write(folder):
    engine = make(folder)
    FakeLLM.last.written = []
    with pytest.raises(EngineError, match="did not write 1 of 1 tensors.*embed_tokens"):
        engine.load_weights([(EMBED, table(1))], 1)
    with pytest.raises(EngineError, match="cannot be used any more"):
        engine.score([engine.add_prompt(PROMPT)])


@pytest.mark.parametrize(
    ("push", "match"),
    [
        ([], "no tensors"),
        ([("lm_head.weight", table(1))], "not a tensor of this model"),
        ([(EMBED, table(1)[:4])], r"shape \(4, 6\)"),
    ],
)
def test_a_refused_push_changes_nothing(folder, push, match):
    engine = make(folder)
    with pytest.raises(EngineError, match=match):
        engine.load_weights(push, 1)
    assert engine.policy_version == 0
    assert FakeLLM.last.calls[-1][0] != "appo_load"
    assert sample(engine).policy_version == 0


def test_stale_sequences_are_refused_until_scored(folder):
    engine = make(folder)
    event = sample(engine)
    child, unused = engine.fork(event.seq, 75), engine.add_prompt(OTHER)
    engine.load_weights([(EMBED, table(1))], 1)
    for call in (lambda: engine.fork(event.seq, 72), lambda: submit(engine, child)):
        with pytest.raises(StaleWeightsError, match="computed before version 1.*score"):
            call()
    submit(engine, unused)  # was never computed
    run(engine)
    got = engine.score([event.seq])[0]
    np.testing.assert_allclose(got.logprobs, dense(table(1), engine.tokens(event.seq))[0], atol=1e-5)  # fmt: skip
    before = engine.stats()["prefix_hits_tokens"]
    fork = engine.fork(event.seq, 72)
    submit(engine, fork)
    got = run(engine)[fork]
    np.testing.assert_allclose(got.logprobs, dense(table(1), engine.tokens(fork))[0][71:], atol=1e-5)  # fmt: skip
    assert engine.stats()["prefix_hits_tokens"] - before == 64  # score left its KV to fork from


def test_a_prompt_whose_forks_ran_is_stale_with_them(folder):
    """As in the native engine: its tokens were computed for them. What nobody ran is not."""
    engine = make(folder)
    prompt, idle, partly = (engine.add_prompt(PROMPT) for _ in range(3))
    for child in (engine.fork(prompt, 70), engine.fork(partly, 10)):
        submit(engine, child, n=2)
    run(engine)
    cancelled = engine.fork(idle, 70)
    submit(engine, cancelled)
    engine.cancel(cancelled)
    engine.load_weights([(EMBED, table(1))], 1)
    for call in (
        lambda: engine.fork(prompt, 70),
        lambda: submit(engine, prompt),
        lambda: engine.fork(partly, 3),
    ):
        with pytest.raises(StaleWeightsError, match="computed before version 1"):
            call()
    for fresh in (engine.fork(idle, 70), cancelled, engine.fork(partly, 1)):
        submit(engine, fresh)
    run(engine)
    engine.score([engine.fork(prompt, 1), prompt])
    submit(engine, engine.fork(prompt, 70))
    run(engine)


def turn(tree, ours, seq, drawn):
    """A prefill and some drawn tokens."""
    for _ in range(drawn):
        tree.commit(tree.plan([seq], 10**6))
        tree.extend(seq, [1])
        ours.get(seq).tokens.append(1)
        ours.get(seq).computed(len(ours.get(seq).tokens) - 1)


def score(tree, ours, seq):
    """All positions but the last."""
    *path, (leaf, own) = tree.path(seq)
    ranges = [(node, 0, count) for node, count in [*path, (leaf, own - 1)] if count]
    if ranges:
        tree.commit(tree.layout(ranges))
    ours.get(seq).computed(len(ours.get(seq).tokens) - 1)


@pytest.mark.parametrize("seed", range(30))
def test_staleness_is_that_of_the_native_tree(seed):
    """Random forks, turns, cancels, scores and loads: both say the same of every live sequence."""
    rng = np.random.default_rng(seed)
    tree, ours = SegmentTree(), Sequences()
    live = []
    for _ in range(120):
        action = rng.choice(["add", "fork", "append", "turn", "cancel", "score", "release", "load"],
                            p=[0.1, 0.25, 0.1, 0.2, 0.1, 0.1, 0.07, 0.08])  # fmt: skip
        if action == "add" or not live:
            ids = [1] * int(rng.integers(1, 20))
            live.append(tree.add(ids))
            assert ours.add(None, 0, ids).handle == live[-1]
            continue
        seq = int(rng.choice(live))
        length = tree.length(seq)
        if action == "fork":
            at = int(rng.integers(1, length + 1))
            try:
                live.append(tree.fork(seq, at))
            except StaleWeightsError:
                with pytest.raises(StaleWeightsError):
                    ours.fork(seq, at, tree.version)
            else:
                assert ours.fork(seq, at, tree.version).handle == live[-1]
        elif action == "append":
            tree.extend(seq, [1, 1])
            ours.get(seq).tokens += [1, 1]
        elif action == "turn" and not tree.stale(seq):
            turn(tree, ours, seq, rng.integers(1, 4))
        elif action == "cancel" and not tree.stale(seq):
            turn(tree, ours, seq, rng.integers(1, 4))
            tree.truncate(seq, length)
            ours.truncate(seq, length)
        elif action == "score":
            score(tree, ours, seq)
        elif action == "release":
            live.remove(seq)
            tree.release(seq)
            ours.release(seq)
        elif action == "load":
            tree.new_version(tree.version + 1)
            ours.new_weights()
        for seq in live:
            line = ours.get(seq)
            assert line.stale(len(line.tokens)) == tree.stale(seq), (action, seq)
            assert len(line.tokens) == tree.length(seq)


def test_weights_changed_behind_our_back(folder):
    engine = make(folder)
    seq = engine.add_prompt(PROMPT)
    submit(engine, seq)
    engine.step()
    FakeLLM.last.llm_engine.set_weight_version("somebody else's")
    with pytest.raises(StaleWeightsError, match="not those of policy version 0"):
        run(engine)
    engine.release(seq)


def test_vllm_without_weight_labels(folder, monkeypatch):
    monkeypatch.delattr("support.fake_vllm.Core.set_weight_version")
    assert len(sample(make(folder)).token_ids) == 8
