"""transformers' continuous batching with its prefix sharing.

A fork, or the turn after a tool call, is a new request.

`generate_batch` takes all its requests at once, so this drives the manager behind it, which runs in
a thread.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.generation import ContinuousBatchingConfig

sys.path.append(str(Path(__file__).resolve().parents[3]))  # the checkout, for `bench`

from bench.peers.rollout.grow import Drawn
from bench.peers.rollout.serve import Stepwise, serve

# tokens that are shared or not; the default of 256 would make every fork run up to 255 tokens again
PAGE = 32
POLL_S = 0.002


class Requests:
    fork_is_call = False

    def __init__(self, model: Any, manager: Any):
        self.manager, self.rows = manager, 0
        self.tokens: dict[int, list[int]] = {}
        self.drawing: dict[str, int] = {}  # request → handle
        self._next = 0
        model.get_input_embeddings().register_forward_pre_hook(self._count)
        manager.start()

    def _count(self, module: Any, args: tuple[Tensor, ...]) -> None:
        self.rows += args[0].numel()

    def prompt(self, ids: Sequence[int]) -> int:
        """Drawing on the prompt leaves its pages where the roots find them.

        They do not if it ends with its prefill.
        """
        seq = self._add(list(ids))
        probe = self._add(list(ids))
        self.draw(probe, 2)
        while self.busy():
            self.step()
        self.release(probe)
        return seq

    def fork(self, seq: int, at: int) -> int:
        return self._add(self.tokens[seq][:at])

    def _add(self, ids: list[int]) -> int:
        self._next += 1
        self.tokens[self._next] = ids
        return self._next

    def append(self, seq: int, ids: Sequence[int]) -> None:
        self.tokens[seq] += ids

    def draw(self, seq: int, count: int) -> None:
        self._next += 1
        name = str(self._next)
        self.drawing[name] = seq
        self.manager.add_request(
            list(self.tokens[seq]), request_id=name, max_new_tokens=count, eos_token_id=-1
        )

    def step(self) -> dict[int, Drawn]:
        out = self.manager.get_result(timeout=POLL_S)
        if out is None:
            if not self.manager.is_running():
                raise RuntimeError("the thread of the continuous batching manager ended")
            return {}
        if not out.is_finished():
            return {}
        if out.error is not None:
            raise RuntimeError(out.error)
        seq = self.drawing.pop(out.request_id)
        self.tokens[seq] += out.generated_tokens
        return {seq: Drawn(list(out.generated_tokens), list(out.logprobs))}

    def busy(self) -> bool:
        return bool(self.drawing)

    def release(self, seq: int) -> None:
        del self.tokens[seq]


def make(settings: dict[str, Any]) -> Stepwise:
    torch.set_num_threads(settings["threads"])
    model = AutoModelForCausalLM.from_pretrained(settings["model"], dtype=torch.bfloat16).eval()
    sampling = GenerationConfig(
        do_sample=True, temperature=1.0, top_k=0, top_p=1.0, eos_token_id=-1, pad_token_id=0
    )
    # Sizes must be given where there is no GPU memory to infer them from.
    memory = ContinuousBatchingConfig(
        page_size=PAGE,
        num_blocks=settings["kv_tokens"] // PAGE,
        max_batch_tokens=512,
        return_logprobs=True,
    )
    manager = model.init_continuous_batching(
        generation_config=sampling, continuous_batching_config=memory
    )
    return Stepwise(
        Requests(model, manager),
        "log-prob of every drawn token",
        f"transformers {transformers.__version__}",
    )


if __name__ == "__main__":
    serve(make)
