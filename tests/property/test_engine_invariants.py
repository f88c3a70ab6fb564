"""What must hold for every tree: bits of parents, teacher forcing, versions, statistics, liveness;
and that faults show.
"""

import random
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.engine_growth import PROMPTS, grow
from support.engine_watch import Watch
from support.tiny_models import VOCAB, build, dense, finish

from appo.errors import EngineError, StaleWeightsError
from appo.rollout.engine import SamplingParams
from appo.rollout.native import NativeEngine
from appo.rollout.native import engine as engine_module
from appo.rollout.native.tree.integrity import check_tree
from appo.rollout.native.tree.segment_tree import SegmentTree
from appo.rollout.seeds import derive_seed

torch.set_num_threads(1)
_FOLDERS = tempfile.TemporaryDirectory()
FOLDER = Path(_FOLDERS.name) / "0"
MODELS = [build("qwen3", Path(_FOLDERS.name) / str(seed), seed=seed) for seed in range(2)]


def make(**options) -> NativeEngine:
    return NativeEngine(FOLDER, **({"dtype": "float32"} | options))


def make_plain(**options) -> NativeEngine:
    """On the tree's plain definition, whose inside can be damaged."""
    with pytest.MonkeyPatch.context() as m:
        m.setattr(engine_module, "make_tree", SegmentTree)
        return make(**options)


def prompt(n: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, VOCAB, n).tolist()


# -- a parent and its children ---------------------------------------------------------------------


@settings(max_examples=15, deadline=None)
@given(data=st.data(), length=st.integers(1, 40), n=st.integers(2, 30))
def test_a_parent_goes_on_bit_by_bit_as_without_children(data, length, n):
    alone = make(deterministic=True)
    seq = alone.add_prompt(prompt(length))
    alone.submit(seq, SamplingParams(n), 5)
    wanted = finish(alone)[seq]

    engine = make(deterministic=True, max_batch=data.draw(st.integers(1, 6)), prefill_chunk=16)
    Watch(engine)
    seq = engine.add_prompt(prompt(length))
    engine.submit(seq, SamplingParams(n), 5)
    got = {}
    while engine.has_work():
        got.update({e.seq: e for e in engine.step()})
        if len(engine.scheduler.by_seq) < 8 and seq not in got and data.draw(st.booleans()):
            child = engine.fork(seq, data.draw(st.integers(1, engine.length(seq))))
            engine.submit(child, SamplingParams(data.draw(st.integers(1, 9))), child)
    assert got[seq] == wanted
    check_tree(engine.tree)


@settings(max_examples=15, deadline=None)
@given(length=st.integers(1, 40), n=st.integers(2, 30), data=st.data())
def test_teacher_forcing_the_parents_tokens_gives_the_parents_logprobs(length, n, data):
    engine = make()
    seq = engine.add_prompt(prompt(length))
    engine.submit(seq, SamplingParams(n), 1)
    event = finish(engine)[seq]
    at = data.draw(st.integers(1, length + n - 1))
    child = engine.fork(seq, at)
    engine.append(child, engine.tokens(seq)[at:])
    scored = engine.score([child])[0]
    np.testing.assert_allclose(scored.logprobs[-n:], event.logprobs, atol=2e-5, rtol=1e-5)
    np.testing.assert_allclose(scored.entropy[-n:], event.entropy, atol=2e-5, rtol=1e-5)


# -- deterministic mode ----------------------------------------------------------------------------

WANTED = grow(make(deterministic=True))


@settings(max_examples=10, deadline=None)
@given(
    shuffle=st.integers(0, 2**20),
    preempt=st.sampled_from([0.0, 0.1, 0.3]),
    cold=st.booleans(),
    max_batch=st.integers(1, 9),
    prefill_chunk=st.integers(1, 70),
    kv_tokens=st.sampled_from([None, 128, 400]),
)
def test_same_bits_in_every_circumstance(
    shuffle, preempt, cold, max_batch, prefill_chunk, kv_tokens
):
    engine = make(
        deterministic=True, max_batch=max_batch, prefill_chunk=prefill_chunk, kv_tokens=kv_tokens
    )
    assert grow(engine, shuffle, preempt, cold) == WANTED
    check_tree(engine.tree)


