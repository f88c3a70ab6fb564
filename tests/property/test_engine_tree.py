"""Random lives of sequences against a shadow model that only knows lists of token ids, with memory
watched throughout.
"""

import random
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.engine_watch import Watch
from support.tiny_models import VOCAB, build, dense, finish

from appo.rollout.engine import SamplingParams
from appo.rollout.native import NativeEngine
from appo.rollout.native import engine as engine_module
from appo.rollout.native.requests import SequenceState
from appo.rollout.native.tree.integrity import check_tree
from appo.rollout.native.tree.segment_tree import SegmentTree

torch.set_num_threads(1)
_FOLDER = tempfile.TemporaryDirectory()
MODEL = build("llama", Path(_FOLDER.name))
LONGEST = 100  # tokens
PATIENCE = 400  # steps after which a sequence that has not run counts as starved


def make(plain: bool = False, **options) -> NativeEngine:
    """plain: the definitions, layers, attention and tree, in PyTorch and Python."""
    options = {"dtype": "float32", "runner": "torch" if plain else "auto"} | options
    with pytest.MonkeyPatch.context() as m:
        if plain:
            m.setattr(engine_module, "make_tree", SegmentTree)
        return NativeEngine(Path(_FOLDER.name), **options)


class Life:
    """One engine, one shadow: handle → ids known to be there before what is being decoded."""

    def __init__(self, seed: int, **options):
        self.rng = random.Random(seed)
        self.engine = make(**options)
        self.watch = Watch(self.engine)
        self.shadow: dict[int, list[int]] = {}
        self.running: dict[
            int, tuple[list[int], float, int]
        ] = {}  # at submit: ids, temperature, engine steps
        self.common = self.ids(20, 20)

    def ids(self, low: int, high: int) -> list[int]:
        return [self.rng.randrange(VOCAB) for _ in range(self.rng.randint(low, high))]

    def short(self, seqs) -> list[int]:
        return [s for s in seqs if s not in self.running and len(self.shadow[s]) < LONGEST - 20]

    def step(self) -> None:
        for event in self.engine.step():
            before, temperature, _ = self.running.pop(event.seq)
            self.shadow[event.seq] = before + event.token_ids
            logp, entropy = dense(MODEL, self.shadow[event.seq], temperature)
            n = len(event.token_ids)
            np.testing.assert_allclose(event.logprobs, logp[-n:], atol=3e-5)
            np.testing.assert_allclose(event.entropy, entropy[-n:], atol=3e-5)
        now = self.engine.stats()["steps"]
        starved = [s for s, (_, _, since) in self.running.items() if now - since > PATIENCE]
        assert not starved, f"sequences {starved} do not get their turn"

    def act(self) -> None:
        rng, engine, live = self.rng, self.engine, list(self.shadow)
        action = rng.choice(
            ("prompt", "fork", "fork", "submit", "submit", "submit", "append", "cancel", "release", "score", "preempt")
        )  # fmt: skip
        idle = self.short(live)
        if action == "prompt" or not live:
            share = rng.random() < 0.7
            new = (self.common[: rng.randint(0, 20)] if share else []) + self.ids(1, 30)
            self.shadow[engine.add_prompt(new)] = new
        elif action == "fork":
            parent = rng.choice(live)
            at = rng.randint(1, engine.length(parent))
            ids = engine.tokens(parent)[:at]
            self.shadow[engine.fork(parent, at)] = ids
        elif action == "submit" and idle:
            seq = rng.choice(idle)
            temperature = rng.choice((0.7, 1.0))
            params = SamplingParams(rng.randint(1, 12), temperature)
            engine.submit(seq, params, seed=rng.randrange(2**40))
            self.running[seq] = self.shadow[seq], temperature, engine.stats()["steps"]
        elif action == "append" and idle:
            seq = rng.choice(idle)
            tool = self.ids(1, 20)
            engine.append(seq, tool)
            self.shadow[seq] = self.shadow[seq] + tool
        elif action == "cancel" and self.running:
            seq = rng.choice(list(self.running))
            engine.cancel(seq)
            self.running.pop(seq)
        elif action == "release":
            seq = rng.choice(live)
            engine.release(seq)
            del self.shadow[seq]
            self.running.pop(seq, None)
        elif action == "score" and idle:
            some = rng.sample(idle, min(2, len(idle)))
            for seq, scored in zip(some, engine.score(some)):
                logp = dense(MODEL, self.shadow[seq])[0]
                np.testing.assert_allclose(scored.logprobs, logp, atol=3e-5)
        elif action == "preempt" and engine.scheduler.active:
            engine.preempt(rng.choice(engine.scheduler.active).seq)

    def check(self) -> None:
        engine = self.engine
        check_tree(engine.tree)
        for seq, ids in self.shadow.items():
            if seq in self.running:
                assert engine.state(seq) in (
                    SequenceState.WAITING,
                    SequenceState.PREFILL,
                    SequenceState.DECODE,
                )
                assert engine.tokens(seq)[: len(ids)] == ids
            else:
                assert engine.tokens(seq) == ids
        stats = engine.stats()
        assert stats["blocks_used"] <= stats["blocks_peak"]
        assert stats["kv_tokens"] <= 16 * stats["blocks_used"]

    def end(self) -> None:
        while self.engine.has_work():
            self.step()
        assert not self.running
        for seq in list(self.shadow):
            self.engine.release(seq)
        check_tree(self.engine.tree)
        stats = self.engine.stats()
        names = ("blocks_used", "kv_tokens", "live_nodes", "live_sequences", "kv_bytes")
        assert [stats[k] for k in names] == [0] * 5


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    max_batch=st.sampled_from([1, 2, 5, 8]),
    prefill_chunk=st.sampled_from([1, 3, 16, 64]),
    kv_tokens=st.sampled_from([None, 320, 640]),  # the smallest holds little more than one sequence
    plain=st.booleans(),
)
def test_random_lives(seed, max_batch, prefill_chunk, kv_tokens, plain):
    life = Life(
        seed, max_batch=max_batch, prefill_chunk=prefill_chunk, kv_tokens=kv_tokens, plain=plain
    )
    for _ in range(30):
        life.act()
        for _ in range(life.rng.randint(0, 4)):
            life.step()
        life.check()
    life.end()


def test_ten_thousand_forks_leak_nothing():
    engine = make(max_batch=4)
    prompt = engine.add_prompt(list(range(30)))
    engine.submit(prompt, SamplingParams(5), seed=0)
    finish(engine)
    rng = random.Random(0)
    live = [prompt]
    for _ in range(10_000):
        parent = rng.choice(live)
        live.append(engine.fork(parent, rng.randint(1, engine.length(parent))))
        if len(live) > 50:
            engine.release(live.pop(rng.randrange(1, len(live))))
    for seq in live:
        engine.release(seq)
    stats = engine.stats()
    assert stats["forks"] == 10_000 and stats["blocks_used"] == stats["live_nodes"] == 0
