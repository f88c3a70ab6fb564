"""Who runs when, and what gives way: states, admission with reservation, preemption, fairness, a
full pool.
"""

import numpy as np
import pytest
import torch
from support.tiny_models import PROMPT, VOCAB, finish

from appo.errors import EngineError
from appo.rollout.engine import SamplingParams
from appo.rollout.native import NativeEngine
from appo.rollout.native.model.weights import read_tensors
from appo.rollout.native.requests import SequenceState
from appo.rollout.native.tree.integrity import check_tree

torch.set_num_threads(1)


@pytest.fixture
def make(folder):
    def engine(**settings):
        settings = {"max_batch": 8, "prefill_chunk": 16} | settings
        return NativeEngine(folder, dtype="float32", **settings)

    return engine


def ids(seed, n):
    return np.random.default_rng(seed).integers(0, VOCAB, n).tolist()


def kinds(engine, *names):
    return [(e.kind, e.seq) for e in engine.events if e.kind in names]


def released(engine, seqs):
    """Nothing is left when all handles are given back."""
    for seq in seqs:
        engine.release(seq)
    check_tree(engine.tree)
    stats = engine.stats()
    return [stats[k] for k in ("blocks_used", "kv_tokens", "live_nodes", "live_sequences")] == [
        0
    ] * 4


# -- states ----------------------------------------------------------------------------------------


def test_a_sequence_goes_through_the_states(make):
    engine = make(max_batch=1)
    seq, other = engine.add_prompt(PROMPT), engine.add_prompt(ids(1, 20))
    assert engine.state(seq) is SequenceState.FORK_READY
    calls = []
    params = SamplingParams(30, stop=lambda t: calls.append(t) or len(calls) == 3)
    engine.submit(seq, params, seed=0)
    engine.submit(other, SamplingParams(3), seed=0)
    assert engine.state(seq) is engine.state(other) is SequenceState.WAITING
    engine.step()
    assert (
        engine.state(seq) is SequenceState.PREFILL and engine.state(other) is SequenceState.WAITING
    )
    engine.step()
    engine.step()  # 40 tokens in chunks of 16: the last chunk draws the first token
    assert engine.state(seq) is SequenceState.DECODE
    events = []
    while not events:
        events = engine.step()
    assert [e.seq for e in events] == [seq] and engine.state(seq) is SequenceState.TOOL_WAIT
    engine.append(seq, [1, 2])
    assert engine.state(seq) is SequenceState.TOOL_WAIT
    engine.submit(seq, SamplingParams(5), seed=0)
    assert engine.state(seq) is SequenceState.WAITING  # behind the other one
    engine.step()
    engine.cancel(other)
    assert engine.state(other) is SequenceState.CANCELLED and engine.length(other) == 20
    finish(engine)
    assert engine.state(seq) is SequenceState.FORK_READY
    engine.release(seq)
    assert engine.state(seq) is SequenceState.DONE
    with pytest.raises(EngineError, match="unknown"):
        engine.state(99)


# -- continuous batching ---------------------------------------------------------------------------


def test_decoding_does_not_starve_while_a_long_prompt_is_prefilled(make):
    engine = make()
    first = engine.add_prompt(PROMPT[:4])
    engine.submit(first, SamplingParams(40), seed=0)
    engine.step()
    second = engine.add_prompt(ids(2, 90))
    engine.submit(second, SamplingParams(1), seed=0)
    for _ in range(6):  # 90 tokens in chunks of 16
        before = engine.length(first)
        assert not engine.step() or engine.length(second) == 91
        assert engine.length(first) == before + 1
    assert engine.length(second) == 91


def test_oldest_submission_first(make):
    """Prefill budget and places go by age of submission, also for a sequence that was here before."""
    engine = make(max_batch=2)
    seqs = [engine.add_prompt(ids(i, 20 + i)) for i in range(5)]
    for seq in seqs:
        engine.submit(seq, SamplingParams(4), seed=0)
    while seqs[0] not in [event.seq for event in engine.step()]:
        pass
    engine.submit(seqs[0], SamplingParams(4), seed=1)  # a new submission: the last of all
    finish(engine)
    assert [s for _, s in kinds(engine, "admit")] == [*seqs, seqs[0]]