# -- versions --------------------------------------------------------------------------------------


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 2**20), kv_tokens=st.sampled_from([None, 480]))
def test_no_read_of_old_blocks(seed, kv_tokens):
    """Random work across weight changes; what was freed is NaN; results are those of the weights of
    the moment.
    """
    rng = random.Random(seed)
    engine = make(max_batch=4, prefill_chunk=16, kv_tokens=kv_tokens)
    Watch(engine)
    version, live = 0, [engine.add_prompt(prompt(30, i)) for i in range(3)]
    for _ in range(12):
        model = MODELS[version % 2]
        usable = [seq for seq in live if not engine.tree.stale(seq) and engine.length(seq) < 90]
        for seq in usable[-3:]:
            child = engine.fork(seq, rng.randint(1, engine.length(seq)))
            live.append(child)
            engine.submit(child, SamplingParams(rng.randint(1, 8)), rng.randrange(99))
        for seq, event in finish(engine).items():
            assert event.policy_version == version
            logp = dense(model, engine.tokens(seq))[0][-len(event.token_ids) :]
            np.testing.assert_allclose(event.logprobs, logp, atol=3e-5)
        if rng.random() < 0.6:
            version += 1
            engine.load_weights(MODELS[version % 2].named_parameters(), version)
            assert engine.stats()["blocks_used"] == 0
            stale = [seq for seq in live if engine.tree.stale(seq)]
            for seq in stale[:2]:
                with pytest.raises(StaleWeightsError):
                    engine.fork(seq, engine.length(seq))
            some = rng.sample(live, min(2, len(live)))
            for seq, scored in zip(some, engine.score(some)):
                logp = dense(MODELS[version % 2], engine.tokens(seq))[0]
                np.testing.assert_allclose(scored.logprobs, logp, atol=3e-5)
        check_tree(engine.tree)


# -- what is drawn ---------------------------------------------------------------------------------


def siblings(seeds) -> tuple[list[int], np.ndarray]:
    """The next token of as many forks of one prompt, and the distribution they come from."""
    engine = make(max_batch=64)
    ids = PROMPTS[0]
    root = engine.add_prompt(ids)
    seqs = [engine.fork(root, len(ids)) for _ in seeds]
    for seq, seed in zip(seqs, seeds):
        engine.submit(seq, SamplingParams(1), seed)
    events = finish(engine)
    with torch.no_grad():
        p = torch.softmax(MODELS[0](torch.tensor([ids])).logits[0, -1].double(), -1).numpy()
    for event in events.values():  # brute force over the vocabulary
        assert event.logprobs[0] == pytest.approx(np.log(p[event.token_ids[0]]), abs=2e-5)
        assert event.entropy[0] == pytest.approx(-(p * np.log(p)).sum(), abs=2e-5)
    return [events[seq].token_ids[0] for seq in seqs], p


def surprise(tokens: list[int], p: np.ndarray) -> float:
    """Standard deviations by which neighbours are equal more or less often than independent draws."""
    pairs = list(zip(tokens[::2], tokens[1::2]))
    same, chance = sum(a == b for a, b in pairs), float((p**2).sum())
    return abs(same - len(pairs) * chance) / np.sqrt(len(pairs) * chance * (1 - chance))


def test_siblings_draw_independently_from_the_right_distribution():
    seeds = [derive_seed(0, 1, "task", branch) for branch in range(1000)]
    tokens, p = siblings(seeds)
    assert surprise(tokens, p) < 4
    counts = np.bincount(tokens, minlength=VOCAB)
    often = p > 5 / len(seeds)
    chi2 = ((counts[often] - len(seeds) * p[often]) ** 2 / (len(seeds) * p[often])).sum()
    assert chi2 < often.sum() + 5 * np.sqrt(2 * often.sum())


# -- liveness and cost -----------------------------------------------------------------------------


