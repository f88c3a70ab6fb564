"""What learning needs, put together from a checked plan: the learner, and the step loop around it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from appo.config import run_context
from appo.dist.ranks import Ranks
from appo.run.plan import Plan
from appo.types import RolloutTree

if TYPE_CHECKING:  # they load torch, and a mistake of the user is found sooner without
    from appo.learner.learner import Learner
    from appo.rollout.sampler import Rollouts
    from appo.rollout.tree_rollout import TreeRollout
    from appo.trainer.trainer import Trainer


def make_learner(p: Plan, ranks: Ranks | None = None) -> Learner:
    """The learner of the configuration, with the base weights loaded. Collective."""
    from appo.learner.learner import Learner

    context = run_context(p.cfg, p.threads, str(p.output))
    return Learner(
        p.source.path,
        p.cfg.learner,
        seed=p.cfg.seed,
        ranks=ranks or Ranks(),
        context=context,
        family=p.family,
    )


def make_trainer(
    p: Plan,
    learner: Learner,
    ranks: Ranks,
    *,
    push: Callable[[int], dict[str, float]],
    sampler: Rollouts | None = None,
    grade: Callable[[Sequence[RolloutTree]], dict[str, float]] | None = None,
) -> Trainer[TreeRollout]:
    """The step loop of the configuration. Without sampler and grade it can learn from trees that exist (replay)."""
    from appo.algo.objective import make_objective
    from appo.trainer.balance import Costs
    from appo.trainer.trainer import Trainer

    cfg = p.cfg
    trainer: Trainer[TreeRollout] = Trainer(
        algo=p.algo,
        sampler=sampler,
        learner=learner,
        objective=make_objective(
            p.algo,
            entropy_coef=cfg.learner.entropy_coef,
            version=lambda: trainer.version,
            old_logp_version=lambda: trainer.old_logp_version,
            importance_cap=cfg.learner.importance_cap,
        ),
        grade=grade,
        push=push,
        token_budget=cfg.learner.token_budget,
        minibatches=cfg.minibatches,
        score_references=cfg.model.dtype == "bfloat16",
        keep_all_rows=cfg.learner.entropy_coef != 0,
        ranks=ranks,
        staleness=cfg.staleness,
        old_logprobs=cfg.learner.old_logprobs,
        threads=p.threads,
        costs=Costs.of_model(learner.lm.config, learner.parameter_counts()["total"]),
    )
    return trainer
