"""What drawing roots beside the learner gains.

Seconds per step with staleness 0 and 1, and how often Ω says something.

    python bench/learner/prefetch.py [--quick] [--json FILE] [--tool SECONDS]

The tiny recipe, and in full the quickstart too (SmolLM2-135M), each with its Python tool and with
one that takes some seconds longer, as a search would. Runs alternate, each in a fresh process;
medians over steps that draw roots for a later one, so not over the first and the last. On a CPU
learner and engine share the cores, so what can be gained is the time in which one of them waits
(for tools, for single-threaded code); on a machine where the learner has a device of its own it is
the smaller of the two.

"hidden": the part of the drawing that took no time of the step. "flat": branch points chosen
without Ω (goal: none).
"""

from __future__ import annotations

import statistics
import sys
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

from appo.run.plan import usable_cores

sys.path.append(str(Path(__file__).resolve().parents[2]))  # the checkout, for `bench`

from bench.common import Case, in_fresh_process, parser, report

STEPS = {"tiny": 6, "quickstart": 5}  # of a run; the first and the last do not count


def arguments() -> Namespace:
    p = parser(__doc__ or "")
    p.add_argument("--tool", type=float, default=0.3, metavar="SECONDS", help="more per tool call")
    return p.parse_args()


class Slow:
    """A tool that answers as another one does, some seconds later."""

    def __init__(self, tool: Any, seconds: float):
        self.tool, self.seconds, self.name = tool, seconds, tool.name

    def __call__(self, argument: str) -> Any:
        time.sleep(self.seconds)
        return self.tool(argument)

    def close(self) -> None:
        self.tool.close()


def steps_of(recipe: str, staleness: int, tool_s: float, steps: int) -> list[dict[str, float]]:
    """Metrics of the steps of one run that count, with "seconds" of each."""
    from appo.config import load_config
    from appo.data.tasks import Cursor
    from appo.learner.push_weights import push
    from appo.observability.progress import Console
    from appo.run.build import make_learner, make_trainer
    from appo.run.plan import plan, tasks_of
    from appo.run.session import Session

    overrides = [f"staleness={staleness}", "eval.questions=0", f"steps={steps}"]
    console = Console(plain=True, quiet=True)
    p = plan(load_config(recipe, overrides), console, need_output=False)
    with Session(p, console) as session, make_learner(p) as learner:
        tools = session.pool.tools
        tools.update({name: Slow(tool, tool_s) for name, tool in tools.items()})
        cursor = Cursor(tasks_of(p.cfg, "train"))
        probe = [session.builder.ids(cursor.tasks[0])]
        trainer = make_trainer(
            p, learner, session.ranks, sampler=session.rollouts, grade=session.grade,
            push=lambda version: push(learner, session.engine, version, probe),
        )  # fmt: skip

        def batch() -> tuple[Any, Any]:
            tasks = cursor.take(p.cfg.prompts_per_step)
            return tasks, session.prompts(tasks)

        for number in trainer.missing(1, steps):
            trainer.prefetch(number, *batch())
        found = []
        for number in range(1, steps + 1):
            tasks, prompts = batch() if number + staleness <= steps else ([], [])
            begin = time.perf_counter()
            result = trainer.step(number, tasks, prompts)
            found.append(result.metrics | {"seconds": time.perf_counter() - begin})
    return found[1:-1]


def cases_of(recipe: str, tool_s: float, repeats: int) -> list[Case]:
    runs: dict[int, list[dict[str, float]]] = {0: [], 1: []}
    for _ in range(repeats):
        for staleness, found in runs.items():
            found += in_fresh_process(steps_of, recipe, staleness, tool_s, STEPS[recipe])

    def middle(staleness: int, name: str) -> float:
        return statistics.median(m.get(name, 0.0) for m in runs[staleness])

    def both(what: str, unit: str, name: str) -> Case:
        title = f"{recipe}, tool + {tool_s:g} s: {what}"
        return Case(title, unit, middle(1, name), variants={"staleness 0": middle(0, name)})

    for metrics in runs[1]:
        ahead = metrics["time/ahead"]
        metrics["hidden"] = 1 - metrics["time/rollout"] / ahead if ahead else 0.0
    cases = [
        both("step", "s", "seconds"),
        both("drawing roots", "s", "time/ahead"),
        both("waiting for roots", "s", "time/rollout"),
        both("learning", "s", "time/learn"),
        both("hidden", "of drawing", "hidden"),
        both("flat", "of roots", "branch/omega_uninformative"),
        both("drawn", "tokens", "tokens/generated"),
    ]
    cases[1].variants["staleness 0"] = middle(0, "time/rollout")
    return cases


def main() -> None:
    args = arguments()
    cases = []
    for recipe in ("tiny",) if args.quick else ("tiny", "quickstart"):
        for tool_s in (0.0, args.tool):
            cases += cases_of(recipe, tool_s, 2 if recipe == "tiny" and not args.quick else 1)
    cores = usable_cores()
    note = {"ours": f"staleness 1, {cores} cores shared by learner and engine while both run"}
    report("roots drawn beside the learner", cases, args, note)


if __name__ == "__main__":
    main()