def test_a_large_one_is_not_overtaken(make):
    """The oldest waits for room, the small one behind it waits too, so a stream of small ones
    cannot starve it.
    """
    engine = make(kv_tokens=96)  # 6 blocks
    first = engine.add_prompt(ids(0, 30))
    engine.submit(first, SamplingParams(30), seed=0)  # 59 positions: 4 blocks
    large, small = engine.add_prompt(ids(1, 50)), engine.add_prompt(ids(2, 4))
    engine.submit(large, SamplingParams(10), seed=0)  # 4 blocks
    engine.submit(small, SamplingParams(2), seed=0)  # 1 block: there would be room
    engine.step()
    assert engine.state(large) is engine.state(small) is SequenceState.WAITING
    finish(engine)
    assert [s for _, s in kinds(engine, "admit")] == [first, large, small]


# -- admission with reservation --------------------------------------------------------------------


def test_admission_reserves_what_may_still_be_needed(make):
    """Shared blocks count once; nobody who was admitted is ever sent back."""
    engine = make(kv_tokens=112)  # 7 blocks: the prompt takes 3, each root up to 2
    prompt = engine.add_prompt(PROMPT)
    roots = [engine.fork(prompt, 40) for _ in range(4)]
    for seq in roots:
        engine.submit(seq, SamplingParams(20), seed=seq)
    running = set()
    while len(running) < 2 or engine.stats()["running"] == 2:
        engine.step()
        running.add(engine.stats()["running"])
        assert engine.stats()["blocks_used"] <= 7
        if not engine.has_work():
            break
    finish(engine)
    stats = engine.stats()
    assert max(running) == 2 and stats["preemptions"] == 0 and stats["blocks_peak"] <= 7
    assert stats["kv_tokens"] <= 112
    assert released(engine, [prompt, *roots])


def test_a_pool_too_small_for_one_sequence_says_what_it_needs(make):
    engine = make(kv_tokens=60)  # 3 blocks
    seq = engine.add_prompt(PROMPT)
    message = r"grow to 60 tokens it needs 4 blocks.*the pool has 3; raise kv_tokens to 64"
    with pytest.raises(EngineError, match=message):
        engine.submit(seq, SamplingParams(20), seed=0)
    assert not engine.has_work() and engine.state(seq) is SequenceState.FORK_READY
    engine.submit(seq, SamplingParams(9), seed=0)  # 48 positions
    assert len(finish(engine)) == 1
    branch = engine.fork(
        seq, 17
    )  # the parent's 16 positions and its own 17: a block more than a flat sequence
    with pytest.raises(EngineError, match="needs 4 blocks"):
        engine.submit(branch, SamplingParams(34), seed=0)
    with pytest.raises(EngineError, match="kv_tokens=15: must be at least 16"):
        make(kv_tokens=15)


# -- giving way ------------------------------------------------------------------------------------


def test_idle_sequences_give_way_least_recently_used_first(make):
    engine = make(kv_tokens=96)  # 6 blocks
    seqs = [engine.add_prompt(ids(i, 30)) for i in range(3)]
    for seq in seqs:
        engine.submit(seq, SamplingParams(3), seed=0)
        finish(engine)  # 2 blocks each: the pool is full
    engine.release(engine.fork(seqs[0], 5))  # used just now
    kept = engine.tokens(seqs[1])
    new = engine.add_prompt(ids(9, 20))
    engine.submit(new, SamplingParams(3), seed=0)
    finish(engine)
    assert kinds(engine, "evict", "preempt") == [("evict", seqs[1])]
    assert engine.stats()["evicted_tokens"] == 32 and engine.tokens(seqs[1]) == kept
    before = engine.stats()["prefill_tokens"]
    engine.submit(seqs[1], SamplingParams(2), seed=0)  # all of it is run again
    finish(engine)
    assert engine.stats()["prefill_tokens"] - before == 33
    assert released(engine, [*seqs, new])


def test_a_prompt_gives_way_when_all_that_stood_on_it_has(make):
    """Waiting leaves of released prompts hold the pool; new work must still get through, and they
    must after it.
    """
    engine = make(kv_tokens=64)  # 4 blocks
    prompt = engine.add_prompt(PROMPT)
    leaves = [engine.fork(prompt, 40) for _ in range(2)]
    for seq in leaves:
        engine.submit(seq, SamplingParams(4), seed=seq)
        finish(engine)
    engine.release(prompt)
    assert engine.stats()["blocks_used"] == 4  # with room for one leaf beside the prompt
    new = engine.add_prompt(ids(3, 50))
    engine.submit(new, SamplingParams(10), seed=0)
    assert len(finish(engine)) == 1  # needs all 4 blocks
    for seq in leaves:
        engine.append(seq, [5, 6])
        engine.submit(seq, SamplingParams(4), seed=seq)
    events = finish(engine)
    assert sorted(events) == leaves
    assert released(engine, [*leaves, new])


