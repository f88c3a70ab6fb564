"""Engines over the fake vLLM, and short ways to draw with them."""

import numpy as np
import torch
from support.fake_vllm import VOCAB, WIDTH, api

from appo.rollout.engine import SamplingParams
from appo.rollout.vllm import VLLMEngine

PROMPT = np.random.default_rng(3).integers(0, VOCAB, 70).tolist()
OTHER = [*PROMPT[:-1], (PROMPT[-1] + 1) % VOCAB]


def table(seed):
    return torch.randn(VOCAB, WIDTH, generator=torch.Generator().manual_seed(seed)) * 0.45


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
