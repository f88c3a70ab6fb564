"""Stopping, misuse and faults: each is a clear error or a defined outcome; nothing leaks and
nothing drawn is lost.
"""

import numpy as np
import pytest
import torch
from support.tiny_models import PROMPT, VOCAB, build, finish

from appo.errors import EngineError, StaleWeightsError
from appo.rollout.engine import SamplingParams
from appo.rollout.native import NativeEngine
from appo.rollout.native.model.weights import read_tensors
from appo.rollout.native.requests import SequenceState
from appo.rollout.native.tree.integrity import check_tree

torch.set_num_threads(1)


def sampled(engine, n, seed=0):
    """A sequence of the prompt and n drawn tokens."""
    seq = engine.add_prompt(PROMPT)
    engine.submit(seq, SamplingParams(n), seed=seed)
    return seq, finish(engine)[seq].token_ids


# -- stopping --------------------------------------------------------------------------------------


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
    with pytest.raises(EngineError, match="need 257"):
        engine.submit(long, SamplingParams(1), seed=0)


def test_misuse_is_an_error_that_says_what_to_do(engine):
    seq = engine.add_prompt(PROMPT)
    engine.submit(seq, SamplingParams(5), seed=0)
    new = engine.add_prompt([1])
    for call, match in (
        (lambda: engine.length(99), "unknown"),
        (lambda: engine.fork(seq, 0), "1 … 40"),
        (lambda: engine.fork(seq, 41), "1 … 40"),
        (lambda: engine.submit(seq, SamplingParams(5), seed=0), "already"),
        (lambda: engine.append(seq, [1]), "decoding"),
        (lambda: engine.score([seq]), "decoding"),
        (lambda: engine.score([new], temperature=0), "temperature=0"),
        (lambda: engine.add_prompt([]), "empty"),
        (lambda: engine.add_prompt([VOCAB]), "vocabulary"),
        (lambda: engine.add_prompt([0] * 257), "max_context=256"),
        (lambda: engine.append(new, [0] * 256), "max_context=256"),
        (lambda: engine.submit(new, SamplingParams(0), seed=0), "max_new_tokens=0"),
        (lambda: engine.submit(new, SamplingParams(1, temperature=-1), seed=0), "temperature"),
        (lambda: engine.submit(new, SamplingParams(1, top_p=0), seed=0), "top_p"),
    ):
        with pytest.raises(EngineError, match=match):
            call()
    # the first chunk of the prompt only: nothing broke
    assert engine.step() == [] and engine.length(seq) == 40


@pytest.mark.parametrize(
    "settings,match",
    [
        (dict(dtype="float16"), "dtype='float16'"),
        (dict(max_batch=0), "max_batch=0"),
        (dict(prefill_chunk=0), "prefill_chunk=0"),
        (dict(kv_tokens=3), "kv_tokens=3: must be at least 16"),
        (dict(max_context=257), "max_context=257"),
        (dict(runner="fast"), "runner='fast'"),
        (dict(record="no/such/folder/events.jsonl"), "record='no/such/folder"),
    ],
)
def test_settings_that_cannot_work(folder, settings, match):
    with pytest.raises(EngineError, match=match):
        NativeEngine(folder, **settings)


# -- handles ---------------------------------------------------------------------------------------


def test_a_released_handle_is_refused_everywhere(engine):
    """Also what a late tool result runs into: it is not taken, and nothing comes back to life."""
    seq, _ = sampled(engine, 4)
    engine.release(seq)
    for call in (
        lambda: engine.append(seq, [1]),
        lambda: engine.submit(seq, SamplingParams(1), seed=0),
        lambda: engine.fork(seq, 3),
        lambda: engine.cancel(seq),
        lambda: engine.score([seq]),
        lambda: engine.tokens(seq),
        lambda: engine.preempt(seq),
        lambda: engine.release(seq),
    ):
        with pytest.raises(EngineError, match="was released; use a live handle"):
            call()
    assert engine.stats()["blocks_used"] == engine.stats()["live_nodes"] == 0


def test_a_tool_result_after_cancellation(engine):
    """A cancelled sequence is back at its submit and may go on from there; one that waits for a
    tool keeps its tokens.
    """
    seq, drawn = sampled(engine, 4)
    engine.cancel(seq)  # not decoding: no effect
    assert engine.tokens(seq) == PROMPT + drawn
    engine.submit(seq, SamplingParams(9), seed=1)
    for _ in range(5):
        engine.step()
    engine.cancel(seq)
    engine.append(seq, [1, 2, 3])
    assert engine.tokens(seq) == PROMPT + drawn + [1, 2, 3]
    engine.submit(seq, SamplingParams(2), seed=1)
    assert len(finish(engine)[seq].token_ids) == 2


