"""A learner step on packed trees against padded rows, rows without sharing, and TRL.

Time, tokens a second, memory.

    OMP_NUM_THREADS=1 python bench/learner/step.py [--quick] [--json FILE] [--only steps,memory,zero] [--repeats 2]
                                              [--model FOLDER] [--venvs FOLDER]

One prompt group, SmolLM2-135M, all weights trained in bfloat16 with float32 masters, AdamW, one
thread. Every response ends after the same number of tokens, so padding costs nobody anything.
Works: N roots with B branches each, of which the roots train; the same with every row training; an
agent's tree, forked at three depths, every row training. Columns:

    tokens read     what the transformer was run on; its ratio to ours is the most that sharing can
                    be worth
    CPU, wall       seconds of a step: forward, backward, clipping, AdamW
    trained tokens  of the responses that carry loss, a second; the same tokens for everybody

`rows` is our learner on rows that share nothing; `padded` is what the method's released code does,
all rows through forward and backward (bench/peers/learner/peer_padded.py); `TRL` its GRPOTrainer,
on all rows and on those that train (peer_trl.py says what is timed). These three are timed on a few
rows, all of one length, and scaled to the rows of the step; ours is timed whole. Each lives in a
process of its own; rounds alternate, medians. TRL is looked for in FOLDER/trl (default:
~/.cache/appo/bench):

    python -m venv FOLDER/trl && FOLDER/trl/bin/pip install -r requirements/bench-trl.txt
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from argparse import Namespace
from collections import defaultdict
from pathlib import Path
from typing import Any

from appo.models.resolve import default_cache

sys.path.append(str(Path(__file__).resolve().parents[2]))  # the checkout, for `bench`

from bench.common import Case, in_fresh_process, parser, report_by_implementation
from bench.engine.engine import model_folder
from bench.peers.learner.trees import Work
from bench.peers.rollout.engines import Engine, EngineFailed, Running, last_line, python_of

PEERS = Path(__file__).resolve().parents[1] / "peers" / "learner"
OURS = Engine("ours", "ours", str(PEERS / "peer_ours.py"))
OTHERS = (
    Engine("padded", "padded", str(PEERS / "peer_padded.py"), {"dtype": "bfloat16"}),
    Engine(
        "trl", "TRL", str(PEERS / "peer_trl.py"), {"dtype": "bfloat16"}, "trl",
        "python -m venv {venv} && {venv}/bin/pip install -r requirements/bench-trl.txt",
    ),
)  # fmt: skip
MICRO = 2  # rows of a micro-batch of the peers, and how many are timed
BUDGET = 6144  # tokens of a micro-batch of ours: three processes share the memory of the machine
ZERO_LIMIT_S = 600


def works(quick: bool, vocab: int) -> list[Work]:
    p, r = (128, 128) if quick else (512, 1024)
    levels = ((2, 3 * r // 8), (2, 3 * r // 8), (2, r // 4))
    return [
        Work("N=4 B=3", p, r, 4, 3, vocab=vocab),
        Work("N=8 B=1", p, r, 8, 1, vocab=vocab),
        Work("N=4 B=3, every row trains", p, r, 4, 3, every_row=True, vocab=vocab),
        Work("agent's tree, every row trains", p, r, levels=levels, vocab=vocab),
    ]


def arguments() -> Namespace:
    p = parser(__doc__ or "")
    p.add_argument(
        "--only", help="parts, separated by commas (steps,memory,zero; steps,memory with --quick)"
    )
    p.add_argument("--repeats", type=int, help="timed rounds (2; 1 with --quick)")
    p.add_argument("--model", type=Path, help="folder (default: random weights in its shape)")
    p.add_argument("--venvs", type=Path, default=default_cache() / "bench", metavar="FOLDER")
    return p.parse_args()


def start(args: Namespace, folder: Path, notes: dict[str, str]) -> dict[str, Running]:
    settings = {"model": str(folder), "threads": 1, "budget": BUDGET, "micro": MICRO}
    running = {}
    for engine in (OURS, *OTHERS):
        python = python_of(engine, args.venvs)
        if python is None:
            notes[engine.name] = "missing: " + engine.install.format(venv=args.venvs / engine.venv)
            continue
        try:
            running[engine.key] = Running(engine, python, settings)
        except EngineFailed as error:
            notes[engine.name] = f"error: {last_line(error)}"
    return running


Answers = dict[str, list[dict[str, Any]]]  # what was asked → the answers of all rounds


def play(
    running: dict[str, Running], todo: list[Work], repeats: int, notes: dict[str, str]
) -> Answers:
    """Rounds: ours on every work, each of the others on a few rows; a peer that fails drops out."""
    found: Answers = defaultdict(list)
    warm = Work("", 32, 32, 2, vocab=todo[0].vocab)
    rows = [i for i, (_, trains) in enumerate(todo[0].leaves()) if trains][:MICRO]
    for k in range(repeats + 1):
        asked: list[tuple[str, str, dict[str, Any]]] = []
        for i, work in enumerate(todo if k else [warm]):
            asked.append((work.name, "ours", {"work": work.as_dict(), "layout": "tree"}))
            if i == 0:
                for who in ("ours", *(e.key for e in OTHERS)):
                    name = "rows" if who == "ours" else who
                    asked.append((name, who, {"work": work.as_dict(), "layout": "rows"}))
        for name, who, request in asked:
            if who not in running:
                continue
            try:
                got = running[who].ask("step", rows=rows if k else [0, 1], **request)
            except EngineFailed as error:
                notes[who] = f"error: {last_line(error)}"
                running.pop(who).close()
                continue
            if k:
                found[name].append(got)
                print(f"round {k}, {who} on {name}: {got['cpu']:.1f} CPU-s", file=sys.stderr)
    found["checksum"] = [running["ours"].ask("checksum") for _ in range(repeats)]
    return found


def scaled(answer: dict[str, Any], rows: float) -> dict[str, float]:
    """A whole step from one over MICRO rows; rows = MICRO for one that was timed whole."""
    times = rows / MICRO
    return {
        clock: times * answer[clock] + answer[f"update_{clock}"] for clock in ("wall", "cpu")
    } | {"tokens": times * answer["tokens"], "peak": answer["peak_bytes"] / 2**20}


def section(work: Work, found: Answers) -> tuple[str, list[Case]]:
    leaves = work.leaves()
    trained = sum(trains for _, trains in leaves)
    steps = {"ours": [scaled(a, MICRO) for a in found[work.name]]}
    parts = {"rows": ("rows", trained), "padded": ("padded", len(leaves)), "TRL": ("trl", len(leaves))}  # fmt: skip
    if trained < len(leaves):
        parts["TRL, rows that train"] = ("trl", trained)
    for name, (asked, rows) in parts.items():
        if found[asked]:
            steps[name] = [scaled(a, rows) for a in found[asked]]
    median = {
        who: {key: statistics.median(s[key] for s in each) for key in each[0]}
        for who, each in steps.items()
    }

    def case(name: str, unit: str, value: Any, higher: bool = False) -> Case:
        peers = {who: value(m) for who, m in median.items()}
        return Case(name, unit, peers.pop("ours"), peers, higher_is_better=higher)

    ours, tokens = median["ours"], work.trained_tokens()
    title = f"{work.name}, {work.prompt}+{work.response}: {len(leaves)} rows, {trained} train, {tokens:,} tokens"
    return title, [
        case("tokens read", "", lambda m: m["tokens"]),
        case("× ours", "", lambda m: m["tokens"] / ours["tokens"]),
        case("CPU", "s", lambda m: m["cpu"]),
        case("× ours' CPU", "", lambda m: m["cpu"] / ours["cpu"]),
        case("wall", "s", lambda m: m["wall"]),
        case("trained tokens", "per CPU-s", lambda m: tokens / m["cpu"], True),
        case("peak memory", "MiB", lambda m: m["peak"]),
    ]


def shares(work: Work, found: Answers) -> list[Case]:
    """What does not train, in percent of the CPU time of our step on `work`."""
    answers = found[work.name]
    step = statistics.median(a["cpu"] + a["update_cpu"] for a in answers)
    parts = {
        "packing": statistics.median(a["packing_cpu"] for a in answers),
        "finite checks": statistics.median(a["guards_cpu"] for a in answers),
        "checksum of all weights": statistics.median(a["cpu"] for a in found["checksum"]),
    }
    return [Case(name, "% of the step", 100 * value / step) for name, value in parts.items()]


def memory(quick: bool) -> dict[str, list[Case]]:
    from bench.peers.learner.step_memory import peak

    long, short = (256, 128) if quick else (2048, 512)
    sizes = (long,) if quick else (short, 2 * short, long, 2 * long)
    cases = []
    for vocab in (4096, 49152) if quick else (4096, 49152, 151936):
        found = in_fresh_process(peak, vocab, long)
        if found:
            cases.append(Case(f"V={vocab:,}, {found[0]:,} tokens", "MiB", found[1]))
    for response in sizes:
        found = in_fresh_process(peak, 49152, response)
        if found:
            cases.append(Case(f"{found[0]:,} tokens", "KiB per token", 1024 * found[1] / found[0]))
    return {"Memory of forward and backward, 4 layers": cases}


def zero(folder: Path, quick: bool, notes: dict[str, str]) -> dict[str, list[Case]]:
    """Seconds of a step per stage; every rank has the same tree, so two ranks do twice the work."""
    work = Work("", 64, 64, 4, 3) if quick else Work("", 128, 128, 4, 3)
    settings = {"model": str(folder), "work": work.as_dict(), "repeats": 1 if quick else 3}
    cases = []
    for ranks in (1, 2):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]  # fmt: skip
        try:
            done = subprocess.run(
                [*command, str(PEERS / "zero_steps.py"), json.dumps(settings)],
                capture_output=True, text=True, timeout=ZERO_LIMIT_S, env=os.environ | {"OMP_NUM_THREADS": "1"},
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            notes[f"ZeRO, {ranks} ranks"] = f"no answer in {ZERO_LIMIT_S} s"
            continue
        lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
        if done.returncode or not lines:
            notes[f"ZeRO, {ranks} ranks"] = (done.stderr.strip().splitlines() or ["no output"])[-1]
            continue
        for stage, seconds in json.loads(lines[-1]).items():
            cases.append(Case(f"stage {stage}, {ranks} rank{'s' * (ranks > 1)}", "s", seconds))
    return {f"ZeRO, wall seconds of a step, {work.prompt}+{work.response} a rank": cases}


def main() -> None:
    args = arguments()
    parts = set((args.only or "steps,memory" + ",zero" * (not args.quick)).split(","))
    sections: dict[str, list[Case]] = {}
    notes: dict[str, str] = {}
    found: Answers = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.model or model_folder(scratch, args.quick)
        if "steps" in parts:
            vocab = json.loads((folder / "config.json").read_text())["vocab_size"]
            todo, running = works(args.quick, vocab), start(args, folder, notes)
            if "ours" not in running:
                raise SystemExit(f"our learner failed: {notes['ours']}")
            try:
                found = play(running, todo, args.repeats or (1 if args.quick else 2), notes)
            finally:
                for peer in running.values():
                    peer.close()
            sections |= dict(section(work, found) for work in todo)
            sections[f"Beside training, {todo[0].name}"] = shares(todo[0], found)
        if "zero" in parts:
            sections |= zero(folder, args.quick, notes)
        if "memory" in parts:
            sections |= memory(args.quick)
    report_by_implementation(sections, notes, args, answers=dict(found))


if __name__ == "__main__":
    main()