def test_all_leaves_wait_for_tools_and_the_pool_is_full(make):
    engine = make(kv_tokens=160, max_batch=4)  # 10 blocks
    expected = make(max_batch=4)
    lines = {}
    for which in (engine, expected):
        seqs = [which.add_prompt(ids(i, 25)) for i in range(8)]  # 2 or 3 blocks each at the end
        for turn in range(3):
            for seq in seqs:
                which.submit(seq, SamplingParams(3 + turn, stop=lambda t: t % 3 == 0), seed=seq)
            finish(which)
            if turn < 2:
                for seq in seqs:
                    which.append(seq, ids(100 + seq, 2))
        lines[which] = [which.tokens(seq) for seq in seqs]
    assert lines[engine] == lines[expected]
    stats = engine.stats()
    assert stats["evicted_tokens"] > 0 and stats["blocks_peak"] <= 10
    assert expected.stats()["evicted_tokens"] == 0
    assert released(engine, range(8))


def test_the_youngest_running_one_gives_way_to_a_score(make):
    """Scoring takes what was reserved: the youngest goes back to the queue, nothing is lost, all
    end as alone.
    """
    engine = make(kv_tokens=128)  # 8 blocks
    idle = engine.add_prompt(ids(7, 60))  # 4 blocks when scored
    seqs = [engine.add_prompt(ids(i, 20)) for i in range(2)]
    for seq in seqs:
        engine.submit(seq, SamplingParams(40), seed=seq)  # 4 blocks each at the end
    for _ in range(25):
        engine.step()
    assert engine.stats()["running"] == 2 and engine.stats()["blocks_used"] == 6
    sampled = engine.tokens(seqs[1])
    engine.score([idle])
    assert kinds(engine, "preempt") == [("preempt", seqs[1])]
    assert engine.state(seqs[1]) is SequenceState.WAITING and engine.tokens(seqs[1]) == sampled
    events = finish(engine)
    alone = make()
    for seq in seqs:
        same = alone.add_prompt(ids(seqs.index(seq), 20))
        alone.submit(same, SamplingParams(40), seed=seq)
        assert finish(alone)[same].token_ids == events[seq].token_ids
    with pytest.raises(EngineError, match="blocks of KV are lacking.*raise kv_tokens"):
        engine.score([engine.add_prompt(ids(8, 200))])
    check_tree(engine.tree)


def grown(engine):
    """Four prompts of 20 tokens, two roots of 30 more each, three forks of every other root; all
    idle.
    """
    roots = []
    for p in range(4):
        prompt = engine.add_prompt(ids(p, 20))
        roots += [engine.fork(prompt, 20) for _ in range(2)]
    for seq in roots:
        engine.submit(seq, SamplingParams(30), seed=seq)
    finish(engine)
    forks = [engine.fork(seq, at) for seq in roots[::2] for at in (22, 48, 35)]
    for seq in forks:
        engine.submit(seq, SamplingParams(15), seed=seq)
    finish(engine)
    return roots + forks


@pytest.mark.parametrize("kv_tokens,prefill_chunk", [(96, 512), (96, 7), (176, 40)])
def test_a_score_of_more_than_the_pool_holds(make, folder, kv_tokens, prefill_chunk):
    """After an update, too: every token once, all is fresh, and what gave way is prefilled again
    when it is drawn from.
    """
    large, small = make(), make(kv_tokens=kv_tokens, prefill_chunk=prefill_chunk)
    results = []
    for engine in (large, small):
        seqs = grown(engine)
        engine.load_weights(read_tensors(folder), 1)
        scored, rows = engine.score(seqs), engine.stats()["scored_tokens"]
        check_tree(engine.tree)
        assert not any(engine.tree.stale(seq) for seq in seqs)
        again = [engine.fork(seq, engine.length(seq) - 3) for seq in seqs]
        for seq in again:
            engine.submit(seq, SamplingParams(5), seed=seq)
        results.append((scored, rows, {s: e.token_ids for s, e in finish(engine).items()}))
    (wanted, *facts), (scored, *others) = results
    assert others == facts
    for a, b in zip(wanted, scored, strict=True):
        np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-5)
        np.testing.assert_allclose(a.entropy, b.entropy, atol=1e-5)
    stats = small.stats()
    assert stats["blocks_peak"] <= kv_tokens // 16 < large.stats()["blocks_peak"]
    assert stats["evicted_tokens"] > 0 and stats["preemptions"] == 0


