"""llama.cpp through the low-level API of llama-cpp-python.

Forks by `llama_memory_seq_cp`, which copies nothing.

All sequences share one cache (`kv_unified`); each forward takes one token of every drawing sequence
and, as far as they fit, the tokens that others still lack. Sampling is an inverse CDF in numpy.
Environment: requirements/bench-llama.txt.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np

sys.path.append(str(Path(__file__).resolve().parents[3]))  # the checkout, for `bench`

from bench.peers.rollout.grow import Drawn
from bench.peers.rollout.serve import Stepwise, serve

BATCH = 512  # tokens of one forward


@dataclass
class Line:
    """A sequence: its tokens, how many of them have KV, and where."""

    slot: int  # llama.cpp's sequence id
    tokens: list[int]
    computed: int = 0
    wanted: int = 0
    drawn: Drawn = field(default_factory=Drawn)


class Sequences:
    fork_is_call = True

    def __init__(self, settings: dict[str, Any]):
        llama_cpp.llama_backend_init()
        params = llama_cpp.llama_model_default_params()
        self.model = llama_cpp.llama_model_load_from_file(settings["gguf"].encode(), params)
        if not self.model:
            raise RuntimeError(f"llama.cpp cannot read {settings['gguf']}")
        options = llama_cpp.llama_context_default_params()
        options.n_ctx = settings["kv_tokens"]
        options.n_batch = options.n_ubatch = BATCH
        options.n_seq_max = settings["sequences"] + 2
        options.n_threads = options.n_threads_batch = settings["threads"]
        options.kv_unified = True  # parts of a sequence can be shared only here
        options.no_perf = True
        self.context = llama_cpp.llama_init_from_model(self.model, options)
        if not self.context:
            raise RuntimeError(f"llama.cpp has no room for {settings['kv_tokens']} tokens")
        self.memory = llama_cpp.llama_get_memory(self.context)
        self.vocab = settings["vocab"]
        self.batch = llama_cpp.llama_batch_init(BATCH, 0, 1)
        self.noise = np.random.default_rng(0)
        self.free = list(range(options.n_seq_max))
        self.lines: dict[int, Line] = {}
        self.drawing: list[int] = []  # handles
        self.rows = self._next = 0

    # -- sequences ---------------------------------------------------------------------------------

    def prompt(self, ids: Sequence[int]) -> int:
        """Computed here and now but for its last token, so that forks find it."""
        seq = self._add(Line(self.free.pop(), list(ids)))
        line = self.lines[seq]
        while line.computed < len(ids) - 1:
            count = min(BATCH, len(ids) - 1 - line.computed)
            self._forward([(line, count, False)])
        return seq

    def fork(self, seq: int, at: int) -> int:
        parent = self.lines[seq]
        child = Line(self.free.pop(), parent.tokens[:at], min(parent.computed, at - 1))
        llama_cpp.llama_memory_seq_cp(self.memory, parent.slot, child.slot, 0, child.computed)
        return self._add(child)

    def _add(self, line: Line) -> int:
        self._next += 1
        self.lines[self._next] = line
        return self._next

    def append(self, seq: int, ids: Sequence[int]) -> None:
        self.lines[seq].tokens += ids

    def draw(self, seq: int, count: int) -> None:
        line = self.lines[seq]
        line.wanted, line.drawn = count, Drawn()
        self.drawing.append(seq)

    def busy(self) -> bool:
        return bool(self.drawing)

    def release(self, seq: int) -> None:
        line = self.lines.pop(seq)
        llama_cpp.llama_memory_seq_rm(self.memory, line.slot, -1, -1)
        self.free.append(line.slot)

    # -- running -----------------------------------------------------------------------------------

    def step(self) -> dict[int, Drawn]:
        plan, room = [], BATCH
        # Those that lack one token first: a long prefill must not hold them up.
        for seq in sorted(self.drawing, key=lambda s: self._lacks(self.lines[s])):
            line = self.lines[seq]
            count = min(room, self._lacks(line))
            if count:
                plan.append((line, count, count == self._lacks(line)))
                room -= count
        tokens, logprobs = self._sample(self._forward(plan))
        done = {}
        for line, token, logprob in zip((p[0] for p in plan if p[2]), tokens, logprobs):
            line.tokens.append(token)
            line.drawn.tokens.append(token)
            line.drawn.logprobs.append(logprob)
        for seq in list(self.drawing):
            line = self.lines[seq]
            if len(line.drawn.tokens) == line.wanted:
                self.drawing.remove(seq)
                done[seq] = line.drawn
        return done

    @staticmethod
    def _lacks(line: Line) -> int:
        return len(line.tokens) - line.computed

    def _forward(self, plan: Sequence[tuple[Line, int, bool]]) -> np.ndarray:
        """Run (line, tokens, whether the last one's logits are wanted).

        → logits float32 [wanted, V], llama.cpp's memory.
        """
        batch, row = self.batch, 0
        for line, count, wanted in plan:
            for position in range(line.computed, line.computed + count):
                batch.token[row] = line.tokens[position]
                batch.pos[row] = position
                batch.n_seq_id[row] = 1
                batch.seq_id[row][0] = line.slot
                batch.logits[row] = 0
                row += 1
            batch.logits[row - 1] = wanted
            line.computed += count
        batch.n_tokens = row
        code = llama_cpp.llama_decode(self.context, batch)
        if code:
            raise RuntimeError(f"llama_decode of {row} tokens answered {code}")
        self.rows += row
        outputs = sum(wanted for _, _, wanted in plan)
        if not outputs:
            return np.empty((0, self.vocab), np.float32)
        pointer = llama_cpp.llama_get_logits(self.context)
        address = ctypes.cast(pointer, ctypes.POINTER(ctypes.c_float))
        return np.ctypeslib.as_array(address, (outputs, self.vocab))

    def _sample(self, logits: np.ndarray) -> tuple[list[int], list[float]]:
        """Draws at temperature 1 and their log-probs."""
        shifted = logits - logits.max(1, keepdims=True)
        sums = np.exp(shifted).cumsum(1)
        total = sums[:, -1]
        marks = self.noise.random(len(logits), np.float32) * total
        tokens = [min(int(s.searchsorted(m)), self.vocab - 1) for s, m in zip(sums, marks)]
        logprobs = shifted[np.arange(len(tokens)), tokens] - np.log(total)
        return tokens, logprobs.tolist()


def make(settings: dict[str, Any]) -> Stepwise:
    backend = Sequences(settings)
    version = f"llama-cpp-python {llama_cpp.__version__}"
    return Stepwise(backend, "log-prob of every drawn token", version)


if __name__ == "__main__":
    serve(make)
