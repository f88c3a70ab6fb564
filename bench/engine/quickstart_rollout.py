"""Seconds of the quickstart's rollout phases on this checkout of the package and on an older one.

    python bench/engine/quickstart_rollout.py --old FOLDER [--quick] [--json FILE] [--repeats 5] [--threads 2]

FOLDER is another checkout with its own native library built (git worktree add FOLDER COMMIT, then
pip's or CMake's build there). Both replay the same steps of the recipe (the same questions, no
learning; weights are pushed as a new version between mini-batches as in training) in processes of
their own, in turn; the table has medians. The two draw different tokens, so there is a row for
seconds per 1,000 drawn tokens. --quick: the tiny recipe. Without --old: ours alone, and the other
is listed as missing.
"""

from __future__ import annotations

import statistics
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[2]))  # the checkout, for `bench`

from bench.common import Case, parser, report
from bench.peers.rollout.engines import Engine, EngineFailed, Running

HERE = Path(__file__).resolve().parent


GOAL = 3.0
# As the command line sets it: see appo/cli.py.
ENVIRONMENT = {"GOMP_SPINCOUNT": "2000", "DS_ACCELERATOR": "cpu", "TOKENIZERS_PARALLELISM": "false"}


def arguments() -> Namespace:
    p = parser(__doc__ or "")
    p.add_argument("--old", metavar="FOLDER", type=Path, help="the checkout to compare with")
    p.add_argument("--repeats", type=int, help="timed steps (5; 2 with --quick)")
    p.add_argument("--threads", type=int, default=2)
    return p.parse_args()


def checkouts(old: Path | None) -> dict[str, Path]:
    """Name → folder to import `appo` from.

    Exits if the other one has no native library: it would be timed without.
    """
    found = {"ours": HERE.parents[1]}
    if old is not None:
        if not list((old / "appo" / "_native").glob("*appo_native*")):
            raise SystemExit(f"--old {old}: no built native library in {old / 'appo' / '_native'}")
        found["old"] = old.resolve()
    return found


def play(args: Namespace, recipe: str, repeats: int) -> dict[str, list[dict[str, Any]]]:
    """Answers per checkout, the warm-up step left out."""
    settings = {"recipe": recipe, "threads": args.threads}
    running: dict[str, Running] = {}
    try:
        for name, folder in checkouts(args.old).items():
            engine = Engine(name, name, "peer_quickstart.py")
            environment = ENVIRONMENT | {"PYTHONPATH": str(folder)}
            running[name] = Running(engine, Path(sys.executable), settings, environment)
        answers: dict[str, list[dict[str, Any]]] = {name: [] for name in running}
        for step in range(repeats + 1):
            for name, peer in running.items():
                answer = peer.ask("phases", step=step)
                if step:
                    answers[name].append(answer)
        return answers
    except EngineFailed as e:
        raise SystemExit(str(e)) from e
    finally:
        for peer in running.values():
            peer.close()


def cases(answers: dict[str, list[dict[str, Any]]]) -> list[Case]:
    def case(name: str, unit: str, figure: Any, **options: Any) -> Case:
        median = {who: statistics.median(map(figure, got)) for who, got in answers.items()}
        return Case(name, unit, median.pop("ours"), median, **options)

    def sampling(a: dict[str, Any]) -> float:
        return a["seconds"]["rollout"] + a["seconds"]["branch"]

    phases = list(answers["ours"][0]["seconds"])
    return [
        *(case(phase, "s/step", lambda a, p=phase: a["seconds"][p]) for phase in phases),
        case("rollout + branch", "s/1,000 drawn", lambda a: 1e3 * sampling(a) / a["drawn"]),
        case("drawn", "tokens/s", lambda a: a["drawn"] / sampling(a), higher_is_better=True),
        case("drawn", "tokens/step", lambda a: a["drawn"], higher_is_better=True),
        case("rows computed", "rows/step", lambda a: a["rows"]),
        case("tools, all calls together", "s/step", lambda a: a["tools"]),
        case("nothing to do but wait for tools", "s/step", lambda a: a["waited"]),
    ]


def main() -> None:
    args = arguments()
    recipe, repeats = ("tiny", 2) if args.quick else ("quickstart", 5)
    answers = play(args, recipe, args.repeats or repeats)
    threads = f"{args.threads} thread{'s' if args.threads > 1 else ''}"
    title = f"{recipe} without learning, {threads} (goal: rollout {GOAL:g} × faster)"
    missing = "missing: --old FOLDER, where `git worktree add FOLDER COMMIT` was built"
    report(title, cases(answers), args, {} if args.old else {"old": missing})


if __name__ == "__main__":
    main()
