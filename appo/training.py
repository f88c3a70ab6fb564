"""A training run from start to finish: plan, load, evaluate, step, checkpoint, evaluate, report. Resumable at any step."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from appo.config import Config, dump
from appo.data.datasets import Cursor
from appo.errors import CheckpointError, LearnerError
from appo.obs.branches import BranchLog
from appo.obs.metrics import MetricsWriter, read_metrics
from appo.obs.progress import Console
from appo.run import Plan, Session, card_rows, card_warnings, plan, tasks_of
from appo.types import RolloutTree

if TYPE_CHECKING:  # it loads torch, and a user's mistake is found sooner without
    from appo.algo.branching import BranchPlan


def train(cfg: Config, console: Console | None = None) -> Path:
    """Run (or resume) a training run; → its folder.

    Raises ConfigError and its kin before anything is loaded where that is possible. Whatever ends the run later, the
    folder keeps its metrics, trees and the newest complete checkpoint, and `resume=` goes on from there.
    """
    console = console or Console()
    p = plan(cfg, console)
    console.card(f"appo train {cfg.recipe}", card_rows(p), card_warnings(p))
    with Session(p, console) as session:
        session.check_prompts()
        run = TrainingRun(session)
        if not p.resume:  # from here on the folder is a run that can be resumed
            (p.output / "config.yaml").write_text(dump(cfg))
        run.go()
    return p.output


class TrainingRun:
    """The state of one run between steps: what a checkpoint holds beside the learner is `_state()`."""

    def __init__(self, session: Session):
        from appo.algo.objective import make_objective
        from appo.learner.backend import Learner
        from appo.learner.trainer import Trainer

        p = session.plan
        self.session, self.plan, self.cfg, self.console = session, p, p.cfg, session.console
        self.learner = Learner(p.source.path, _learner_settings(p), seed=self.cfg.seed)
        self.cursor = Cursor(tasks_of(self.cfg, "train"))
        self.done = 0
        self.trainer = Trainer(
            algo=p.algo,
            sampler=session.rollouts,
            learner=self.learner,
            objective=make_objective(
                p.algo,
                entropy_coef=self.cfg.learner.entropy_coef,
                version=lambda: self.trainer.version,
            ),
            grade=session.grade,
            push=self._push,
            token_budget=self.cfg.learner.token_budget,
            minibatches=self.cfg.minibatches,
            rescore_roots=self.cfg.model.dtype == "bfloat16",
            keep_all_rows=self.cfg.learner.entropy_coef != 0,
        )
        self._probe = [session.builder.ids(self.cursor.tasks[i]) for i in range(2)]

    # -- the run -------------------------------------------------------------------------------------------------

    def go(self) -> None:
        """From the newest checkpoint (if resumed) to the last step, then the report."""
        from appo.obs.report import write_report

        cfg, out = self.cfg, self.plan.output
        if self.plan.resume:
            self._restore()
        # The metrics of a resumed run continue after its checkpoint; what was written past it is drawn again.
        keep = self.done if self.plan.resume else None
        self.console.steps = cfg.steps
        self.metrics = MetricsWriter(out, resume_after=keep)
        self.branches = BranchLog(out, resume_after=keep)
        _cut_trees(out / "trees.jsonl", keep)
        try:
            if self.done == 0:
                self._checkpoint(0)
                if not any(r["kind"] == "eval" for r in read_metrics(out)):
                    self._evaluate(0)
            while self.done < cfg.steps:
                self._one_step(self.done + 1)
        except LearnerError:
            # Weights may hold half a step: the newest checkpoint, of a whole one, stays what the run resumes from.
            self.console.warn(
                f"stopping in step {self.done + 1}; resume={out} goes on from the newest checkpoint"
            )
            raise
        finally:
            self.learner.close()
            write_report(out, dump(cfg), self.console)

    def _one_step(self, number: int) -> None:
        cfg, begin, before = self.cfg, time.perf_counter(), self.session.engine.stats()
        tasks = self.cursor.take(cfg.prompts_per_step)
        total = cfg.prompts_per_step * self.plan.algo.roots
        with self.console.phase(f"step {number}/{cfg.steps}", total) as bar:
            self.trainer.on_phase = lambda name, done, left: bar.update(done or total, phase=name)
            result = self.trainer.step(number, tasks, self.session.prompts(tasks))
        self._write_branches(number, result.trees, result.plans, result.minibatch)
        self._write_trees(result.trees[: cfg.save_trees])
        self.done = number
        record = {"step": number, "kind": "step"} | result.metrics | self._engine_work(before)
        record["time/step"] = time.perf_counter() - begin
        self.metrics.write(record)
        self.console.step(record)
        last = number == cfg.steps
        if last or (cfg.eval.every and number % cfg.eval.every == 0):
            self._evaluate(number)
        if last or number % cfg.save_every == 0:
            self._checkpoint(number)

    def _engine_work(self, before: dict[str, float]) -> dict[str, float]:
        """What the engine did since `before`: differences of its counters, so that a resumed run writes the same.

        `memory/kv_*` is what the run has needed at most so far, hence not the same after a resumption.
        """
        now = self.session.engine.stats()
        work = {f"engine/{k}": float(now[k] - before[k]) for k in ENGINE_WORK if k in now}
        if "blocks_peak" in now:
            work["memory/kv_blocks_peak"] = float(now["blocks_peak"])
            work["memory/kv_mb_peak"] = now["blocks_peak"] * now["block_bytes"] / 2**20
        return work

    def _evaluate(self, step: int) -> None:
        if not self.cfg.eval.questions:
            return
        record = self.session.evaluate(step)
        self.metrics.write(record)
        self.console.step(record)

    # -- weights and state ---------------------------------------------------------------------------------------

    def _push(self, version: int) -> dict[str, float]:
        from appo.learner.weights import push

        return push(self.learner, self.session.engine, version, self._probe)

    def _state(self) -> dict[str, Any]:
        return {
            "step": self.done,
            "version": self.trainer.version,
            "data": self.cursor.state_dict(),
            "config_sha256": _fingerprint(self.cfg),
        }

    def _checkpoint(self, step: int) -> None:
        from appo.learner.checkpoint import save_checkpoint

        save_checkpoint(
            self.plan.output, step, self.learner.save, self._state(), keep_last=self.cfg.keep_last
        )

    def _restore(self) -> None:
        from appo.learner.checkpoint import load_latest

        path, state = load_latest(self.plan.output)
        if state["config_sha256"] != _fingerprint(self.cfg):
            raise CheckpointError(
                f"resume={self.plan.output}: the configuration is not the one of that run (its config.yaml); resume "
                "with the same recipe and overrides (steps, save_every, keep_last, threads and eval.* may change)"
            )
        self.learner.load(path)
        self.cursor.load_state_dict(state["data"])
        self.done, self.trainer.version = int(state["step"]), int(state["version"])
        self._push(self.trainer.version)
        self.console.note(
            f"resumed {self.plan.output} after step {self.done} (policy version {self.trainer.version})"
        )

    # -- records -------------------------------------------------------------------------------------------------

    def _write_trees(self, trees: Sequence[RolloutTree]) -> None:
        from appo.rollout.store import append_trees

        append_trees(self.plan.output / "trees.jsonl", trees, self.session.text.text)

    def _write_branches(
        self,
        step: int,
        trees: Sequence[RolloutTree],
        plans: Sequence[BranchPlan | None],
        part: Sequence[int],
    ) -> None:
        for tree, found, k in zip(trees, plans, part, strict=True):
            if found is not None:
                rows = branch_rows(tree, found, self.session.text.text)
                self.branches.write(step, k, tree.task.task_id, rows, found.flat, found.shortfall)


def branch_rows(tree: RolloutTree, found: BranchPlan, text: Any) -> list[dict[str, Any]]:
    """One row per root of the prompt and branch point: where it fell, why, and what it earned."""
    views = {tree.leaves[i].root: tree.trajectory(i) for i in tree.roots}
    rewards = {leaf.root: leaf.reward for leaf in tree.leaves if leaf.is_root}
    # Branches were forked in the order of the points.
    branch_rewards = iter([leaf.reward for leaf in tree.leaves if not leaf.is_root])
    rows: list[dict[str, Any]] = []
    for point in found.points:
        view = views[point.root]
        rows.append(
            {
                "root": point.root, "position": point.position, "response_length": len(view),
                "token": text([int(view.response_ids[point.position])]), "rule": point.rule, "score": point.score,
                "z_entropy": point.z_entropy, "z_omega": point.z_omega, "flat": found.flat[point.root],
                "root_reward": rewards[point.root], "branch_reward": next(branch_rewards),
            }
        )  # fmt: skip
    return rows


def _cut_trees(path: Path, keep: int | None) -> None:
    """A resumed run draws the trees after its checkpoint again: drop the old ones."""
    from appo.obs.lines import cut_after

    if keep is not None and path.exists():
        cut_after(path, keep)


# Counters of the engine that a step's record holds the differences of; not every engine has all of them.
ENGINE_WORK = (
    "prefill_tokens", "decode_tokens", "scored_tokens", "prefix_hits_tokens", "forks", "tokens_saved", "preemptions",
    "evicted_tokens",
)  # fmt: skip

# Keys that may differ between a run and its resumption without changing what is computed.
FREE_KEYS = ("output", "resume", "steps", "save_every", "keep_last", "save_trees", "threads")

RESOURCE_KEYS = (
    ("model", "offline"), ("rollout", "kv_tokens"), ("tools", "workers"), ("tools", "timeout_s"),
    ("reward", "workers"), ("reward", "timeout_s"), ("learner", "max_nonfinite"),
)  # fmt: skip


def _fingerprint(cfg: Config) -> str:
    import yaml

    values = yaml.safe_load(dump(cfg))
    for key in (*FREE_KEYS, "eval"):
        values.pop(key)
    if cfg.learner.schedule != "constant":  # the schedule depends on the number of updates
        values["steps"] = cfg.steps
    for group, name in RESOURCE_KEYS:
        values[group].pop(name)
    return hashlib.sha256(yaml.safe_dump(values, sort_keys=True).encode()).hexdigest()


def _learner_settings(p: Plan) -> Any:
    """`learner.*` as the learner's own settings."""
    from appo.learner.backend import LearnerSettings

    c = p.cfg.learner
    return LearnerSettings(
        mode=c.mode, lora_r=c.lora.r, lora_alpha=c.lora.alpha, lora_targets=tuple(c.lora.targets),
        lora_layers=c.lora.layers, lr=c.lr, weight_decay=c.weight_decay, betas=(c.betas[0], c.betas[1]),
        warmup_steps=c.warmup_steps, schedule=c.schedule, total_steps=p.cfg.steps * p.cfg.minibatches,
        max_grad_norm=c.max_grad_norm, zero_stage=c.zero_stage, dtype=p.cfg.model.dtype,
        gradient_checkpointing=c.gradient_checkpointing, temperature=p.cfg.rollout.temperature,
        head_backend=c.head_backend, max_nonfinite=c.max_nonfinite, threads=p.threads, dump_dir=str(p.output),
    )  # fmt: skip