def test_room_is_made_when_it_is_lacking(make):
    """A run that may become long is admitted without touching KV that is not in its way yet."""
    engine = make(kv_tokens=240)  # 15 blocks
    idle = [engine.add_prompt(ids(i, 60)) for i in range(3)]
    for seq in idle:
        engine.submit(seq, SamplingParams(2, stop=lambda t: True), seed=0)
    finish(engine)
    long = engine.add_prompt(ids(9, 10))
    engine.submit(long, SamplingParams(190), seed=0)
    engine.step()
    assert engine.stats()["blocks_used"] == 3 * 4 + 1 and engine.stats()["evicted_tokens"] == 0
    finish(engine)
    assert engine.length(long) == 200 and engine.stats()["evicted_tokens"] > 0
    assert engine.stats()["preemptions"] == 0


def test_a_preempted_run_goes_on_identically_and_first(make):
    expected = make()
    same = expected.add_prompt(PROMPT)
    expected.submit(same, SamplingParams(20), seed=3)
    wanted = finish(expected)[same]

    engine = make(max_batch=1)
    seq, later = engine.add_prompt(PROMPT), engine.add_prompt(ids(1, 5))
    engine.submit(seq, SamplingParams(20), seed=3)
    engine.submit(later, SamplingParams(2), seed=0)
    for _ in range(9):
        engine.step()
    held = engine.stats()["kv_tokens"]
    engine.preempt(seq)
    assert engine.stats()["kv_tokens"] == 0 < held and engine.state(seq) is SequenceState.WAITING
    with pytest.raises(EngineError, match="it is waiting; only a running one"):
        engine.preempt(seq)
    events = finish(engine)
    assert list(events) == [seq, later]
    assert events[seq].token_ids == wanted.token_ids
    np.testing.assert_allclose(events[seq].logprobs, wanted.logprobs, atol=1e-5)
    assert engine.stats()["preemptions"] == 1 and engine.stats()["evicted_tokens"] == held


def test_preemption_spares_what_children_inherit(make):
    engine = make()
    seq = engine.add_prompt(PROMPT)
    engine.submit(seq, SamplingParams(30), seed=0)
    for _ in range(20):
        engine.step()
    child = engine.fork(seq, 35)
    engine.preempt(seq)
    assert engine.stats()["kv_tokens"] == 34
    engine.submit(child, SamplingParams(3), seed=0)
    assert sorted(finish(engine)) == [seq, child]


# -- what it cost ----------------------------------------------------------------------------------


def test_tokens_saved_against_independent_sequences(make):
    engine = make()
    prompt = engine.add_prompt(PROMPT)
    roots = [engine.fork(prompt, 40) for _ in range(4)]
    for seq in roots:
        engine.submit(seq, SamplingParams(5), seed=seq)
    finish(engine)
    ran = 39 + 4 * 5
    assert engine.stats()["tokens_saved"] == 4 * 44 - ran
    engine.append(roots[0], [1, 2, 3])  # an independent sequence would have kept its KV, too
    engine.submit(roots[0], SamplingParams(2), seed=0)
    finish(engine)
    assert engine.stats()["tokens_saved"] == 4 * 44 - ran
    branch = engine.fork(roots[1], 43)
    engine.submit(branch, SamplingParams(2), seed=0)
    finish(engine)
    assert engine.stats()["tokens_saved"] == 4 * 44 - ran + 42
    before = engine.stats()["tokens_saved"]
    engine.score(roots[1:3])
    assert engine.stats()["tokens_saved"] == before + 2 * 44 - (39 + 2 * 5)
    stats = engine.stats()
    assert stats["blocks_peak"] >= stats["blocks_used"] == -(-39 // 16) + 4 + 1
    assert stats["kv_bytes"] >= stats["blocks_used"] * stats["block_bytes"]


@pytest.mark.parametrize("end", ["cancel", "release"])
def test_what_was_cancelled_before_it_drew_counts_on_both_sides(make, end):
    engine = make()
    seq = engine.add_prompt(PROMPT)
    engine.submit(seq, SamplingParams(5), seed=0)
    engine.step()
    assert engine.stats()["prefill_tokens"] == 16
    getattr(engine, end)(seq)
    assert engine.stats()["tokens_saved"] == 0
    if end == "cancel":
        engine.submit(seq, SamplingParams(5), seed=0)
        finish(engine)
        assert engine.stats()["tokens_saved"] == 0
