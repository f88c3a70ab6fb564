"""Native engine against Hugging Face `generate`: tokens a second, cost of a fork, prefill.

    OMP_NUM_THREADS=1 python bench/engine/engine.py [--quick] [--json FILE]

Both sample at temperature 1 from the full vocabulary, in bfloat16, in one process with one thread,
in turn. "shared": one prompt of 128 tokens, B samples of it (what a group of rollouts is);
"distinct": B prompts. Times include prefill. APPO_BENCH_MODEL=folder uses a real model; by default
random weights in the shape of SmolLM2-135M.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from appo.rollout.engine import SamplingParams
from appo.rollout.native import NativeEngine

sys.path.append(str(Path(__file__).resolve().parents[2]))  # the checkout, for `bench`

from bench.common import Case, arguments, medians, report

PROMPT = 128


def model_folder(scratch: str, quick: bool) -> Path:
    """The folder to load; --quick shrinks the random model to six layers."""
    if os.environ.get("APPO_BENCH_MODEL"):
        return Path(os.environ["APPO_BENCH_MODEL"])
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=576, intermediate_size=1536, num_hidden_layers=6 if quick else 30, num_attention_heads=9,
        num_key_value_heads=3, vocab_size=49152, tie_word_embeddings=True, max_position_embeddings=8192,
    )  # fmt: skip
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(scratch)
    return Path(scratch)


def prompts(count: int, length: int, vocab: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(count)
    return torch.randint(0, vocab, (count, length), generator=generator).tolist()


def ours(engine: NativeEngine, ids: list[list[int]], batch: int, new: int) -> Callable[[], None]:
    def run() -> None:
        roots = [engine.add_prompt(p) for p in ids]
        seqs = [engine.fork(roots[i % len(roots)], PROMPT) for i in range(batch)]
        for i, seq in enumerate(seqs):
            engine.submit(seq, SamplingParams(new), seed=i)
        while engine.has_work():
            engine.step()
        for seq in roots + seqs:
            engine.release(seq)

    return run


def generate(model, ids: list[list[int]], batch: int, new: int) -> Callable[[], None]:
    inputs = torch.tensor([ids[i % len(ids)] for i in range(batch)])
    mask = torch.ones_like(inputs)

    def run() -> None:
        out = model.generate(
            inputs,
            attention_mask=mask,
            max_new_tokens=new,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
        )
        assert out.shape == (batch, PROMPT + new)

    return run


def throughput(engine: NativeEngine, model, quick: bool) -> list[Case]:
    cases = []
    new, repeats = (8, 1) if quick else (64, 3)
    error = logprob_error(engine, model)
    for batch in (1, 8) if quick else (1, 8, 32):
        for kind in ("shared", "distinct") if batch > 1 else ("shared",):
            ids = prompts(1 if kind == "shared" else batch, PROMPT, engine.config.vocab)
            runs = {
                "ours": ours(engine, ids, batch, new),
                "generate": generate(model, ids, batch, new),
            }
            rate = {name: batch * new / s for name, s in medians(runs, repeats).items()}
            name = f"batch {batch}, {kind} prompt {PROMPT}, {new} new"
            peers = {"HF generate": rate["generate"]}
            cases.append(Case(name, "tokens/s", rate["ours"], peers, error, higher_is_better=True))
    return cases


def logprob_error(engine: NativeEngine, model) -> float:
    """Largest difference of our bfloat16 logprobs from the float32 model's, over 63 tokens."""
    ids = prompts(1, 64, engine.config.vocab)[0]
    seq = engine.add_prompt(ids)
    scored = engine.score([seq])[0].logprobs
    engine.release(seq)
    with torch.no_grad():
        logits = model.float()(torch.tensor([ids])).logits[0, :-1]
    model.bfloat16()
    exact = torch.log_softmax(logits.double(), -1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
    return float((torch.tensor(scored) - exact).abs().max())


def forks(engine: NativeEngine, quick: bool) -> list[Case]:
    """A fork at the end of a prefix of `depth` tokens: the call itself, then fork + first token.

    Prefill as the peer.
    """
    cases = []
    for depth in (256,) if quick else (256, 1024, 4096):
        ids = prompts(1, depth, engine.config.vocab)[0]
        base = engine.add_prompt(ids)
        prefill = -time.perf_counter()
        engine.score([base])
        prefill += time.perf_counter()

        def call() -> None:
            engine.release(engine.fork(base, depth))  # noqa: B023

        def first_token() -> None:
            seq = engine.fork(base, depth)  # noqa: B023
            engine.submit(seq, SamplingParams(1), seed=0)
            engine.step()
            engine.release(seq)

        before = engine.stats()
        seconds = medians({"call": call, "first": first_token}, 5 if quick else 15)
        after = engine.stats()
        # every first_token() prefills one token; call() none
        cost = (after["prefill_tokens"] - before["prefill_tokens"]) / (6 if quick else 16)
        cases.append(Case(f"fork at {depth}: call", "us", seconds["call"] * 1e6))
        cases.append(
            Case(f"fork at {depth}: prefilled", "tokens", cost, {"prefill again": float(depth)})
        )
        peers = {"prefill again": prefill * 1e3}
        cases.append(Case(f"fork at {depth}: first token", "ms", seconds["first"] * 1e3, peers))
        engine.release(base)
    return cases


def main() -> None:
    args = arguments(__doc__ or "")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        folder = model_folder(scratch, args.quick)
        engine = NativeEngine(folder, dtype="bfloat16", max_batch=32)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
        model.generation_config.eos_token_id = None  # both sides draw every token
        model.generation_config.pad_token_id = 0
        cases = throughput(engine, model, args.quick) + forks(engine, args.quick)
    report("native engine, bfloat16", cases, args)


if __name__ == "__main__":
    main()
