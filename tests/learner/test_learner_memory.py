"""What one micro-batch needs: memory that grows with the unique tokens of its stream and not with the vocabulary."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from support.learner_forest import model_node, objective, write_model

from appo.config import LearnerConfig, LoraConfig, RunContext
from appo.learner.learner import Learner
from appo.packing.pack import PackedBatch, pack, pack_sequences
from appo.types import Counts, Credit, Leaf, Node, RolloutTree, Task

torch.set_num_threads(1)


def peak_bytes(work: Callable[[], object]) -> int:
    """The most that torch's CPU allocator held at a time during `work`, beyond what it held before."""
    gc.collect()
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as prof:
        work()
    events = [e for e in prof.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = np.cumsum([e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())])
    return int(held.max())


def learner_of(path: Path, vocab: int) -> Learner:
    """Adapters only: a gradient of the embedding, [V, H], is a matter of the parameters, not of the tokens."""
    settings = LearnerConfig(mode="lora", lora=LoraConfig(r=4), lr=1e-4)
    return Learner(
        write_model(path / str(vocab), vocab=vocab),
        settings,
        seed=0,
        context=RunContext(dtype="float32"),
    )


def sequences(tokens: int) -> PackedBatch:
    return pack_sequences([[(7 * i) % 89 for i in range(tokens // 4)]] * 4)


def measured(learner: Learner, batch: PackedBatch) -> int:
    counts = Counts(float(batch.mask.sum()), len(batch.rows), len(batch.rows))
    learner.train_minibatch([batch], counts, objective)  # what is made once is made now
    return peak_bytes(lambda: learner.accumulate([batch], counts, objective, 1))


def test_the_meter_sees_a_logit_matrix() -> None:
    h, w = torch.randn(600, 16), torch.randn(8192, 16)
    assert peak_bytes(lambda: torch.log_softmax(h @ w.T, 1)) >= 2 * 600 * 8192 * 4


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Learner:
    return learner_of(tmp_path_factory.mktemp("small"), 97)


def test_memory_is_linear_in_tokens(small: Learner) -> None:
    one, two, four = (measured(small, sequences(t)) for t in (512, 1024, 2048))
    assert 0.9 < (four - two) / (2 * (two - one)) < 1.1


def test_memory_does_not_depend_on_the_vocabulary(small: Learner, tmp_path: Path) -> None:
    tokens, vocab = 1024, 8192
    with learner_of(tmp_path, vocab) as large:
        grown = measured(large, sequences(tokens)) - measured(small, sequences(tokens))
    assert grown < 0.05 * tokens * vocab * 4  # one float32 logit matrix


def test_rows_that_share_tokens_cost_what_the_shared_tokens_cost(small: Learner) -> None:
    """Nine rows over one root: 6 times as many tokens in rows as in the stream."""
    nodes = [Node(None, "prompt", 0, list(range(20))), model_node(0, 20, 400, 1)]
    nodes += [model_node(1, 380, 20, 2 + i) for i in range(8)]
    leaves = [Leaf(1, 0)] + [Leaf(2 + i, 0, i) for i in range(8)]
    tree = RolloutTree(Task("t", [], None), nodes, leaves)
    credits = [
        Credit(i, np.ones(len(tree.trajectory(i))), tree.trajectory(i).mask.copy())
        for i in range(9)
    ]
    (batch,) = pack([tree], [credits], token_budget=10_000)
    assert batch.total_tokens > 6 * batch.unique_tokens
    shared, alone = measured(small, batch), measured(small, sequences(batch.unique_tokens))
    assert shared < 1.25 * alone
