"""Random lives of sequences against a shadow model that only knows lists of token ids."""

import random
import tempfile
from pathlib import Path

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import VOCAB, build, dense, finish

from appo.rollout.engine import SamplingParams
from appo.rollout.native import NativeEngine

torch.set_num_threads(1)
_FOLDER = tempfile.TemporaryDirectory()
MODEL = build("llama", Path(_FOLDER.name))


def run_life(seed: int, max_batch: int, chunk: int, steps: int, native: bool) -> None:
    rng = random.Random(seed)
    engine = NativeEngine(
        Path(_FOLDER.name), dtype="float32", max_batch=max_batch, prefill_chunk=chunk
    )
    engine.store.native &= native  # attention in C++ where it can run, or its definition
    shadow: dict[
        int, list[int]
    ] = {}  # handle -> ids known to be there before what is being decoded
    running: dict[int, list[int]] = {}

    def ids(low: int, high: int) -> list[int]:
        return [rng.randrange(VOCAB) for _ in range(rng.randint(low, high))]

    def note(events) -> None:
        for event in events:
            before = running.pop(event.seq)
            shadow[event.seq] = before + event.token_ids
            logp, entropy = dense(MODEL, shadow[event.seq])
            n = len(event.token_ids)
            np.testing.assert_allclose(event.logprobs, logp[-n:], atol=2e-5)
            np.testing.assert_allclose(event.entropy, entropy[-n:], atol=2e-5)

    common = ids(20, 20)
    for _ in range(steps):
        live = list(shadow)
        idle = [s for s in live if s not in running]
        action = rng.choice(
            ("prompt", "fork", "fork", "submit", "submit", "append", "cancel", "release", "score")
        )
        if action == "prompt" or not live:
            new = (common[: rng.randint(0, 20)] + ids(1, 30)) if rng.random() < 0.7 else ids(1, 10)
            shadow[engine.add_prompt(new)] = new
        elif action == "fork":
            parent = rng.choice(live)
            at = rng.randint(1, engine.length(parent))
            child = engine.fork(parent, at)
            shadow[child] = engine.tokens(parent)[:at]
        elif action == "submit" and idle:
            seq = rng.choice(idle)
            if engine.length(seq) < 200:
                running[seq] = shadow[seq]
                engine.submit(seq, SamplingParams(rng.randint(1, 12)), seed=rng.randrange(2**40))
        elif action == "append" and idle:
            seq = rng.choice(idle)
            if engine.length(seq) < 200:
                tool = ids(1, 20)
                engine.append(seq, tool)
                shadow[seq] = shadow[seq] + tool
        elif action == "cancel" and running:
            seq = rng.choice(list(running))
            engine.cancel(seq)
            shadow[seq] = running.pop(seq)
        elif action == "release":
            seq = rng.choice(live)
            engine.release(seq)
            shadow.pop(seq)
            running.pop(seq, None)
        elif action == "score" and idle:
            some = rng.sample(idle, min(3, len(idle)))
            for seq, scored in zip(some, engine.score(some)):
                np.testing.assert_allclose(scored.logprobs, dense(MODEL, shadow[seq])[0], atol=2e-5)
        for _ in range(rng.randint(0, 4)):
            note(engine.step())
        assert engine.store.tokens == sum(node.kv for node in engine.tree.nodes.values())
        for seq in shadow:
            if seq not in running:
                assert engine.tokens(seq) == shadow[seq]
    note(finish(engine).values())
    assert not running
    for seq in list(shadow):
        engine.release(seq)
    stats = engine.stats()
    assert [stats[k] for k in ("kv_tokens", "live_nodes", "live_sequences")] == [0, 0, 0]
    assert engine.store.block_tokens == 0 and not any(engine.store.owner)


@settings(max_examples=12, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    max_batch=st.sampled_from([1, 2, 5, 8]),
    chunk=st.sampled_from([1, 3, 16, 64]),
    native=st.booleans(),
)
def test_random_lives(seed, max_batch, chunk, native):
    run_life(seed, max_batch, chunk, steps=30, native=native)


def test_ten_thousand_forks_leak_nothing():
    engine = NativeEngine(Path(_FOLDER.name), dtype="float32", max_batch=4)
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
    assert stats["forks"] == 10_000 and stats["kv_tokens"] == stats["live_nodes"] == 0
