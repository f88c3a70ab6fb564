"""The vLLM backend against a fake vLLM that has the real one's traps: what is sent, what comes
back, what is refused.
"""

import itertools
import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from support.fake_vllm import BLOCK, EMBED, VOCAB, WIDTH, FakeLLM, api, dense

from appo.algo.resolve import resolve
from appo.config import load_config
from appo.errors import ConfigError, EngineError, ModelError, StaleWeightsError
from appo.rollout.engine import SamplingParams
from appo.rollout.native.tree.segment_tree import SegmentTree
from appo.rollout.vllm import VLLMEngine, head, reports, start, weights, worker_statistics
from appo.rollout.vllm.sequences import Sequences
from appo.run.plan import _check_engine

PROMPT = np.random.default_rng(3).integers(0, VOCAB, 70).tolist()
OTHER = [*PROMPT[:-1], (PROMPT[-1] + 1) % VOCAB]


def table(seed):
    return torch.randn(VOCAB, WIDTH, generator=torch.Generator().manual_seed(seed)) * 0.45


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "config.json").write_text(
        json.dumps(
            dict(
                model_type="llama",
                vocab_size=VOCAB,
                max_position_embeddings=256,
                hidden_size=WIDTH,
                intermediate_size=WIDTH,
                num_hidden_layers=1,
                num_attention_heads=1,
            )
        )
    )
    save_file({EMBED: table(0)}, tmp_path / "model.safetensors")
    return tmp_path


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    for name in ("VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_USE_V2_MODEL_RUNNER", "VLLM_NO_USAGE_STATS",
                 "VLLM_LOGGING_LEVEL", "VLLM_CPU_OMP_THREADS_BIND"):  # fmt: skip
        monkeypatch.setenv(name, "")  # restored afterwards
        monkeypatch.delenv(name)
    worker_statistics._sampled.clear()
    worker_statistics._scored.clear()
    yield
    assert (
        worker_statistics._sampled == {} and worker_statistics._scored == {}
    )  # nothing may be left in the worker


def make(folder, cpu=True, **more):
    return VLLMEngine(folder, api=api(cpu), dtype="float32", **({"embed": table(0)} | more))


def run(engine):
    events = {}
    while engine.has_work():
        events |= {e.seq: e for e in engine.step()}
    return events


def submit(engine, seq, n=8, seed=1, **more):
    engine.submit(seq, SamplingParams(n, **more), seed)


def sample(engine, ids=PROMPT, n=8, seed=1, **more):
    seq = engine.add_prompt(ids)
    submit(engine, seq, n, seed, **more)
    return run(engine)[seq]


# -- what vLLM is told -----------------------------------------------------------------------------


def test_start_arguments(folder):
    make(folder, max_batch=4, prefill_chunk=16, max_context=100)
    a = FakeLLM.last.arguments
    assert a["logprobs_mode"] == "processed_logprobs"
    assert a["enable_prefix_caching"] and a["skip_tokenizer_init"] and not a["async_scheduling"]
    assert a["max_model_len"] == 101 and a["generation_config"] == "vllm"
    assert a["block_size"] == BLOCK and a["kv_cache_memory_bytes"] > 0
    # a split prefill with a seed ends vLLM on a CPU
    assert a["enable_chunked_prefill"] is False and a["max_num_batched_tokens"] >= 101


def test_gpu_keeps_its_own_choices(folder):
    make(folder, cpu=False, max_batch=4, prefill_chunk=16)
    a = FakeLLM.last.arguments
    assert "block_size" not in a and "enable_chunked_prefill" not in a and not a["enforce_eager"]
    assert a["max_num_batched_tokens"] == 16 and "kv_cache_memory_bytes" not in a


def test_further_arguments_reach_vllm(folder):
    make(folder, cpu=False, tensor_parallel_size=2)
    assert FakeLLM.last.arguments["tensor_parallel_size"] == 2


@pytest.mark.parametrize("block", [16, 100])
def test_cpu_block_size(folder, block):
    with pytest.raises(EngineError, match=f"block_size={block}.*multiple of 32"):
        make(folder, block=block)


def test_process_is_left_as_it_was(folder):
    keep = torch.set_num_threads
    torch.manual_seed(5)
    want = torch.rand(1)
    torch.manual_seed(5)
    make(folder)
    assert torch.set_num_threads is keep
    assert torch.equal(torch.rand(1), want)


