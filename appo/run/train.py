"""A training run from start to finish: plan, load, evaluate, step, checkpoint, evaluate, report. Resumable at any step.

All of it runs on every rank, in step; rank 0 alone prints and writes the records.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from appo.config import Config, dump
from appo.data.tasks import Cursor
from appo.dist.failures import agree_or_raise, exit_reason, fail_together
from appo.dist.ranks import Ranks
from appo.dist.signals import RunStopped, StopRequest
from appo.errors import AppoError
from appo.observability.learner import NoSignal
from appo.observability.lines import replace_file
from appo.observability.metrics import read_metrics
from appo.observability.progress import Console
from appo.observability.watchdog import Watchdog
from appo.run import resume
from appo.run.build import make_learner, make_trainer
from appo.run.log import RunLog, engine_work
from appo.run.plan import plan, tasks_of
from appo.run.session import Session
from appo.run.startup_card import card_rows, card_warnings
from appo.types import RolloutTree, Task


def train(cfg: Config, console: Console | None = None, ranks: Ranks | None = None) -> Path:
    """Run (or resume) a training run; → its folder. Under a launcher every rank calls this.

    Raises ConfigError and its kin before anything is loaded where that is possible. Whatever ends the run later, the
    folder keeps its metrics, trees and the newest complete checkpoint, and `resume=` goes on from there.
    """
    ranks = ranks or Ranks.join()
    console = console or Console(rank=ranks.rank)
    with fail_together(ranks, console), ExitStack() as stack:
        p = plan(cfg, console, ranks=ranks)
        if ranks.main:
            console.card(f"appo train {cfg.recipe}", card_rows(p), card_warnings(p))
        with agree_or_raise(ranks, console):
            session = stack.enter_context(Session(p, console, ranks))
            session.check_prompts()
        training = TrainingRun(session)
        if ranks.main and not p.resume:  # from here on the folder is a run that can be resumed
            (p.output / "config.yaml").write_text(dump(cfg))
        training.run()
    return p.output


class TrainingRun:
    """The state of one run between steps: what a checkpoint holds beside the learner is `_state()`."""

    def __init__(self, session: Session):
        p = session.plan
        self.session, self.plan, self.cfg = session, p, p.cfg
        self.console, self.ranks = session.console, session.ranks
        self.learner = make_learner(p, self.ranks)
        self.trainer = make_trainer(
            p, self.learner, self.ranks,
            sampler=session.rollouts, grade=session.grade, push=self._push,
        )  # fmt: skip
        self.cursor = Cursor(tasks_of(self.cfg, "train"))
        self.done = 0
        self.saved: int | None = None  # step of the newest checkpoint
        self.no_signal = NoSignal()
        self._probe = [session.builder.ids(self.cursor.tasks[i]) for i in range(2)]

    # -- the run -----------------------------------------------------------------------------------

    def run(self) -> None:
        """From the newest checkpoint (if resumed) to the last step, then the report."""
        out, say = self.plan.output, self.console.warn if self.ranks.main else lambda text: None
        self.watchdog = Watchdog(
            out, self.ranks.rank, self.cfg.watchdog_s, self.session.describe, world=self.ranks.world
        )
        self.learner.on_micro_batch = lambda i, n: self.watchdog.beat("learn", f"micro-batch {i + 1} of {n}")  # fmt: skip
        with self.watchdog, StopRequest(say) as self.stop:
            together = False
            try:
                self._begin()
                self._steps()
                together = True
            except RunStopped:
                together = True
                raise
            except BrokenPipeError:  # nobody reads what we print
                raise
            except (AppoError, OSError) as error:
                # Weights may hold half a step: the newest checkpoint, of a whole one, is what the run resumes from.
                if self.saved is not None:
                    say(
                        f"stopping in step {self.done + 1}; resume={out} goes on from step {self.saved}"
                    )
                if isinstance(error, OSError):
                    error = AppoError(f"the run in {out} cannot go on: {error}")
                if (
                    self.ranks.main
                ):  # before the report, which may take long: the others wait for the word
                    self.ranks.report_exit(exit_reason(error))
                raise error
            finally:
                self.learner.close()
                self._report()
                if together:  # a launcher ends rank 0 as soon as another rank has gone
                    self.ranks.barrier("the report")

    def _begin(self) -> None:
        if self.plan.resume:
            self._restore()
        self.console.steps = self.cfg.steps
        self.records = RunLog(
            self.plan.output, self.done if self.plan.resume else None,
            text=self.session.text.text, ranks=self.ranks, save_trees=self.cfg.save_trees,
        )  # fmt: skip
        if self.done == 0:
            self._checkpoint()
            known = [r for r in read_metrics(self.plan.output) if r["kind"] == "eval"]
            if not self.ranks.broadcast(bool(known), "whether step 0 is evaluated"):
                self._evaluate(0)

    def _steps(self) -> None:
        while self.done < self.cfg.steps:
            self._leave_if_asked()
            self._one_step(self.done + 1)

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        """A bar over this rank's roots of a step, and beats for the watchdog."""
        cfg, ranks = self.cfg, self.ranks
        mine = len(range(ranks.rank, cfg.prompts_per_step // cfg.minibatches, ranks.world))
        total = mine * cfg.minibatches * self.plan.algo.roots
        with self.console.phase(name, total) as bar:

            def on_phase(phase: str, done: int, left: int) -> None:
                self.watchdog.beat(f"{name}: {phase}", f"{done} done, {left} left")
                bar.update(done or total, phase=phase)

            self.trainer.on_phase = on_phase
            yield

    def _one_step(self, number: int) -> None:
        cfg, begin, before = self.cfg, time.perf_counter(), self.session.engine.stats()
        with self._phase(f"step {number}/{cfg.steps}"):
            for ahead in self.trainer.missing(number, cfg.steps):
                self.trainer.prefetch(ahead, *self._batch())
            # These are the prompts of the step whose roots are drawn now; the last steps' were drawn before.
            drawn = number + cfg.staleness <= cfg.steps
            result = self.trainer.step(number, *(self._batch() if drawn else ([], [])))
        self.watchdog.beat(f"step {number}: records")
        self.records.step(number, result)
        self.done = number
        record = {"step": number, "kind": "step"} | result.metrics
        record |= engine_work(before, self.session.engine.stats(), self.ranks)
        took = {"time/step": time.perf_counter() - begin}
        self._write(record | self.ranks.reduce(took, "max", "the end of a step"))
        last = number == cfg.steps
        if last or (cfg.eval.every and number % cfg.eval.every == 0):
            self._evaluate(number)
        if last or number % cfg.save_every == 0:
            self._checkpoint()

    def _batch(self) -> tuple[list[Task], list[list[int]]]:
        """The next prompts of the data set, the same on every rank."""
        tasks = self.cursor.take(self.cfg.prompts_per_step)
        return tasks, self.session.prompts(tasks)

    def _evaluate(self, step: int) -> None:
        if self.cfg.eval.questions:
            name = f"evaluation after step {step}"
            self.watchdog.beat(name)
            on_progress = lambda left: self.watchdog.beat(name, f"{left} left")  # noqa: E731
            self._write(self.session.evaluate(step, on_progress))

    def _write(self, record: dict[str, Any]) -> None:
        self.records.metrics(record)
        self.console.step(record)
        found_nothing = self.no_signal.look(record)
        if found_nothing and self.ranks.main:
            self.console.warn(found_nothing)

    def _leave_if_asked(self) -> None:
        """Ctrl-C or SIGTERM, on any rank: save what is done, and out."""
        asked = self.ranks.reduce({"signal": float(self.stop.signum)}, "max", "whether to stop")
        if signum := int(asked["signal"]):
            out = self.plan.output
            if self.saved != self.done:
                self._checkpoint()
            raise RunStopped(
                f"stopped after step {self.done}; go on with: appo train {out}/config.yaml resume={out}",
                signum,
            )

    def _report(self) -> None:
        """Whatever ended the run: its report must not hide that."""
        from appo.observability.report import write_report

        if self.ranks.main:
            try:
                write_report(self.plan.output, dump(self.cfg), self.console)
            except (OSError, AppoError) as error:
                self.console.warn(f"the report could not be written: {error}")

    # -- weights and state -------------------------------------------------------------------------

    def _push(self, version: int) -> dict[str, float]:
        from appo.learner.push_weights import push

        self.watchdog.beat("push", f"policy version {version}")
        return push(self.learner, self.session.engine, version, self._probe)

    def _state(self) -> dict[str, Any]:
        return {
            "step": self.done,
            "version": self.trainer.version,
            "data": self.cursor.state_dict(),
            "config": resume.flatten(self.cfg),
        }

    def _checkpoint(self) -> None:
        from appo.learner.checkpoint import save_checkpoint

        def write(folder: Path) -> None:
            self.learner.save(folder)
            self.trainer.save_roots(folder)

        self.watchdog.beat("checkpoint", f"step {self.done}")
        save_checkpoint(
            self.plan.output, self.done, write, self._state(),
            keep_last=self.cfg.keep_last, ranks=self.ranks,
        )  # fmt: skip
        self.saved = self.done

    def _restore(self) -> None:
        from appo.learner.checkpoint import load_latest

        out = self.plan.output
        path, state = load_latest(out, self.ranks)
        notes = resume.check_config(state["config"], self.cfg, str(out))
        self.learner.load(path)
        self.cursor.load_state_dict(state["data"])
        self.done = self.saved = int(state["step"])
        self.trainer.version = int(state["version"])
        self._push(self.trainer.version)
        self.trainer.restore_roots(path)
        if (
            self.ranks.main
        ):  # what the run is from here on: the printed command and a replay read it
            now = dataclasses.replace(self.cfg, resume=None, output=str(out))
            replace_file(out / "config.yaml", dump(now).encode())
        for note in notes:
            self.console.note(note)
        self.console.note(f"resumed {out} after step {self.done} (policy version {self.trainer.version})")  # fmt: skip


def evaluate(
    cfg: Config,
    run: Path | None = None,
    console: Console | None = None,
    ranks: Ranks | None = None,
) -> dict[str, Any]:
    """Accuracy and tool use of the recipe's base model, or of the newest checkpoint of `run`. → metrics record."""
    ranks = ranks or Ranks.join()
    console = console or Console(rank=ranks.rank)
    with fail_together(ranks, console), ExitStack() as stack:
        p = plan(cfg, console, need_output=False, ranks=ranks)
        with agree_or_raise(ranks, console):
            session = stack.enter_context(Session(p, console, ranks))
        if run is not None:
            _load_checkpoint(session, run)
        return session.evaluate(0)


def _load_checkpoint(session: Session, run: Path) -> None:
    """The engine takes over the weights of a run's newest checkpoint."""
    from appo.learner.checkpoint import load_latest
    from appo.learner.push_weights import push

    path, state = load_latest(run, session.ranks)
    with make_learner(session.plan, session.ranks) as learner:
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
        rollouts, tree_rollouts = session.rollouts, []
        with console.phase("sampling", len(tasks) * p.algo.roots) as bar:
            tree_rollouts = [
                rollouts.start(t, i, p.algo.roots, 0)
                for t, i in zip(tasks, session.prompts(tasks), strict=True)
            ]
            rollouts.run(on_progress=lambda left: bar.update(len(tasks) * p.algo.roots - left))
            if not p.algo.has_branches:
                for g in tree_rollouts:
                    rollouts.release(g)
            else:
                rollouts.grow_branches(tree_rollouts, p.algo)
                rollouts.run()
        trees = rollouts.finish(tree_rollouts)
        session.grade(trees)
        return trees, session.text.text
