"""A rollout engine that kept one old tensor: found by name where the engine is honest, by the probe where it is not.

The engine is the native one, on the tiny model after one update at the recipe's learning rate (7e-4), each of its 35
tensors left out in turn. What was seen (largest and mean difference of the probe's log-probs):

float32   healthy 6e-6; weakest matrix above 3e-3; two norm vectors of 16 numbers 6e-4, below the limit of 1e-3
bfloat16  healthy 0.05 and 0.01; the mean passes the limit of 0.15 for 4 of 35 tensors after one update, for none after
          another

So in float32 the probe finds every matrix, and in bfloat16 it finds gross errors only: there the names decide.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.tiny_runs import finish, start, steps

from appo.config import LearnerConfig, RunContext
from appo.errors import LearnerError
from appo.learner import Learner, push
from appo.learner.checkpoint import load_latest
from appo.packing.pack import PackedBatch, pack_sequences
from appo.rollout.native import NativeEngine
from appo.types import Counts

TINY = Path(__file__).parents[2] / "appo" / "models" / "tiny_qwen3"
PROBES = [np.random.default_rng(i).integers(5, 300, 40).tolist() for i in range(2)]


class LossyEngine:
    """The native engine, with the old value of tensor `lost` whatever it is given. honest: it knows."""

    def __init__(self, dtype: str, old: dict[str, torch.Tensor]):
        self.engine, self.old = NativeEngine(TINY, dtype=dtype), old
        self.lost, self.honest = "", False

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)

    @property
    def loaded(self) -> set[str]:
        return self.engine.loaded - {self.lost if self.honest else ""}

    def load_weights(self, tensors: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        self.engine.load_weights(
            ((n, self.old[n] if n == self.lost else t) for n, t in tensors), version
        )


def loss_fn(stats: Any, batch: PackedBatch, counts: Counts) -> tuple[torch.Tensor, dict]:
    logp = torch.where(batch.mask, stats.logp, 0.0)
    return -(logp * batch.advantage).sum() / counts.tokens, {}


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def pair(request: pytest.FixtureRequest) -> Iterator[tuple[Learner, LossyEngine]]:
    """A learner one update ahead of its engine."""
    settings = LearnerConfig(lr=7e-4, betas=[0.9, 0.95])
    with Learner(TINY, settings, seed=0, context=RunContext(dtype=request.param)) as learner:
        engine = LossyEngine(request.param, {n: t.clone() for n, t in learner.named_weights()})
        rng = np.random.default_rng(0)
        batch = pack_sequences([rng.integers(5, 300, 30).tolist() for _ in range(4)])
        batch.advantage += torch.from_numpy(rng.normal(size=batch.advantage.shape)).float()
        learner.train_minibatch([batch], Counts(116.0, 4.0, 4.0), loss_fn)
        yield learner, engine


def unseen(learner: Learner, engine: LossyEngine, honest: bool, words: str) -> list[str]:
    """Tensors whose loss does not stop a push. The others must be refused with `words`."""
    out, engine.honest = [], honest
    for version, name in enumerate(engine.old, engine.policy_version + 1):
        engine.lost = name
        try:
            push(learner, engine, version, PROBES)
            out.append(name)
        except LearnerError as error:
            assert words in str(error), error
    engine.lost = ""
    push(learner, engine, engine.policy_version + 1, PROBES)  # with nothing lost all is well
    return out


def test_what_the_probe_finds_in_an_engine_that_does_not_know(
    pair: tuple[Learner, LossyEngine],
) -> None:
    learner, engine = pair
    missed = unseen(learner, engine, False, "A tensor did not arrive or was loaded wrongly")
    if learner.context.dtype == "float32":
        assert all(n.endswith(("q_norm.weight", "k_norm.weight")) for n in missed), missed
    else:  # nothing to be proud of; docs/reliability.md says it, and the test below is the answer
        assert len(missed) > len(engine.old) // 2


def test_an_engine_that_knows_is_found_out_by_name(pair: tuple[Learner, LossyEngine]) -> None:
    assert unseen(*pair, True, "tensors did not arrive in the engine") == []


LOSE_ONE = """
from appo.rollout.native import NativeEngine
load = NativeEngine.load_weights
def lossy(self, tensors, version):
    load(self, ((n, t * 0.99 if "layers.1.mlp.up_proj" in n and version > 2 else t) for n, t in tensors), version)
NativeEngine.load_weights = lossy
"""


@pytest.mark.timeout(200)
def test_a_run_stops_before_it_samples_from_stale_weights(tmp_path: Path) -> None:
    run = tmp_path / "run"
    status, said = finish(start("steps=4", "eval.questions=0", f"output={run}", code=LOSE_ONE))
    assert status == 1 and "engine and learner disagree after push of policy version 3" in said
    assert "Traceback" not in said and f"resume={run}" in said
    assert steps(run) == load_latest(run)[1]["step"] == 1  # two updates a step: the third is step 2
