"""Forks and scores over the prefix cache of a fake vLLM that has the real one's traps."""

from types import SimpleNamespace

import numpy as np
import pytest
from support.fake_vllm import BLOCK, EMBED, VOCAB, dense
from support.vllm_engines import OTHER, PROMPT, make, run, sample, submit, table

from appo.errors import EngineError
from appo.rollout.vllm import worker_statistics

# -- the tree --------------------------------------------------------------------------------------


def test_fork_reads_the_prefix_cache(folder):
    engine = make(folder)
    event = sample(engine)
    before = engine.stats()
    child = engine.fork(event.seq, at=72)
    submit(engine, child)
    got = run(engine)[child]
    after = engine.stats()
    assert after["prefix_hits_tokens"] - before["prefix_hits_tokens"] == 64
    assert after["prefill_tokens"] - before["prefill_tokens"] == 8
    assert after["forks"] == 1
    np.testing.assert_allclose(
        got.logprobs, dense(table(0), engine.tokens(child))[0][71:], atol=1e-5
    )


def test_fork_of_a_decoding_sequence(folder):
    engine = make(folder)
    seq = engine.add_prompt(PROMPT)
    submit(engine, seq)
    engine.step()
    engine.step()
    child = engine.fork(seq, engine.length(seq))
    submit(engine, child)
    assert len(run(engine)) == 2
    assert engine.tokens(child)[:72] == engine.tokens(seq)[:72]


def test_cancel_drops_what_was_drawn(folder):
    engine = make(folder)
    seq = engine.add_prompt(PROMPT)
    submit(engine, seq)
    engine.step()
    engine.cancel(seq)
    engine.cancel(seq)
    assert engine.tokens(seq) == PROMPT and not engine.has_work()
    submit(engine, seq)
    run(engine)
    engine.release(seq)
    with pytest.raises(EngineError, match="was released"):
        engine.length(seq)
    with pytest.raises(EngineError, match="is unknown"):
        engine.fork(99, 1)


def test_misuse_while_decoding(folder):
    engine = make(folder)
    seq = engine.add_prompt(PROMPT)
    submit(engine, seq)
    for call in (
        lambda: submit(engine, seq),
        lambda: engine.append(seq, [1]),
        lambda: engine.score([seq]),
    ):
        with pytest.raises(EngineError, match="it is decoding"):
            call()
    with pytest.raises(EngineError, match="1 sequences are decoding"):
        engine.load_weights([(EMBED, table(1))], 1)
    engine.release(seq)
    for bad, match in (([], "is empty"), ([VOCAB], "outside the vocabulary"), ([1] * 300, "longer")):  # fmt: skip
        with pytest.raises(EngineError, match=match):
            engine.add_prompt(bad)
    with pytest.raises(EngineError, match="at must be in 1 … 70"):
        engine.fork(engine.add_prompt(PROMPT), 71)


# -- scores ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("statistics", ["exact", "full"])
@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_score(folder, statistics, temperature):
    engine = make(folder, statistics=statistics)
    event = sample(engine, n=5)  # its KV is cached: rows that are hit would have no score
    lines = [event.seq, engine.add_prompt(OTHER), engine.add_prompt(PROMPT[:1]), event.seq]
    for line, got in zip(lines, engine.score(lines, temperature), strict=True):
        logp, entropy = dense(table(0), engine.tokens(line), temperature)
        np.testing.assert_allclose(got.logprobs, logp, atol=1e-5)
        np.testing.assert_allclose(got.entropy, entropy, atol=1e-5)
        assert got.policy_version == 0 and got.logprobs.dtype == np.float32


def test_score_with_a_split_prefill(folder):
    engine = make(folder, cpu=False, chunk=9)
    got = engine.score([engine.add_prompt(PROMPT)])[0]
    np.testing.assert_allclose(got.logprobs, dense(table(0), PROMPT)[0], atol=1e-5)


@pytest.mark.parametrize("common", [31, 32, 33, 63, 64, 65, 70])
def test_score_runs_shared_rows_once(folder, common):
    """Also where lines part exactly at the end of a block: the row before has another token to
    score.
    """
    engine = make(folder)
    lines = [
        engine.add_prompt(PROMPT[:common] + [i, *PROMPT[common + 1 :], i, i]) for i in range(3)
    ]
    got = engine.score(lines)
    for line, s in zip(lines, got, strict=True):
        logp, entropy = dense(table(0), engine.tokens(line))
        np.testing.assert_allclose(s.logprobs, logp, atol=1e-5)
        np.testing.assert_allclose(s.entropy, entropy, atol=1e-5)
    if common % BLOCK:
        length = engine.length(lines[0])
        assert engine.stats()["scored_tokens"] == 3 * length - 2 * (common // BLOCK) * BLOCK


def test_score_beside_a_decoding_sequence(folder):
    engine = make(folder)
    seq, other = engine.add_prompt(PROMPT), engine.add_prompt(OTHER)
    submit(engine, seq, n=1)
    engine.score([other])
    assert engine.has_work()
    with pytest.raises(EngineError, match="it is decoding"):
        engine.append(seq, [1])  # its event has not been handed out
    assert [e.seq for e in engine.step()] == [seq] and not engine.has_work()


def test_release_takes_back_an_event_that_nobody_saw(folder):
    engine = make(folder)
    seq = engine.add_prompt(PROMPT)
    submit(engine, seq, n=1)
    engine.score([engine.add_prompt(OTHER)])
    engine.release(seq)
    assert not engine.has_work() and engine.step() == []


def test_score_needs_temperature_one_without_full_rows(folder):
    engine = make(folder, statistics="top")
    seq = engine.add_prompt(PROMPT)
    np.testing.assert_allclose(engine.score([seq])[0].logprobs, dense(table(0), PROMPT)[0], atol=1e-5)  # fmt: skip
    with pytest.raises(EngineError, match="temperature 1 only"):
        engine.score([seq], 0.7)
    with pytest.raises(EngineError, match="must be above 0"):
        engine.score([seq], 0.0)


def test_unknown_model_runner_is_refused():
    with pytest.raises(EngineError, match="_get_prompt_logprobs_dict.*VLLM_USE_V2_MODEL_RUNNER=0"):
        worker_statistics.attach(SimpleNamespace(requests={}))
