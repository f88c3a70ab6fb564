"""A small tree of rollouts that can be grown in many ways.

Other arrival, forced preemption, a cold cache.
"""

from __future__ import annotations

import random

import numpy as np
from support.tiny_models import VOCAB

from appo.rollout.engine import SamplingParams

PROMPTS = [np.random.default_rng(i).integers(0, VOCAB, 20 + 7 * i).tolist() for i in range(4)]
Sampled = tuple[int, float, float]  # token, logprob, entropy


def grow(
    engine, shuffle: int = 0, preempt: float = 0.0, cold: bool = False
) -> dict[tuple[int, ...], list[Sampled]]:
    """Two roots a prompt, a tool result in one of them, two branches each: what was drawn, by path.

    shuffle  seed of the order in which everything is asked for · preempt: chance of each running
             sequence, per step
    cold     drop all KV between the stages
    """
    rng = random.Random(shuffle)
    out: dict[tuple[int, ...], list[Sampled]] = {}

    def run(lines: dict[tuple[int, ...], tuple[int, int]]) -> None:
        """Sample path → (sequence, tokens), submitted a few at a time."""
        todo = list(lines)
        rng.shuffle(todo)
        path_of = {seq: path for path, (seq, _) in lines.items()}
        while todo or engine.has_work():
            for _ in range(rng.randint(1, len(todo)) if todo else 0):
                path = todo.pop()
                seq, n = lines[path]
                engine.submit(seq, SamplingParams(n, temperature=0.9), hash(path))
            for event in engine.step():
                sampled = zip(event.token_ids, event.logprobs, event.entropy)
                out.setdefault(path_of[event.seq], []).extend(sampled)
            for going in list(engine.scheduler.active):
                if rng.random() < preempt:
                    engine.preempt(going.seq)
        for seq in list(engine.scheduler.idle) if cold else ():
            engine.tree.evict(seq, {})

    order = list(range(len(PROMPTS)))
    rng.shuffle(order)
    prompts = {i: engine.add_prompt(PROMPTS[i]) for i in order}
    roots = {(i, r): engine.fork(prompts[i], len(PROMPTS[i])) for i in order for r in range(2)}
    run({path: (seq, 5 + path[1] * 4) for path, seq in roots.items()})
    again = {path: seq for path, seq in roots.items() if path[1]}
    for seq in again.values():
        engine.append(seq, [3, 1, 4, 1, 5])
    run({path: (seq, 6) for path, seq in again.items()})
    branches = {
        (*path, b): engine.fork(seq, len(PROMPTS[path[0]]) + 3 + b)
        for path, seq in roots.items()
        for b in range(2)
    }
    run({path: (seq, 8) for path, seq in branches.items()})
    return out