def test_cancel_and_release_in_every_state(engine):
    def waiting(seq):
        engine.submit(seq, SamplingParams(20), seed=0)

    def prefill(seq):
        waiting(seq)
        engine.step()

    def decode(seq):
        waiting(seq)
        for _ in range(8):
            engine.step()

    def preempted(seq):
        decode(seq)
        engine.preempt(seq)

    def tool(seq):
        engine.submit(seq, SamplingParams(20, stop=lambda t: True), seed=0)
        finish(engine)

    def cancelled(seq):
        decode(seq)
        engine.cancel(seq)

    states = {
        SequenceState.WAITING: waiting, SequenceState.PREFILL: prefill, SequenceState.DECODE: decode, SequenceState.TOOL_WAIT: tool,
        SequenceState.CANCELLED: cancelled, SequenceState.FORK_READY: lambda seq: sampled(engine, 3),
    }  # fmt: skip
    for name, reach in [*states.items(), (SequenceState.WAITING, preempted)]:
        for children in (0, 1):
            for end in ("cancel", "release"):
                seq = engine.add_prompt(PROMPT)
                reach(seq)
                assert engine.state(seq) is name
                kids = [engine.fork(seq, engine.length(seq)) for _ in range(children)]
                known = [engine.tokens(kid) for kid in kids]
                if end == "cancel":
                    engine.cancel(seq)
                    check_tree(engine.tree)
                engine.release(seq)
                check_tree(engine.tree)
                for kid, tokens in zip(kids, known):
                    assert engine.tokens(kid) == tokens
                    engine.submit(kid, SamplingParams(2), seed=0)
                    assert len(finish(engine)) == 1
                    engine.release(kid)
                assert not engine.has_work()
        for seq in list(engine.scheduler.idle):
            engine.release(seq)
        stats = engine.stats()
        assert [stats[k] for k in ("blocks_used", "kv_tokens", "live_nodes")] == [0, 0, 0], name


def test_fork_inside_a_tool_result_and_at_the_end(engine):
    """Any token may be forked at: what may be re-drawn is for the caller to say."""
    seq, drawn = sampled(engine, 3)
    engine.append(seq, [7, 8, 9])
    inside, end = engine.fork(seq, 45), engine.fork(seq, 46)
    for child in (inside, end):
        engine.submit(child, SamplingParams(2), seed=0)
    finish(engine)
    assert engine.tokens(inside)[:45] == PROMPT + drawn + [7, 8]
    assert engine.tokens(end)[:46] == PROMPT + drawn + [7, 8, 9]
    with pytest.raises(EngineError, match="1 … 46"):
        engine.fork(seq, 47)


# -- exceptions ------------------------------------------------------------------------------------


class Broken(Exception):
    pass


@pytest.mark.parametrize("where", ["forward", "pool", "sample"])
def test_an_exception_in_a_step_leaves_everything_as_it_was(folder, where, monkeypatch):
    """Prefill, decode and a score are interrupted once each; the results are those of an
    undisturbed engine.
    """
    plain = NativeEngine(folder, dtype="float32", prefill_chunk=16)
    expected, _ = sampled(plain, 12)
    engine = NativeEngine(folder, dtype="float32", prefill_chunk=16)
    seq = engine.add_prompt(PROMPT)
    engine.submit(seq, SamplingParams(12), seed=0)
    owner, name = {
        "forward": (engine.runner, "forward"),
        "pool": (engine.runner.pool, "ensure"),
        "sample": (engine.sampler, "sample"),
    }[where]

    def fails(*_, **__):
        raise Broken("no luck")

    for steps in (0, 2, 5):
        for _ in range(steps):
            engine.step()
        before = engine.stats(), engine.tokens(seq), engine.tree.kv(seq)
        with monkeypatch.context() as m:
            m.setattr(owner, name, fails)
            if where != "sample" or steps:  # the first chunk draws nothing
                with pytest.raises(Broken):
                    engine.step()
        after = engine.stats(), engine.tokens(seq), engine.tree.kv(seq)
        assert after[1:] == before[1:]
        assert [after[0][k] for k in ("blocks_used", "steps", "prefill_tokens")] == [
            before[0][k] for k in ("blocks_used", "steps", "prefill_tokens")
        ]
        check_tree(engine.tree)
    finish(engine)
    assert engine.tokens(seq) == plain.tokens(expected)
    if where != "sample":
        with monkeypatch.context() as m:
            m.setattr(owner, name, fails)
            with pytest.raises(Broken):
                engine.score([seq])
    np.testing.assert_allclose(
        engine.score([seq])[0].logprobs, plain.score([expected])[0].logprobs, atol=1e-5
    )


