"""Deterministic mode: the same bits whatever runs beside a sequence; and the event log that lets a
run be done again.
"""

import json
import random

import numpy as np
import pytest
import torch
from support.engine_growth import PROMPTS, grow
from support.tiny_models import VOCAB, build, finish

from appo.errors import EngineError
from appo.rollout.engine import SamplingParams
from appo.rollout.native import NativeEngine
from appo.rollout.native.replay import _Replay, read_events, replay
from appo.rollout.native.tree.integrity import check_tree

torch.set_num_threads(1)
RUNNERS = ["torch", "auto"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    build("qwen2", path)
    return path


def make(folder, **settings):
    settings = {"dtype": "float32", "deterministic": True} | settings
    return NativeEngine(folder, **settings)


@pytest.mark.parametrize("runner", RUNNERS)
def test_same_bits_whatever_else_happens(folder, runner):
    wanted = grow(make(folder, runner=runner))
    assert len(wanted) == 8 + 16
    others = {
        "arrival": (dict(), dict(shuffle=1)),
        "one at a time": (dict(max_batch=1), dict()),
        "batch of 3": (dict(max_batch=3), dict(shuffle=2)),
        "chunks of 5": (dict(prefill_chunk=5), dict()),
        "preemption": (dict(prefill_chunk=11), dict(shuffle=3, preempt=0.15)),
        "cold": (dict(), dict(cold=True)),
        "small pool": (dict(kv_tokens=192, max_batch=4), dict(shuffle=4)),
    }
    for name, (settings, how) in others.items():
        engine = make(folder, runner=runner, **settings)
        assert grow(engine, **how) == wanted, name
        if name in ("preemption", "small pool"):
            assert engine.stats()["evicted_tokens"] > 0
        check_tree(engine.tree)


def test_same_bits_with_more_threads(folder):
    wanted = grow(make(folder, runner="auto"))
    torch.set_num_threads(2)
    try:
        assert grow(make(folder, runner="auto")) == wanted
    finally:
        torch.set_num_threads(1)


def test_same_bits_in_bfloat16(folder):
    wanted = grow(make(folder, dtype="bfloat16"))
    for settings, how in (
        (dict(max_batch=3), dict(shuffle=1, preempt=0.1)),
        (dict(prefill_chunk=5), dict()),
    ):
        assert grow(make(folder, dtype="bfloat16", **settings), **how) == wanted


def test_prompts_do_not_lean_on_each_other(folder):
    """Sharing by common prefix depends on what was there before, and moves the bits: not in
    deterministic mode.
    """
    engine = make(folder)
    for tail in (1, 2):
        engine.add_prompt(PROMPTS[3] + [tail])
    assert engine.stats()["prefix_hits_tokens"] == 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_scoring_gives_the_same_bits(folder, dtype):
    """One sequence or many, small chunks or large, KV there or not, and twice with the same
    weights.
    """
    from safetensors.torch import load_file

    scores = []
    for settings in (dict(), dict(prefill_chunk=7)):
        engine = make(folder, dtype=dtype, **settings)
        prompt = engine.add_prompt(PROMPTS[2])
        seqs = [engine.fork(prompt, len(PROMPTS[2])) for _ in range(4)]
        for i, seq in enumerate(seqs):
            engine.submit(seq, SamplingParams(12 + i), i)
        finish(engine)
        scores.append(engine.score(seqs))
        scores.append([engine.score([seq])[0] for seq in seqs])
        engine.load_weights(load_file(folder / "model.safetensors").items(), 1)
        scores.append(engine.score(seqs[::-1])[::-1])
    for other in scores[1:]:
        for a, b in zip(scores[0], other, strict=True):
            assert np.array_equal(a.logprobs, b.logprobs) and np.array_equal(a.entropy, b.entropy)


# -- the event log ---------------------------------------------------------------------------------


def after(count):
    seen = []
    return lambda token: seen.append(token) or len(seen) == count


def live(engine, rng):
    """A life with everything in it; → [SequenceStopped] by handle."""
    out = {}

    def steps(n):
        for _ in range(n):
            for event in engine.step():
                out.setdefault(event.seq, []).append(event)

    prompt = engine.add_prompt(PROMPTS[3])
    roots = [engine.fork(prompt, 30 + i) for i in range(5)]
    for i, seq in enumerate(roots):
        stop = after(7) if i % 2 else None
        ends = frozenset(range(0, VOCAB, 5)) if i == 2 else frozenset()
        engine.submit(seq, SamplingParams(9 + i, 0.8, stop_token_ids=ends, stop=stop), i)
    steps(5)
    branch = engine.fork(roots[4], engine.length(roots[4]))  # of a sequence that decodes
    engine.submit(branch, SamplingParams(7), 50)
    engine.cancel(roots[3])
    steps(2)
    engine.release(roots[0])
    while engine.has_work():
        steps(1)
    engine.append(roots[1], [rng.randrange(VOCAB) for _ in range(6)])
    engine.submit(roots[1], SamplingParams(4), 60)
    engine.submit(roots[3], SamplingParams(20), 3)
    while engine.has_work():
        steps(1)
    engine.score(roots[1:3])
    return out


@pytest.mark.parametrize(
    "settings", [dict(), dict(max_batch=2, prefill_chunk=7), dict(kv_tokens=240)]
)
def test_replay_gives_the_same_bits(folder, tmp_path, settings):
    path = tmp_path / "events.jsonl"
    engine = make(folder, max_batch=4, prefill_chunk=16, record=path)
    wanted = live(engine, random.Random(0))
    recorded = list(read_events(path))
    assert recorded == list(engine.events)
    kinds = {e.kind for e in recorded}
    assert kinds >= {
        "prompt",
        "fork",
        "submit",
        "admit",
        "cancel",
        "release",
        "append",
        "stop",
        "score",
    }
    assert [e.step for e in recorded] == sorted(e.step for e in recorded)
    again = replay(make(folder, **settings), recorded)
    stop = {(e.seq, tuple(e.facts["ids"])) for e in recorded if e.kind == "stop"}
    assert stop == {(seq, tuple(e.token_ids)) for seq, events in wanted.items() for e in events}
    for seq, events in wanted.items():
        for a, b in zip(events, again[seq], strict=True):
            assert (a.token_ids, a.logprobs, a.entropy) == (b.token_ids, b.logprobs, b.entropy)
            assert a.reason == b.reason


def test_replay_loads_the_weights_that_were_loaded(folder, tmp_path):
    other = build("qwen2", tmp_path, seed=1)
    path = tmp_path / "events.jsonl"
    engine = make(folder, record=path)
    seq = engine.add_prompt(PROMPTS[0])
    engine.load_weights(other.named_parameters(), 3)
    engine.submit(seq, SamplingParams(6), 0)
    wanted = finish(engine)[seq]
    with pytest.raises(EngineError, match="version 3; pass weights="):
        replay(make(folder), read_events(path))
    again = replay(make(folder), read_events(path), lambda version: other.named_parameters())
    assert again == {seq: [wanted]} and wanted.policy_version == 3


def test_replay_rewinds(folder, tmp_path):
    """Also what a cancel took back of a sequence that had stopped."""
    path = tmp_path / "events.jsonl"
    engine = make(folder, record=path)
    seq, other = engine.add_prompt(PROMPTS[0]), engine.add_prompt(PROMPTS[1])
    engine.submit(seq, SamplingParams(8), 0)
    first = finish(engine)[seq]
    engine.rewind(seq, len(PROMPTS[0]) + 3)
    engine.append(seq, [1, 2, 3])
    # a callback cancels `other`, which stopped in the same step
    engine.submit(other, SamplingParams(1), 0)
    engine.submit(seq, SamplingParams(8, stop=lambda t: engine.cancel(other)), 1)
    second = finish(engine)[seq]
    engine.submit(other, SamplingParams(4), 5)
    third = finish(engine)[other]
    kinds = [e.kind for e in read_events(path)]
    assert kinds.count("rewind") == kinds.count("cancel") == 1
    again = replay(make(folder), read_events(path))
    assert again == {seq: [first, second], other: [third]}


def test_a_damaged_log_is_an_error(folder, tmp_path):
    """A stop that no submission leads to; a log without ids."""
    path = tmp_path / "events.jsonl"
    engine = make(folder, record=path)
    seq = engine.add_prompt(PROMPTS[0])
    engine.submit(seq, SamplingParams(3), 0)
    finish(engine)
    events = list(read_events(path))
    other = make(folder)
    waits = _Replay(other, events, None)
    waits.here[seq], waits.begun[seq] = seq, 0
    with pytest.raises(EngineError, match=f"sequence {seq} stops in the log.*damaged"):
        waits._stop(seq, events[-1].facts, len(events) - 1)
    other.add_prompt(PROMPTS[0])
    with pytest.raises(EngineError, match="no token ids.*record=FILE"):
        replay(make(folder), list(other.events))


def test_the_log_keeps_no_lists_of_its_callers(folder, tmp_path):
    """Without a file just their lengths; with one, copies."""
    plain, recording = make(folder), make(folder, record=tmp_path / "events.jsonl")
    for engine in (plain, recording):
        seq = engine.add_prompt(PROMPTS[0])
        engine.submit(seq, SamplingParams(3), 0)
        event = finish(engine)[seq]
        drawn = [*event.token_ids]
        event.token_ids.clear()
        first, last = engine.events[0], engine.events[-1]
        if engine is plain:
            assert first.facts == {"count": len(PROMPTS[0])}
            assert last.facts == {"count": 3, "reason": "length"}
        else:
            assert first.facts["ids"] == PROMPTS[0] and last.facts["ids"] == drawn


def test_the_log_in_memory_is_bounded_and_says_so(folder):
    engine = make(folder)
    assert engine.events.maxlen == 1024
    for _ in range(400):  # three events each
        seq = engine.add_prompt([1])
        engine.append(seq, [2])
        engine.release(seq)
    assert len(engine.events) == 1024 and engine.events[-1].kind == "release"
    engine.submit(seq := engine.add_prompt([1]), SamplingParams(1), 0)
    finish(engine)
    with pytest.raises(EngineError, match="not complete; record to a file"):
        replay(make(folder), list(engine.events)[2:])


def test_a_recorded_file_is_json_lines(folder, tmp_path):
    path = tmp_path / "events.jsonl"
    engine = make(folder, record=path)
    seq = engine.add_prompt([1, 2])
    engine.submit(seq, SamplingParams(2, stop_token_ids=frozenset({5, 4})), 7)
    finish(engine)
    first, second, *_, last = map(json.loads, path.read_text().splitlines())
    assert first == {"step": 0, "kind": "prompt", "seq": seq, "ids": [1, 2]}
    assert second["stop_token_ids"] == [4, 5] and second["seed"] == 7
    assert last["kind"] == "stop" and last["step"] == 2 and len(last["ids"]) <= 2