def evaluate(
    cfg: Config, run: Path | None = None, console: Console | None = None
) -> dict[str, Any]:
    """Accuracy and tool use of the recipe's base model, or of the newest checkpoint of `run`. → metrics record."""
    console = console or Console()
    p = plan(cfg, console, need_output=False)
    with Session(p, console) as session:
        if run is not None:
            _load_checkpoint(session, run)
        return session.evaluate(0)


def _load_checkpoint(session: Session, run: Path) -> None:
    """The engine takes over the weights of a run's newest checkpoint."""
    from appo.learner.backend import Learner
    from appo.learner.checkpoint import load_latest
    from appo.learner.weights import push

    path, state = load_latest(run)
    with Learner(
        session.plan.source.path, _learner_settings(session.plan), seed=session.plan.cfg.seed
    ) as learner:
        learner.load(path)
        probe = session.prompts([tasks_of(session.plan.cfg, "train")[0]])
        push(learner, session.engine, int(state["version"]), probe)
    session.console.note(f"weights of {path} (policy version {state['version']})")


def sample_trees(cfg: Config, prompts: int, console: Console) -> tuple[list[RolloutTree], Any]:
    """Trees of the first training prompts, graded. → (trees, ids → text)."""
    p = plan(cfg, console, need_output=False)
    console.card(f"appo rollout {cfg.recipe}", card_rows(p), card_warnings(p))
    with Session(p, console) as session:
        tasks = Cursor(tasks_of(cfg, "train")).take(prompts)
        rollouts, growths = session.rollouts, []
        with console.phase("sampling", len(tasks) * p.algo.roots) as bar:
            growths = [
                rollouts.plant(t, i, p.algo.roots, 0)
                for t, i in zip(tasks, session.prompts(tasks), strict=True)
            ]
            rollouts.run(on_progress=lambda left: bar.update(len(tasks) * p.algo.roots - left))
            if p.algo.flat:
                for g in growths:
                    rollouts.release(g)
            else:
                rollouts.grow_branches(growths, p.algo)
                rollouts.run()
        trees = rollouts.finish(growths)
        session.grade(trees)
        return trees, session.text.text