def test_a_stop_callback_that_raises_loses_no_token(folder):
    """Its own token and those of the others are kept; an event of the same step comes with the next
    one.
    """
    engine = NativeEngine(folder, dtype="float32")
    plain = [sampled(NativeEngine(folder, dtype="float32"), 6, seed)[1] for seed in (0, 1)]
    seen = []

    def stop(token):
        seen.append(token)
        if len(seen) == 3:
            raise Broken("a parser error")
        return False

    bad, good = engine.add_prompt(PROMPT), engine.add_prompt(PROMPT)
    engine.submit(bad, SamplingParams(6, stop=stop), seed=0)
    engine.submit(good, SamplingParams(3), seed=1)
    engine.step()
    engine.step()
    with pytest.raises(EngineError, match=f"stop callback of sequence {bad} raised Broken") as info:
        engine.step()
    assert isinstance(info.value.__cause__, Broken)
    assert engine.has_work() and engine.length(bad) == 43
    events = finish(engine)
    assert events[good].token_ids == plain[1][:3]
    assert events[bad].token_ids == seen == plain[0]


def test_an_interrupt_in_a_stop_callback_loses_nothing_either(folder):
    engine = NativeEngine(folder, dtype="float32")

    def stop(token):
        raise KeyboardInterrupt

    bad, good = engine.add_prompt(PROMPT), engine.add_prompt(PROMPT)
    engine.submit(bad, SamplingParams(1, stop=stop), seed=0)
    engine.submit(good, SamplingParams(1), seed=1)
    with pytest.raises(KeyboardInterrupt):
        engine.step()
    assert sorted(finish(engine)) == [bad, good]


def with_late_event(engine):
    """A sequence that stopped after one token, in a step which raised."""

    def stop(token):
        raise Broken("a parser error")

    late, bad = engine.add_prompt(PROMPT[:7]), engine.add_prompt(PROMPT[:7])
    engine.submit(late, SamplingParams(1), seed=0)
    engine.submit(bad, SamplingParams(2, stop=stop), seed=1)
    with pytest.raises(EngineError, match="raised Broken"):
        engine.step()
    engine.cancel(bad)
    return late


@pytest.mark.parametrize("end", ["cancel", "release"])
def test_an_event_nobody_was_told_of_goes_with_its_sequence(engine, end):
    late = with_late_event(engine)
    assert engine.has_work() and engine.length(late) == 8
    getattr(engine, end)(late)
    assert not engine.has_work() and engine.step() == []
    if end == "cancel":
        assert engine.state(late) is SequenceState.CANCELLED and engine.tokens(late) == PROMPT[:7]
        engine.submit(late, SamplingParams(3), seed=0)
        assert len(finish(engine)[late].token_ids) == 3
    check_tree(engine.tree)


def test_until_it_was_told_a_sequence_counts_as_decoding(engine, folder):
    late = with_late_event(engine)
    for call in (
        lambda: engine.submit(late, SamplingParams(1), seed=0),
        lambda: engine.append(late, [1]),
        lambda: engine.rewind(late, 3),
        lambda: engine.score([late]),
        lambda: engine.load_weights(read_tensors(folder), 1),
    ):
        with pytest.raises(EngineError, match="decoding"):
            call()
    assert [e.seq for e in engine.step()] == [late]
    engine.append(late, [1])


@pytest.mark.parametrize("end", ["cancel", "release"])
def test_a_callback_takes_back_what_stopped_before_it(engine, end):
    """In the same step, so that its event is not out yet."""
    first, second = engine.add_prompt(PROMPT[:7]), engine.add_prompt(PROMPT[:7])
    engine.submit(first, SamplingParams(1), seed=0)
    engine.submit(
        second, SamplingParams(9, stop=lambda t: getattr(engine, end)(first) or True), seed=1
    )
    assert [e.seq for e in engine.step()] == [second] and not engine.has_work()
    if end == "cancel":
        assert engine.tokens(first) == PROMPT[:7]


@pytest.mark.parametrize("action", ["step", "score"])
@pytest.mark.parametrize("when", ["plan", "commit"])
def test_an_interrupt_between_two_parts_of_a_step(engine, monkeypatch, action, when):
    """After the layout was opened and before anybody holds it; after it was committed.

    The cause is what is reported.
    """
    seq = engine.add_prompt(PROMPT)
    if action == "step":
        engine.submit(seq, SamplingParams(2), seed=0)

    def act():
        return engine.step() if action == "step" else engine.score([seq])

    name = {"plan": "plan" if action == "step" else "layout"}.get(when, when)
    inner = getattr(engine.tree, name)

    def interrupted(*given):
        inner(*given)
        raise KeyboardInterrupt

    with monkeypatch.context() as m:
        m.setattr(engine.tree, name, interrupted)
        with pytest.raises(KeyboardInterrupt):
            act()
    check_tree(engine.tree)
    assert engine.tree.open is None
    act()