def test_missing_vllm_says_what_to_install(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(EngineError, match=r"appo\[vllm\].*rollout.engine=native"):
        VLLMEngine(folder)


def test_package_imports_without_vllm():
    import appo.rollout.vllm as package

    assert package.VLLMEngine is VLLMEngine
    assert "vllm" not in sys.modules or not hasattr(sys.modules["appo.rollout.vllm.engine"], "vllm")


@pytest.mark.parametrize(
    ("more", "match"),
    [
        (dict(statistics="roughly"), "exact, full, top"),
        (dict(max_batch=0), "max_batch=0"),
        (dict(max_context=256), "one beyond"),
        (dict(max_context=1), "use 2"),
    ],
)
def test_bad_settings(folder, more, match):
    with pytest.raises(EngineError, match=match):
        make(folder, **more)


def test_folder_without_weights(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="safetensors"):
        make(folder)


# -- drawing ---------------------------------------------------------------------------------------


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


# -- stop callbacks --------------------------------------------------------------------------------


def three(engine, stop, n=(1, 4, 1)):
    """Three sequences of one prompt, decoding in this order; `stop` is the second one's callback."""
    seqs = [engine.add_prompt(PROMPT) for _ in range(3)]
    for i, seq in enumerate(seqs):
        submit(engine, seq, n=n[i], seed=i, stop=stop if i == 1 else None)
    return seqs


@pytest.mark.parametrize("statistics", ["exact", "full"])
@pytest.mark.parametrize("error", [ValueError("a parser error"), KeyboardInterrupt()])
def test_a_callback_that_raises_loses_nothing(folder, statistics, error):
    """Neither what stopped before it in the step, nor what comes after it, nor its own token."""
    seen = []

    def stop(token):
        seen.append(token)
        if len(seen) == 1:
            raise error
        return False

    engine = make(folder, statistics=statistics)
    seqs = three(engine, stop, n=(1, 4, 3))
    says = "stop callback of sequence 1 raised ValueError.*step.., or cancel"
    expected = (EngineError, says) if isinstance(error, Exception) else (KeyboardInterrupt, None)
    with pytest.raises(expected[0], match=expected[1]) as info:
        engine.step()
    assert error in (info.value, info.value.__cause__)
    assert engine.has_work() and [engine.length(s) for s in seqs] == [71, 71, 71]
    for call in (lambda: engine.append(seqs[0], [1]), lambda: submit(engine, seqs[0])):
        with pytest.raises(EngineError, match="it is decoding"):
            call()  # its event has not been handed out
    events, undisturbed = run(engine), make(folder, statistics=statistics)
    three(undisturbed, None, n=(1, 4, 3))
    assert events == run(undisturbed) and seen == events[seqs[1]].token_ids


@pytest.mark.parametrize("answer", [True, False])
@pytest.mark.parametrize("n", [1, 4])
def test_a_callback_may_cancel_and_release(folder, answer, n):
    """Itself, one that stopped earlier in the step, one whose output is still to be taken; vLLM may
    be done with all.
    """
    engine = make(folder)

    def stop(token):
        for seq in seqs[:2]:
            engine.cancel(seq)
        if seqs[2] in engine.sequences.by_handle:
            engine.release(seqs[2])
        return answer

    seqs = three(engine, stop, n=(1, n, n))
    assert engine.step() == [] and not engine.has_work()
    assert engine.tokens(seqs[0]) == engine.tokens(seqs[1]) == PROMPT
    assert FakeLLM.last.llm_engine.requests == {}
    assert len(sample(engine).token_ids) == 8


def test_a_callback_may_not_step_or_score(folder):
    engine, problems = make(folder), []

    def stop(token):
        for call in (engine.step, lambda: engine.score([seqs[0]])):
            with pytest.raises(EngineError, match="a step is under way") as info:
                call()
            problems.append(info)
        return True

    seqs = [engine.add_prompt(OTHER), *three(engine, stop)]
    assert len(run(engine)) == 3 and len(problems) == 2


def test_a_callback_that_raises_during_a_score(folder):
    """The score is given up, what stopped beside it is not."""
    engine = make(folder)
    seqs = three(engine, lambda token: 1 / 0, n=(1, 1, 1))
    with pytest.raises(EngineError, match="raised ZeroDivisionError"):
        engine.score([engine.add_prompt(OTHER)])
    assert sorted(e.seq for e in engine.step()) == seqs and not engine.has_work()


def test_a_sequence_that_vllm_ends_takes_no_other_with_it(folder):
    engine = make(folder)
    seqs = three(engine, None, n=(1, 4, 1))
    core = FakeLLM.last.llm_engine
    core.requests[core.seen[1].key].sampling_params.max_tokens = 1
    with pytest.raises(
        EngineError, match="vLLM ended sequence 1 by itself .finish_reason='length'"
    ):
        engine.step()
    assert sorted(e.seq for e in engine.step()) == [seqs[0], seqs[2]] and not engine.has_work()
    engine.append(seqs[1], [1])  # it can go on
    submit(engine, seqs[1], n=2)
    assert engine.length(seqs[1]) + 2 == 74 and len(run(engine)[seqs[1]].token_ids) == 2


def test_entropies_that_the_worker_does_not_have(folder):
    engine = make(folder)
    seqs = three(engine, None)
    take = FakeLLM.last.appo_take_sampled
    lost = FakeLLM.last.llm_engine.seen[0].key
    FakeLLM.last.appo_take_sampled = lambda keys: {k: v for k, v in take(keys).items() if k != lost}
    with pytest.raises(EngineError, match="no distribution for token 0 of sequence 0"):
        engine.step()
    assert sorted(run(engine)) == seqs[1:]


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


# -- weights ---------------------------------------------------------------------------------------


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


# -- parts -----------------------------------------------------------------------------------------

Q, K, V = (f"model.layers.0.self_attn.{x}_proj.weight" for x in "qkv")


def test_fused_layers_are_sent_whole(tmp_path):
    save_file({n: torch.full((2, 2), float(i)) for i, n in enumerate((Q, K, V, "model.norm.weight"))},
              tmp_path / "m.safetensors")  # fmt: skip
    loader = weights.WeightLoader(weights.Checkpoint(tmp_path), in_process=True)
    tensors, asked = loader.collect([(Q, torch.full((2, 2), 9.0))])
    assert asked == {Q} and {n: float(t[0, 0]) for n, t in tensors.items()} == {Q: 9.0, K: 1.0, V: 2.0}  # fmt: skip
    done = "model.layers.0.self_attn.qkv_proj.weight"
    llm = SimpleNamespace(collective_rpc=lambda method, kwargs: [[done]])
    loader.send(llm, tensors, asked)
    assert loader.loaded == {Q}
    # K of the folder is not K any more once it was pushed
    loader.send(llm, *loader.collect([(Q, torch.ones(2, 2)), (K, torch.ones(2, 2))]))
    with pytest.raises(EngineError, match="k_proj.*push it again"):
        loader.collect([(Q, torch.ones(2, 2))])


def test_pushed_tensors_are_copied(tmp_path):
    """The learner reuses one buffer for all of them; vLLM keeps tensors until their layer is whole."""
    save_file({n: torch.zeros(2, 2) for n in (Q, K, V)}, tmp_path / "m.safetensors")
    buffer = torch.empty(2, 2)
    loader = weights.WeightLoader(weights.Checkpoint(tmp_path), in_process=True)
    tensors, _ = loader.collect((n, buffer.fill_(i)) for i, n in enumerate((Q, K, V)))
    assert [float(tensors[n][0, 0]) for n in (Q, K, V)] == [0.0, 1.0, 2.0]


@pytest.mark.parametrize(
    ("name", "inside"),
    [
        ("model.layers.3.mlp.up_proj.weight", "model.layers.3.mlp.gate_up_proj.weight"),
        ("model.layers.3.self_attn.v_proj.bias", "model.layers.3.self_attn.qkv_proj.bias"),
        ("model.layers.3.self_attn.o_proj.weight", "model.layers.3.self_attn.o_proj.weight"),
        ("model.layers.3.self_attn.q_norm.weight", "model.layers.3.self_attn.q_norm.weight"),
        ("model.norm.weight", "model.norm.weight"),
    ],
)
def test_vllm_names(name, inside):
    assert weights.vllm_name(name) == inside


def tied_model(tied=True):
    """As vLLM on a CPU: the head multiplies by a packed copy that only `pack` renews."""
    embed, out = SimpleNamespace(weight=table(0)), SimpleNamespace(weight=table(0))
    out.packed = out.weight.clone()
    out.quant_method = SimpleNamespace(apply=lambda layer, x: x @ layer.packed.T)
    return SimpleNamespace(
        model=SimpleNamespace(embed_tokens=embed), lm_head=out,
        config=SimpleNamespace(tie_word_embeddings=tied),
    )  # fmt: skip


def test_tied_head_is_repacked_and_checked():
    model = tied_model()
    head.check_head(model)
    model.model.embed_tokens.weight = table(1)  # what a reload does
    with pytest.raises(EngineError, match="tied to the embedding"):
        head.check_head(model)

    def pack(layer):
        layer.packed = layer.weight.clone()

    head.retie(model, pack)
    head.check_head(model)
    assert torch.equal(model.lm_head.packed, table(1))


def test_untied_head_is_left_alone_and_checked():
    model = tied_model(tied=False)
    head.retie(model, lambda layer: pytest.fail("packed an untied head"))
    model.lm_head.weight = table(1)
    with pytest.raises(EngineError, match="other weights"):
        head.check_head(model)
    del model.lm_head
    head.retie(model, None)
    head.check_head(model)


def test_top_entropy_is_an_upper_bound_and_exact_when_all_is_seen():
    logp = torch.log_softmax(torch.randn(50, generator=torch.Generator().manual_seed(1)) * 3, -1)
    true = float(-(logp.exp() * logp).sum())
    order = logp.sort(descending=True).values.tolist()
    bounds = [reports.top_entropy(order[:k], 50) for k in (1, 5, 20, 49, 50)]
    assert all(a >= b - 1e-5 for a, b in itertools.pairwise(bounds)) and bounds[0] > true
    assert bounds[-1] == pytest.approx(true, abs=1e-5)


def test_entropy_with_excluded_tokens():
    logits = torch.tensor([[0.0, float("-inf"), 0.0], [1.0, 1.0, 1.0]])
    got = worker_statistics.entropy(logits, torch.ones(2, 1))
    np.testing.assert_allclose(got, [np.log(2), np.log(3)], atol=1e-6)


def test_rows_follow_the_batch():
    rows = worker_statistics.SampledEntropies()
    p = SimpleNamespace(extra_args={worker_statistics.KEY: "a"}, temperature=2.0)
    q = SimpleNamespace(extra_args={worker_statistics.KEY: "b"}, temperature=0.0)
    other = SimpleNamespace(extra_args=None, temperature=1.0)
    scored = SimpleNamespace(
        extra_args={worker_statistics.KEY: "c", worker_statistics.SCORE: 1.0}, temperature=0.0
    )
    rows.update([], [(0, p, [], []), (1, q, [], []), (2, other, [], []), (3, scored, [], [])], [])
    assert set(rows.rows) == {0, 1}
    rows.update([], [], [(0, 1, True)])
    assert rows.rows[1][:2] == ("a", 2.0) and rows.rows[0][:2] == ("b", 1.0)
    rows.update([0], [], [(1, 0, False)])
    assert set(rows.rows) == {0} and rows.rows[0][0] == "a"
    rows.update([], [(0, other, [], [])], [])  # a new request in the place of an old one
    assert rows.rows == {}


def test_environment(monkeypatch):
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "DEBUG")
    start.prepare_environment(in_process=True)
    import os

    assert os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"
    assert os.environ["VLLM_LOGGING_LEVEL"] == "DEBUG"
    assert os.environ["VLLM_USE_V2_MODEL_RUNNER"] == "0"


# -- configuration ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "match"),
    [
        (["rollout.engine=vllm", "deterministic=true"], "no deterministic mode"),
        (["rollout.statistics=top"], "native engine is always exact"),
    ],
)
def test_contradictions_in_the_configuration(given, match):
    with pytest.raises(ConfigError, match=match):
        load_config("quickstart", given)


def test_a_plan_needs_vllm_and_refuses_approximate_entropies(monkeypatch):
    given = ["rollout.engine=vllm", "rollout.statistics=top"]
    cfg = load_config("quickstart", given)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"appo\[vllm\]"):
        _check_engine(cfg, resolve(cfg.algo))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    with pytest.raises(ConfigError, match="approximate.*statistics=exact"):
        _check_engine(cfg, resolve(cfg.algo))
    for fine in (["algo.branch_by=random"], ["algo=grpo"]):
        cfg = load_config("quickstart", [*given, *fine])
        _check_engine(cfg, resolve(cfg.algo))
