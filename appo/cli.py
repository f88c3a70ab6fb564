"""The command line: thin commands over `appo.run.train`, `appo.run.session` and `appo.doctor`.

Heavy imports happen inside.
"""

from __future__ import annotations

import os
import re
import sys
import time
import warnings
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from appo.errors import AppoError, ConfigError

app = typer.Typer(
    name="appo",
    help="Train tool-using LLM agents with branching rollouts and future-aware advantages.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
Overrides = Annotated[
    list[str] | None,
    typer.Argument(help="key=value settings, e.g. steps=3 learner.lr=1e-4 algo=grpo"),
]
Recipe = Annotated[
    str, typer.Argument(help="name of a built-in recipe, or the path of a YAML file")
]
Plain = Annotated[bool, typer.Option("--plain", help="plain lines instead of live progress")]


SEVERAL = ("train", "eval", "replay")  # commands that several processes can share


@app.callback()
def _alone(context: typer.Context) -> None:
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    if several and context.invoked_subcommand not in SEVERAL:
        if os.environ.get("RANK") != "0":
            time.sleep(2.0)  # a launcher ends rank 0 as soon as another has gone: it speaks first
            sys.exit(2)
        raise ConfigError(
            f"appo {context.invoked_subcommand} runs in one process, and a launcher has started "
            f"{os.environ['WORLD_SIZE']}; start it without torchrun or deepspeed"
        )


def main() -> None:
    """Entry point: an AppoError becomes one paragraph and its exit code.

    2 for what the user can mend.
    """
    # These are read at import of torch, DeepSpeed and tokenizers.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # OpenMP threads that spin without end starve each other as soon as something else runs (a
    # sandbox, a grader): let them sleep after some microseconds. (Two threads, 32 rows, quiet
    # machine: 480 tok/s; endless spinning 490, no spinning 320.)
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "2000")
    if not _cuda_device_files():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    # The deepspeed launcher says to each process twice which rank it is; we read the environment.
    sys.argv = [a for a in sys.argv if not re.fullmatch(r"--local[_-]rank=\d+", a)]
    try:
        app()
    except AppoError as e:
        _fail(e)
    except KeyboardInterrupt:
        print(
            "\ninterrupted; a run can be continued with: appo train RECIPE resume=RUN",
            file=sys.stderr,
        )
        sys.exit(130)


def _cuda_device_files() -> bool:
    return any(Path("/dev").glob("nvidia[0-9]*")) or Path("/dev/kfd").exists()


def _fail(error: AppoError) -> NoReturn:
    from appo.dist.failures import show
    from appo.observability.progress import Console

    if not error.reported:
        show(error, Console())
    sys.exit(error.exit_code)


def _console(plain: bool, rank: int = 0) -> Any:
    from appo.observability.progress import Console

    console = Console(plain=True if plain else None, rank=rank)
    usual = warnings.showwarning

    def show(message: Any, category: Any, filename: str, *rest: Any) -> None:
        # Our own warnings are written for the user; those of libraries keep their place in the
        # code.
        if Path(filename).is_relative_to(Path(__file__).parent):
            console.warn(str(message))
        else:
            usual(message, category, filename, *rest)

    warnings.showwarning = show  # type: ignore[assignment]  # file and line go to `rest` untouched
    return console


def _several(recipe: str, overrides: list[str] | None, plain: bool) -> tuple[Any, Any, Any]:
    """(ranks, console, configuration) of a command that several processes share.

    Rank 0 reads the recipe for all.
    """
    from appo.config import load_config
    from appo.dist.failures import agree_or_raise
    from appo.dist.ranks import Ranks

    ranks = Ranks.join()
    console, cfg = _console(plain, ranks.rank), None
    with agree_or_raise(ranks, console):
        if ranks.main:
            cfg = load_config(recipe, overrides or [])
    return ranks, console, ranks.broadcast(cfg, "the configuration")


@app.command()
def train(
    recipe: Recipe,
    overrides: Overrides = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="check everything, print the card, write the config; train nothing"
        ),
    ] = False,
    plain: Plain = False,
) -> None:
    """Train a policy.

    `appo train quickstart`, `appo train tiny algo=grpo`, `appo train quickstart resume=RUN`.
    """
    ranks, console, cfg = _several(recipe, overrides, plain)
    if dry_run:
        from appo.config import dump
        from appo.run.plan import plan
        from appo.run.startup_card import card_rows, card_warnings

        p = plan(cfg, console, ranks=ranks)
        if ranks.main:
            console.card(f"appo train {cfg.recipe} (dry run)", card_rows(p), card_warnings(p))
            target = p.output / "config.resolved.yaml"
            target.write_text(dump(cfg))
            console.note(f"resolved configuration written to {target}; nothing was loaded")
        return
    from appo.run.train import train as run_training

    run_training(cfg, console, ranks)