def test_stop_callbacks_that_use_the_engine(engine):
    """They may cancel and release (what they cancel gets no token and no event), but not step or
    score.
    """
    seqs = [engine.add_prompt(PROMPT) for _ in range(4)]
    problems = []

    def stop(token):
        for call in (engine.step, lambda: engine.score([seqs[3]])):
            try:
                call()
            except EngineError as e:
                problems.append(str(e))
        engine.cancel(seqs[0])
        engine.cancel(seqs[1])
        if seqs[2] in engine.scheduler.by_seq:
            engine.release(seqs[2])
        return True

    for i, seq in enumerate(seqs[:3]):
        engine.submit(seq, SamplingParams(5, stop=stop if i == 1 else None), seed=i)
    assert finish(engine) == {}
    assert len(problems) == 2 and all("a step is under way" in p for p in problems)
    assert engine.length(seqs[0]) == engine.length(seqs[1]) == 40
    with pytest.raises(EngineError, match="released"):
        engine.length(seqs[2])
    check_tree(engine.tree)


# -- versions --------------------------------------------------------------------------------------


def test_weights_while_nodes_are_alive(engine, tmp_path):
    """Running sequences forbid it; idle ones live on, and say that they are stale until they are
    scored.
    """
    other = build("qwen3", tmp_path, seed=1)
    waiting, _ = sampled(engine, 4)
    running = engine.add_prompt(PROMPT[:7])
    engine.submit(running, SamplingParams(30), seed=0)
    engine.step()
    engine.append(waiting, [3, 4])
    with pytest.raises(EngineError, match="1 sequences are decoding"):
        engine.load_weights(other.named_parameters(), version=1)
    assert engine.policy_version == 0
    engine.cancel(running)
    engine.load_weights(other.named_parameters(), version=1)
    engine.append(waiting, [5])  # a late result is still taken
    for call in (
        lambda: engine.submit(waiting, SamplingParams(1), seed=0),
        lambda: engine.fork(waiting, 42),
    ):
        with pytest.raises(StaleWeightsError, match=rf"score\(\[{waiting}\]\) first"):
            call()
    engine.score([waiting])
    engine.submit(waiting, SamplingParams(2), seed=0)
    assert finish(engine)[waiting].policy_version == 1
    check_tree(engine.tree)


def test_a_weight_push_that_breaks_off(folder, monkeypatch):
    """Half-written weights void all KV, and draw and score nothing until all of them are there."""
    engine = NativeEngine(folder, dtype="float32", max_batch=8, prefill_chunk=16)
    before = {n: t.clone() for n, t in read_tensors(folder)}
    seq, _ = sampled(engine, 3)
    push = engine.model._pack if engine.model.native is None else engine.model.native.pack

    def breaks(*args, **more):
        raise MemoryError("no room for the packed copy")

    where = engine.model if engine.model.native is None else engine.model.native
    name = push.__name__
    monkeypatch.setattr(where, name, breaks)
    with pytest.raises(MemoryError):
        engine.load_weights(before.items(), version=1)
    monkeypatch.undo()
    assert engine.stats()["kv_tokens"] == 0
    for act in (
        lambda: engine.submit(engine.add_prompt(PROMPT), SamplingParams(1), seed=0),
        lambda: engine.score([seq]),
    ):
        with pytest.raises(EngineError, match="broke off.*load all of them again"):
            act()
    one = next(iter(before.items()))
    engine.load_weights([one], version=2)  # one tensor does not mend the others
    with pytest.raises(EngineError, match="broke off"):
        engine.score([seq])
    engine.load_weights(before.items(), version=3)
    engine.score([seq])
    engine.submit(seq, SamplingParams(1), seed=0)
    assert len(finish(engine)[seq].token_ids) == 1


@pytest.mark.parametrize("temperature", [-1.0, 1e-31, 1e31, float("inf"), float("nan")])
def test_temperatures_that_cannot_be_sampled_at(engine, temperature):
    seq = engine.add_prompt(PROMPT)
    with pytest.raises(EngineError, match="temperature=.*must be 0"):
        engine.submit(seq, SamplingParams(1, temperature=temperature), seed=0)
    for hot in (0.0, 1e-30, 1e30):
        engine.submit(seq, SamplingParams(1, temperature=hot), seed=0)
        assert finish(engine)[seq].reason == "length"
