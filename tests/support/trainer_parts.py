"""A whole trainer without a model.

Scripted engine, instant tools, a learner that computes the loss and changes nothing.
"""

from __future__ import annotations

import time
import zlib

import torch
from support.fakes import EOS, ByteTokenizer, InstantPool, ScriptedEngine

from appo.algo.objective import make_objective
from appo.algo.presets import ALGORITHMS
from appo.kernels import LogProbEntropy
from appo.rollout.agent import AgentSettings
from appo.rollout.sampler import Rollouts
from appo.rollout.tags import TokenText
from appo.trainer.trainer import Trainer
from appo.types import Task

TEXT = TokenText(ByteTokenizer())
SIZE = 4  # prompts per step
MINIBATCHES = 2


def script(ids, seed):
    """Some letters that differ by line, a tool call, an answer."""
    own = bytes(i for i in ids[ids.index(10) + 1 :] if i < 256)  # the prompt ends with a line break
    letters = "".join(chr(97 + (seed >> 5 * i) % 26) for i in range(1 + seed % 4))
    turns = (f"{letters} <python>{seed % 10}</python>", f"so <answer>{seed % 3}</answer>")
    turn = turns[min(own.count(b"</result>"), 1)]
    at = len(own.rsplit(b"</result>\n", 1)[-1])
    return EOS if at >= len(turn) else turn.encode()[at]


class SlowEngine(ScriptedEngine):
    """Sleeps in every forward."""

    def __init__(self, sleep=0.0):
        super().__init__(script)
        self.sleep = sleep

    def step(self):
        time.sleep(self.sleep)
        return super().step()


class FixedLearner:
    """Log-probs that a version shifts by a little.

    `during` is called in the middle of every mini-batch.
    """

    def __init__(self, during=lambda: None):
        self.during, self.batches = during, []

    def old_logprobs(self, batches):
        return [torch.where(b.mask, b.behavior_logp + 0.01, 0.0) for b in batches]

    def train_minibatch(self, batches, counts, objective):
        self.during()
        self.batches.append(batches)
        sums = {}
        for b in batches:
            logp = torch.where(b.mask, b.behavior_logp + 0.02, 0.0).requires_grad_()
            _, metrics = objective(LogProbEntropy(logp, torch.ones_like(logp), logp), b, counts)
            for name, (s, n) in metrics.items():
                have = sums.get(name, (0.0, 0.0))
                sums[name] = (have[0] + float(s), have[1] + float(n))
        means = {name: s / n if n else 0.0 for name, (s, n) in sums.items()}
        empty = {"learner/empty": float(not batches), "learner/nonfinite": 0.0}
        return means | empty | {"learner/micro_batches": float(len(batches))}


def grade(trees):
    for tree in trees:
        for leaf in tree.leaves:
            assert leaf.finish is not None
            leaf.reward = float(zlib.crc32(str(tree.path_ids(leaf.node)).encode()) % 2)
            leaf.reward_parts = {"accuracy": leaf.reward, "format_ok": 1.0}
    return {"grade/errors": 0.0}


def batch_of(step):
    """The prompts of a step, by its number alone."""
    tasks = [Task(f"t{step}-{i}", [], "1", ("python",)) for i in range(SIZE)]
    return tasks, [list(f"question {t.task_id}\n".encode()) for t in tasks]


def make_trainer(*, engine=None, learner=None, **settings):
    engine = engine or SlowEngine()
    agent = AgentSettings(max_new_tokens=60, max_tool_calls=2, tools=("python",))
    sampler = Rollouts(engine, TEXT, InstantPool(), agent, run_seed=7, deterministic=True)
    trainer = Trainer(
        algo=ALGORITHMS["appo"],
        sampler=sampler,
        learner=learner or FixedLearner(),
        objective=make_objective(
            ALGORITHMS["appo"],
            version=lambda: trainer.version,
            old_logp_version=lambda: trainer.old_logp_version,
        ),
        grade=grade,
        push=lambda version: engine.load_weights([], version) or {"push/tensors": 1.0},
        token_budget=4096,
        minibatches=MINIBATCHES,
        **settings,
    )
    return trainer


def run_steps(trainer, steps, last):
    """Steps first … last of a run that ends with `last`; → their results."""
    results = []
    for number in steps:
        for ahead in trainer.missing(number, last):
            trainer.prefetch(ahead, *batch_of(ahead))
        coming = number + trainer.staleness
        results.append(trainer.step(number, *(batch_of(coming) if coming <= last else ([], []))))
    return results