@app.command("eval")
def evaluate(
    recipe: Recipe,
    overrides: Overrides = None,
    run: Annotated[
        Path | None,
        typer.Option(
            "--run",
            "--from",  # torchrun takes --run for one of its own
            help="evaluate the newest checkpoint of this run instead of the base model",
        ),
    ] = None,
    plain: Plain = False,
) -> None:
    """Accuracy and tool use on the held-out questions of a recipe's task."""
    from appo.run.train import evaluate as run_evaluation

    ranks, console, cfg = _several(recipe, overrides, plain)
    record = run_evaluation(cfg, run, console, ranks)
    if not ranks.main:
        return
    console.card(
        f"appo eval {recipe}",
        [("accuracy", f"{record['eval/accuracy']:.3f} [{record['eval/accuracy_low']:.3f}, "
                      f"{record['eval/accuracy_high']:.3f}] (95 % Wilson)"),
         ("tool use", f"{record['eval/tool_use']:.3f}"),
         ("questions", f"{record['eval/questions']:.0f} graded, {record['eval/errors']:.0f} grading errors"),
         ("truncated", f"{record['eval/truncated']:.3f}"), ("seconds", f"{record['time/eval']:.1f}")],
    )  # fmt: skip


@app.command()
def rollout(
    recipe: Recipe,
    overrides: Overrides = None,
    prompts: Annotated[
        int, typer.Option("--prompts", "-n", help="how many prompts to sample trees for")
    ] = 1,
    save: Annotated[
        Path | None, typer.Option("--save", help="append the trees to this JSONL file")
    ] = None,
    plain: Plain = False,
) -> None:
    """Sample rollout trees with the recipe's model and show them; nothing is learned."""
    from appo.config import load_config
    from appo.observability.trees import render_tree
    from appo.rollout.store import append_trees
    from appo.run.train import sample_trees

    console = _console(plain)
    trees, text = sample_trees(load_config(recipe, overrides or []), prompts, console)
    for tree in trees:
        typer.echo(render_tree(tree, text))
    if save is not None:
        append_trees(save, trees, text)
        console.note(f"{len(trees)} trees appended to {save}")


@app.command()
def replay(
    run: Annotated[Path, typer.Argument(help="run folder, trained with save_trees=all")],
    step: Annotated[int, typer.Option("--step", help="the step to learn again")],
    plain: Plain = False,
) -> None:
    """Learn one step of a run again from its saved trees and compare.

    Exit code 1 if the numbers differ.
    """
    from appo.dist.ranks import Ranks
    from appo.run.replay import replay as learn_again
    from appo.run.replay import rows

    ranks = Ranks.join()
    console = _console(plain, ranks.rank)
    found = learn_again(run, step, console, ranks)
    console.card(f"appo replay {run} --step {step}", rows(found), [])
    raise typer.Exit(0 if found.agrees else 1)


sft_app = typer.Typer(help="Supervised cold starts.", no_args_is_help=True)
app.add_typer(sft_app, name="sft")


@sft_app.command("tiny")
def sft_tiny(
    output: Annotated[
        Path, typer.Option("--output", "-o", help="folder for the checkpoint")
    ] = Path("tiny_qwen3"),
    steps: Annotated[int, typer.Option(help="optimiser steps")] = 800,
    batch: Annotated[int, typer.Option(help="traces per step")] = 64,
    lr: Annotated[float, typer.Option(help="peak learning rate")] = 3e-3,
    seed: Annotated[int, typer.Option()] = 0,
    threads: Annotated[
        int | None, typer.Option(help="default: the cores this process may use")
    ] = None,
    plain: Plain = False,
) -> None:
    """Train the tiny Qwen3 (0.66M parameters, BPE-512) from scratch on synthetic tool-use traces."""
    import torch

    from appo.config import load_config
    from appo.learner.sft import SftSettings, run_sft
    from appo.run.plan import usable_cores

    if output.exists() and any(output.iterdir()):
        raise ConfigError(f"--output={output}: the folder is not empty; choose another one")
    torch.set_num_threads(threads or usable_cores())
    console = _console(plain)
    settings = SftSettings(steps=steps, batch=batch, lr=lr, seed=seed)
    with console.phase(f"cold start, {steps} steps", steps) as bar:

        def report(i: int, loss: float, speed: float) -> None:
            bar.update(i, loss=round(loss, 4), tokens_per_s=int(speed))

        done = run_sft(output, settings, load_config("tiny").data.params, report=report)
    console.note(
        f"{output}: loss {done['loss']:.4f} after {done['tokens']:.0f} learned tokens, {done['seconds']:.0f} s"
    )


@app.command()
def doctor(plain: Plain = False) -> None:
    """What this machine can run: versions, native library, sandbox levels, model cache.

    Exit code 1 if training can't.
    """
    from appo.doctor import run_doctor

    ok = run_doctor(_console(plain))
    raise typer.Exit(0 if ok else 1)


if __name__ == "__main__":
    main()
