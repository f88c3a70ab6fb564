"""A scripted engine and a byte tokenizer: tree growth can be tested without a model."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

import numpy as np

from appo.errors import EngineError, StaleWeightsError
from appo.rollout.engine import SamplingParams, Scored, SequenceStopped
from appo.tools.base import ToolResult

EOS = 256


class ByteTokenizer:
    """Ids 0-255 are bytes, 256 ends the turn."""

    eos_token_id = EOS
    all_special_ids = [EOS]
    added_tokens_decoder = {EOS: "<eos>"}

    def __len__(self):
        return 257

    def get_vocab(self):
        return {"<eos>": EOS}

    def convert_ids_to_tokens(self, ids):
        from appo.rollout.tags import _byte_level_table

        table = {b: c for c, b in _byte_level_table().items()}
        return ["<eos>" if i == EOS else table[i] for i in ids]

    def __call__(self, text, add_special_tokens=False):
        return {"input_ids": list(text.encode())}


@dataclass
class _Seq:
    ids: list[int]
    version: int
    params: SamplingParams | None = None
    seed: int = 0
    new: list[int] = field(default_factory=list)


class ScriptedEngine:
    """`script(ids so far, seed) -> next id`.

    log-probs and entropies are a hash of (prefix, version).
    """

    def __init__(self, script, max_context=4096):
        self.script, self.max_context, self.policy_version = script, max_context, 0
        self.seqs: dict[int, _Seq] = {}
        self.forks: list[tuple[int, int]] = []
        self.scored = 0
        self._next = 0

    def _add(self, seq):
        self._next += 1
        self.seqs[self._next] = seq
        return self._next

    def add_prompt(self, token_ids):
        return self._add(_Seq(list(token_ids), self.policy_version))

    def fork(self, seq, at):
        parent = self.seqs[seq]
        if not 1 <= at <= len(parent.ids):
            raise EngineError(f"fork at {at}")
        if parent.version != self.policy_version:
            raise StaleWeightsError("fork of an old sequence")
        self.forks.append((seq, at))
        return self._add(_Seq(parent.ids[:at], self.policy_version))

    def append(self, seq, token_ids):
        self.seqs[seq].ids += token_ids

    def submit(self, seq, params, seed):
        s = self.seqs[seq]
        s.params, s.seed, s.new = params, seed, []

    def has_work(self):
        return any(s.params for s in self.seqs.values())

    def step(self):
        out = []
        for key, s in list(self.seqs.items()):
            if s.params is None:
                continue
            token = self.script(s.ids, s.seed)
            s.ids.append(token)
            s.new.append(token)
            stop = s.params.stop(token) if s.params.stop else False
            reason = ("stop_token" if token in s.params.stop_token_ids else "stop" if stop else
                      "length" if len(s.new) >= s.params.max_new_tokens or len(s.ids) >= self.max_context else None)  # fmt: skip
            if reason:
                stats = [
                    self.stat(s.ids[: len(s.ids) - len(s.new) + i + 1]) for i in range(len(s.new))
                ]
                out.append(
                    SequenceStopped(
                        key,
                        s.new,
                        [a for a, _ in stats],
                        [b for _, b in stats],
                        reason,
                        self.policy_version,
                    )
                )
                s.params = None
        return out

    def stat(self, prefix):
        raw = hashlib.sha256(repr(prefix).encode()).digest()
        moved = (
            0.02 * (raw[2] / 255 - 0.5) * self.policy_version
        )  # small, or Omega is clipped everywhere
        return -raw[0] / 64 - 0.1 + moved, raw[1] / 128

    def score(self, seqs, temperature=1.0):
        out = []
        for key in seqs:
            s = self.seqs[key]
            s.version = self.policy_version
            stats = [self.stat(s.ids[: i + 1]) for i in range(1, len(s.ids))]
            self.scored += len(s.ids)
            out.append(Scored(np.array([a for a, _ in stats], np.float32), np.array([b for _, b in stats], np.float32),
                              self.policy_version))  # fmt: skip
        return out

    def release(self, seq):
        del self.seqs[seq]

    def length(self, seq):
        return len(self.seqs[seq].ids)

    def load_weights(self, named_tensors, version):
        self.policy_version = version

    def stats(self):
        return {}


class InstantPool:
    """A tool pool that answers at once: the tool says how long its argument was."""

    def __init__(self):
        self.done, self.calls = [], []

    def submit(self, key, tool, argument):
        self.calls.append((tool, argument))
        self.done.append((key, ToolResult(f"{len(argument)}", True, 0.001)))

    def poll(self):
        out, self.done = self.done, []
        return out

    def wait(self, timeout):
        return self.poll()

    def wait_all(self):
        return sorted(self.poll(), key=lambda kv: kv[0])