@settings(max_examples=10, deadline=None)
@given(
    lines=st.integers(1, 12),
    turns=st.integers(1, 4),
    max_batch=st.integers(1, 8),
    blocks=st.integers(7, 20),
    seed=st.integers(0, 999),
)
def test_every_line_ends_however_small_the_pool(lines, turns, max_batch, blocks, seed):
    """All leaves come to wait for tools at once, again and again, in a pool that holds few of them:
    no deadlock.
    """
    engine = make(kv_tokens=16 * blocks, max_batch=max_batch, prefill_chunk=32)
    rng = random.Random(seed)
    roots = [engine.add_prompt(prompt(rng.randint(1, 30), i)) for i in range(1 + lines // 4)]
    seqs = [engine.fork(root := rng.choice(roots), engine.length(root)) for _ in range(lines)]
    for turn in range(turns):
        for seq in seqs:
            engine.submit(seq, SamplingParams(8, stop=lambda t: t % 4 == 0), seed=seq)
        budget = 30 * lines
        while engine.has_work() and budget:
            engine.step()
            budget -= 1
        assert budget, "no end in sight"
        for seq in seqs:
            engine.append(seq, prompt(rng.randint(1, 6), turn))
    assert engine.stats()["blocks_peak"] <= blocks
    check_tree(engine.tree)


@settings(max_examples=15, deadline=None)
@given(data=st.data(), length=st.integers(1, 50), roots=st.integers(1, 5))
def test_counters_are_those_of_the_realised_tree(data, length, roots):
    """prefill = prompt once + one row per fork + tool results; decode = what was drawn, less the
    last of each stretch.
    """
    engine = make(
        prefill_chunk=data.draw(st.integers(1, 64)), max_batch=data.draw(st.integers(1, 8))
    )
    root = engine.add_prompt(prompt(length))
    prefill, decode = length - 1, 0
    seqs = [engine.fork(root, length) for _ in range(roots)]
    branches = []
    for stage in (seqs, branches):
        for seq in stage:
            n = data.draw(st.integers(1, 12))
            engine.submit(seq, SamplingParams(n), seq)
            prefill, decode = prefill + 1, decode + n - 1
        finish(engine)
        for seq in stage:
            if data.draw(st.booleans()):  # a tool result: run with the token drawn before it
                tool, n = data.draw(st.integers(1, 20)), data.draw(st.integers(1, 5))
                engine.append(seq, prompt(tool))
                engine.submit(seq, SamplingParams(n), seq + 1)
                prefill, decode = prefill + 1 + tool, decode + n - 1
        finish(engine)
        if stage is seqs:
            branches += [
                engine.fork(seq, data.draw(st.integers(length, engine.length(seq))))
                for seq in seqs
                for _ in range(2)
            ]
    stats = engine.stats()
    assert (stats["prefill_tokens"], stats["decode_tokens"]) == (prefill, decode)
    alone = sum(engine.length(seq) - 1 for seq in (*seqs, *branches))
    assert stats["tokens_saved"] == alone - prefill - decode
    assert stats["forks"] == roots * 3


# -- seeded faults ---------------------------------------------------------------------------------


def decoding(plain: bool = True) -> NativeEngine:
    """Two forks of a prompt in the middle of decoding, watched."""
    engine = make_plain() if plain else make()
    Watch(engine)
    root = engine.add_prompt(prompt(40))
    for i in range(2):
        engine.submit(engine.fork(root, 40), SamplingParams(30), i)
    for _ in range(4):
        engine.step()
    check_tree(engine.tree)
    return engine


def test_a_block_freed_early_is_noticed():
    engine = decoding()
    shared = engine.tree.nodes[0]
    engine.tree.blocks.give_back(shared.blocks[1:2], shared.id, defer=False)
    with pytest.raises(EngineError, match="block"):
        check_tree(engine.tree)
    with pytest.raises(
        (AssertionError, EngineError)
    ):  # not finite: the watch had filled it with NaN
        engine.step()


def test_a_slot_of_somebody_else_is_noticed():
    engine = decoding()
    plan = engine.tree.plan

    def damaged(*args):
        layout = plan(*args)
        layout.slots[-1] = engine.tree.nodes[0].slot(3)
        return layout

    engine.tree.plan = damaged
    with pytest.raises(AssertionError, match="of others"):
        engine.step()


def test_kv_overwritten_behind_the_scenes_is_noticed():
    engine = decoding(plain=False)
    inner = engine.runner.inner
    forward = inner.forward

    def damaging(layout, rows):
        hidden = forward(layout, rows)
        shape = (1, inner.pool.kv_heads, inner.pool.head_dim)
        inner.pool.write(1, torch.ones(shape), torch.ones(shape), torch.tensor([5]))
        return hidden

    inner.forward = damaging
    with pytest.raises(AssertionError, match=r"slots \[5\] were overwritten"):
        engine.step()


def test_siblings_that_share_a_seed_are_noticed():
    tokens, p = siblings([derive_seed(0, 1, "task", branch // 2) for branch in range(200)])
    assert surprise(tokens, p) > 8


def test_a_read_of_an_old_version_is_noticed():
    engine = make_plain()
    seq = engine.add_prompt(prompt(20))
    engine.submit(seq, SamplingParams(3), 0)
    finish(engine)
    engine.tree.new_version = lambda version: setattr(engine.tree, "version", version)
    engine.load_weights(MODELS[1].named_parameters(), 1)
    engine.submit(seq, SamplingParams(3), 0)
    with pytest.raises(StaleWeightsError, match="holds KV of version 0"):
        engine.step()
