"""What is drawn through the vLLM backend, and its statistics, over a fake that has the traps."""

import numpy as np
import pytest
from support.fake_vllm import FakeLLM, dense
from support.vllm_engines import PROMPT, make, run, sample, submit, table

from appo.errors import EngineError


@pytest.mark.parametrize("statistics", ["exact", "full"])
@pytest.mark.parametrize("temperature", [0.0, 0.6, 1.0, 1.7])
def test_logprobs_and_entropy_are_of_the_policy_drawn_from(folder, statistics, temperature):
    engine = make(folder, statistics=statistics)
    event = sample(engine, temperature=temperature)
    logp, entropy = dense(table(0), PROMPT + event.token_ids, temperature or 1.0)
    np.testing.assert_allclose(event.logprobs, logp[-8:], atol=1e-5)
    np.testing.assert_allclose(event.entropy, entropy[-8:], atol=1e-5)
    assert engine.entropy_exact and event.policy_version == 0


def test_approximate_entropy_says_so(folder):
    engine = make(folder, statistics="top")
    assert not engine.entropy_exact and engine.stats()["entropy_exact"] == 0.0
    event = sample(engine)
    logp, entropy = dense(table(0), PROMPT + event.token_ids)
    np.testing.assert_allclose(event.logprobs, logp[-8:], atol=1e-5)
    assert (np.array(event.entropy) >= entropy[-8:] - 1e-6).all()


def test_entropy_survives_a_split_prefill(folder):
    """Rows of an unfinished prefill are shown to the processor too; their draw is thrown away."""
    events = [sample(make(folder, cpu=False, chunk=c)) for c in (None, 9)]
    assert events[0].token_ids == events[1].token_ids
    np.testing.assert_allclose(events[0].entropy, events[1].entropy, atol=1e-6)


def test_batched_lines_keep_their_own_statistics(folder):
    engine = make(folder, max_batch=3)
    seqs = {engine.add_prompt(PROMPT[: 20 + 7 * i]): 20 + 7 * i for i in range(6)}
    for i, seq in enumerate(seqs):
        submit(engine, seq, n=3 + i, seed=i, temperature=0.5 + 0.3 * i)
    events = run(engine)
    for i, (seq, length) in enumerate(seqs.items()):
        logp, entropy = dense(table(0), engine.tokens(seq), 0.5 + 0.3 * i)
        np.testing.assert_allclose(events[seq].entropy, entropy[length - 1 :], atol=1e-5)
        np.testing.assert_allclose(events[seq].logprobs, logp[length - 1 :], atol=1e-5)
        assert len(events[seq].token_ids) == 3 + i


def test_same_seed_same_tokens_and_a_new_draw_after_each_tool_call(folder):
    a, b = sample(make(folder)), sample(make(folder))
    assert a.token_ids == b.token_ids
    engine = make(folder)
    seq = engine.add_prompt(PROMPT)
    for _ in range(2):
        submit(engine, seq, seed=7)
        run(engine)
        engine.append(seq, [1, 2, 3])
    seeds = [r.sampling_params.seed for r in FakeLLM.last.llm_engine.seen]
    assert len(set(seeds)) == 2 and all(0 <= s < 2**63 for s in seeds)


def test_only_ids_asked_for_stop(folder):
    engine = make(folder)
    sample(engine, n=2)
    p = FakeLLM.last.llm_engine.seen[-1].sampling_params
    assert p.ignore_eos and p.stop_token_ids == [] and not p.detokenize


def test_stop_token(folder):
    engine = make(folder)
    full = sample(engine).token_ids
    event = sample(engine, stop_token_ids=frozenset({full[3]}))
    assert event.reason == "stop_token"
    assert event.token_ids == full[: full.index(full[3]) + 1]
    assert len(event.logprobs) == len(event.entropy) == len(event.token_ids)


def test_callback_sees_every_id_and_aborts_the_request(folder):
    engine = make(folder)
    full, seen = sample(engine).token_ids, []
    event = sample(engine, stop=lambda t: bool(seen.append(t) or len(seen) == 4))
    assert (event.reason, event.token_ids, seen) == ("stop", full[:4], full[:4])
    core = FakeLLM.last.llm_engine
    assert core.aborted == [core.seen[-1].key] and not core.requests
    # the last token that may be drawn is shown to the callback as well, and so is a stop token
    event = sample(engine, n=4, stop=lambda t: len(seen) == seen.append(t))
    assert event.reason == "length" and seen[-4:] == event.token_ids
    event = sample(engine, stop=lambda t: True, stop_token_ids=frozenset({full[0]}))
    assert event.reason == "stop_token"


def test_tokens_beyond_a_stop_are_dropped(folder):
    engine = make(folder)
    FakeLLM.last.llm_engine.extra = 1  # two tokens a step
    event = sample(engine, stop=lambda t: True)
    assert len(event.token_ids) == 1 and engine.length(event.seq) == len(PROMPT) + 1


def test_context_limit(folder):
    engine = make(folder, max_context=74)
    event = sample(engine)
    assert event.reason == "length" and len(event.token_ids) == 4
    with pytest.raises(EngineError, match="leave no room in max_context=74"):
        submit(engine, event.seq)
    with pytest.raises(EngineError, match="74 [+] 1 tokens do not fit"):
        engine.append(event.seq, [1])
    assert len(engine.score([event.seq])[0].logprobs) == 73  # a full sequence can still be scored


@pytest.mark.parametrize(
    ("more", "match"),
    [
        (dict(n=0), "max_new_tokens=0"),
        (dict(temperature=-1.0), "temperature=-1.0"),
        (dict(temperature=0.001), "at least 0.01"),
        (dict(top_p=0.0), "top_p=0.0"),
    ],
)
def test_bad_parameters(folder, more, match):
    engine = make(folder)
    seq = engine.add_prompt(PROMPT)
    with pytest.raises(EngineError, match=match):
        submit(engine, seq, **more)


def test_cut_distribution_needs_the_worker(folder):
    engine = make(folder, statistics="full")
    with pytest.raises(EngineError, match="statistics='exact'"):
        submit(engine, engine.add_prompt(PROMPT), top_p=0.9)


def test_vllm_dies(folder):
    engine = make(folder)
    seq = engine.add_prompt(PROMPT)
    submit(engine, seq)
    engine.step()

    def dead():
        raise RuntimeError("EngineCore encountered an issue")

    FakeLLM.last.llm_engine.step = dead
    with pytest.raises(EngineError, match="1 sequences decoding: RuntimeError: EngineCore"):
        engine.step()
    assert engine.length(seq) == len(PROMPT) + 1  # what was drawn is kept
    engine.release(seq)
