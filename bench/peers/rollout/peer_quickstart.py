"""Training steps of a recipe without the learner.

The phases that the engine runs, for any checkout of the package.

    PYTHONPATH=checkout python peer_quickstart.py '{"recipe": "quickstart", "threads": 2}'

The trainer is the package's own; its learner does nothing, and a push loads the weights that are
there as a new version, so that the second mini-batch is scored again before it branches, as in
training.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import appo
from appo.config import load_config
from appo.data.tasks import Cursor
from appo.observability.progress import Console
from appo.rollout.native.model.weights import read_tensors
from appo.run.plan import plan, tasks_of
from appo.run.session import Session
from appo.trainer.trainer import Trainer

sys.path.append(str(Path(__file__).resolve().parents[3]))  # the checkout, for `bench`

from bench.peers.rollout.serve import serve

PHASES = ("rollout", "score", "branch", "reward", "push")


class NoLearner:
    def train_minibatch(self, *_: Any) -> dict[str, float]:
        return {"learner/empty": 0.0, "learner/nonfinite": 0.0, "learner/micro_batches": 0.0}

    def old_logprobs(self, batches: Sequence[Any]) -> list[Any]:
        return [batch.behavior_logp for batch in batches]


class Steps:
    """A peer of `serve` that answers {"do": "phases"}."""

    computes, version, rows = "", f"appo {appo.__version__}", 0

    def __init__(self, settings: dict[str, Any]):
        overrides = [f"threads={settings['threads']}", "eval.questions=0"]
        cfg = load_config(settings["recipe"], overrides)
        p = plan(cfg, Console(plain=True), need_output=False)
        self.cfg, self.session = cfg, Session(p, Console(plain=True))
        self.cursor = Cursor(tasks_of(cfg, "train"))
        self.trainer = Trainer(
            algo=p.algo,
            sampler=self.session.rollouts,
            learner=NoLearner(),
            objective=None,
            grade=self.session.grade,
            push=self._push,
            token_budget=cfg.learner.token_budget,
            minibatches=cfg.minibatches,
            score_references=cfg.model.dtype == "bfloat16",
        )
        self.folder = Path(p.source.path)

    def _push(self, version: int) -> dict[str, float]:
        self.session.engine.load_weights(read_tensors(self.folder), version)
        return {}

    def phases(self, step: int) -> dict[str, Any]:
        """One step → seconds by phase, and what was drawn."""
        tasks = self.cursor.take(self.cfg.prompts_per_step)
        before = self.session.engine.stats()
        result = self.trainer.step(step, tasks, self.session.prompts(tasks))
        after, metrics = self.session.engine.stats(), result.metrics
        calls = {id(c): c for t in result.trees for leaf in t.leaves for c in leaf.tool_calls}
        keys = ("prefill_tokens", "decode_tokens", "scored_tokens")
        return {
            "seconds": {phase: metrics[f"time/{phase}"] for phase in PHASES},
            "waited": metrics["time/tool_wait"],
            "tools": sum(c.wall_s for c in calls.values()),
            "drawn": metrics["tokens/generated"],
            "rows": sum(after[k] - before[k] for k in keys),
        }


if __name__ == "__main__":
    serve(Steps)
