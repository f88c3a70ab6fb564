"""vLLM's interface over a model small enough to check by hand, with the traps of the real one.

The model: the state of position t is the sum of the embeddings up to t, each weighted 0.7 per step
back; logits are state · head. Embedding rows are what is cached ("KV"), under (salt, block of ids),
so KV of old weights shows in the log-probs. The head is tied and is a *copy* of the embedding that
a reload leaves alone, as on a CPU.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from appo.rollout.vllm import worker_statistics
from appo.rollout.vllm.start import Api

VOCAB, WIDTH, BLOCK = 23, 6, 32
EMBED = "model.embed_tokens.weight"


def dense(embed, ids, temperature=1.0):
    """(log-probs of tokens 1 …, entropies) by the definition."""
    state, logp, entropy = torch.zeros(WIDTH, dtype=torch.float64), [], []
    e = embed.double()
    for here, following in itertools.pairwise(ids):
        state = 0.7 * state + e[here]
        row = torch.log_softmax(e @ state / temperature, -1)
        logp.append(float(row[following]))
        entropy.append(float(-(row.exp() * row).sum()))
    return np.array(logp), np.array(entropy)


@dataclass
class Params:
    """vllm.SamplingParams: the fields used, with their defaults; an unknown one is an error."""

    max_tokens: int = 16
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop_token_ids: list = field(default_factory=list)
    ignore_eos: bool = False
    detokenize: bool = True
    output_kind: Any = "cumulative"
    extra_args: dict | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    flat_logprobs: bool = False
    skip_reading_prefix_cache: bool | None = None


@dataclass
class Request:
    key: str
    ids: list
    salt: str
    sampling_params: Params
    num_computed_tokens: int = 0
    kv: list = field(default_factory=list)
    sampled: list = field(default_factory=list)
    cached: int = 0
    generator: Any = None
    row: int = -1
    prompt_token_ids: list = field(default_factory=list)


class Core:
    """vllm.LLM().llm_engine. `chunk`: prefill rows a step, as chunked prefill on a GPU."""

    def __init__(self, embed, processors, chunk=None, limits=None):
        self.embed, self.head, self.chunk = embed, embed.clone(), chunk
        self.cache, self.requests, self.seen = {}, {}, []
        self.entropies = worker_statistics.SampledEntropies() if processors else None
        self.label, self.labels, self.aborted, self.extra = "default", [], [], 0
        self.max_rows = limits["max_num_seqs"]
        self.runner = SimpleNamespace(
            requests=self.requests, model=SimpleNamespace(compute_logits=lambda h: h @ self.head.T),
            query_start_loc=SimpleNamespace(np=None), input_batch=SimpleNamespace(req_id_to_index={}),
            _get_prompt_logprobs_dict=lambda hidden_states, num_scheduled_tokens: {},
        )  # fmt: skip

    def set_weight_version(self, label):
        self.label = label
        self.labels.append(label)

    def add_request(self, key, prompt, params):
        assert isinstance(params, Params) and not params.detokenize
        ids = prompt["prompt_token_ids"]
        generator = torch.Generator().manual_seed(params.seed) if params.seed is not None else None
        r = Request(
            key, list(ids), prompt["cache_salt"], params, generator=generator, prompt_token_ids=ids
        )
        self.requests[key] = r
        self.seen.append(r)

    def abort_request(self, keys):
        for key in keys:
            self.aborted.append(key)
            self._drop(self.requests[key])

    def _drop(self, r):
        del self.requests[r.key]
        if self.entropies is not None and r.row >= 0:
            self.entropies.update([r.row], [], [])

    def _blocks(self, r):
        return [(r.salt, tuple(r.ids[: i + BLOCK])) for i in range(0, len(r.ids) - BLOCK + 1, BLOCK)]  # fmt: skip

    def _lookup(self, r):
        skip = r.sampling_params.skip_reading_prefix_cache
        if skip if skip is not None else r.sampling_params.prompt_logprobs is not None:
            return
        for key in self._blocks(r):
            if key not in self.cache or len(key[1]) >= len(r.ids):
                return
            r.kv += self.cache[key]
            r.num_computed_tokens = r.cached = len(key[1])

    def step(self):
        active = list(self.requests.values())[: self.max_rows]
        hidden, scheduled, starts, index = [], {}, [], {}
        for n, r in enumerate(active):
            if r.row < 0:
                self._lookup(r)
            if r.row != n and self.entropies is not None:  # rows move up when others leave
                self.entropies.update(
                    [], [(n, r.sampling_params, r.prompt_token_ids, r.sampled)], []
                )
            r.row = n
            count = min(len(r.ids) - r.num_computed_tokens, self.chunk or 10**9)
            starts.append(len(hidden))
            index[r.key], scheduled[r.key] = n, count
            for t in range(r.num_computed_tokens, r.num_computed_tokens + count):
                r.kv.append(self.embed[r.ids[t]].clone())
                decay = 0.7 ** torch.arange(t, -1, -1, dtype=torch.float32)
                hidden.append((torch.stack(r.kv) * decay[:, None]).sum(0))
        if self.entropies is not None:
            self.entropies.update(range(len(active), self.max_rows), [], [])
        self.runner.query_start_loc.np, self.runner.input_batch.req_id_to_index = (
            np.array(starts),
            index,
        )
        self.runner._get_prompt_logprobs_dict(torch.stack(hidden), scheduled)
        last = [starts[n] + scheduled[r.key] - 1 for n, r in enumerate(active)]
        logits = torch.stack(hidden)[last] @ self.head.T
        if self.entropies is not None:
            self.entropies.see(logits)
        return [o for n, r in enumerate(active) if (o := self._draw(r, scheduled[r.key], logits[n]))]  # fmt: skip

    def _draw(self, r, count, logits):
        p = r.sampling_params
        r.num_computed_tokens += count
        for key in self._blocks(r):
            if len(key[1]) <= r.num_computed_tokens:
                a = len(key[1])
                self.cache.setdefault(key, r.kv[a - BLOCK : a])
        if r.num_computed_tokens < len(r.ids):
            return None  # a part of its prefill: the row was shown, the draw is thrown away
        row = torch.log_softmax(logits / (p.temperature or 1.0), -1)
        new = []
        for _ in range(1 + self.extra):
            token = (
                int(row.argmax()) if p.temperature == 0 else int(torch.multinomial(row.exp(), 1, generator=r.generator))
            )  # fmt: skip
            new.append(token)
        first = not r.sampled
        r.sampled += new
        r.ids += new
        reason = "stop" if new[-1] in p.stop_token_ids else "length" if len(r.sampled) >= p.max_tokens else None  # fmt: skip
        spans = (
            [SimpleNamespace(version=self.label, start=0, end=len(r.sampled))]
            if reason and self.labels
            else None
        )
        out = SimpleNamespace(
            token_ids=new, logprobs=[self._report(row, t, p.logprobs, p.flat_logprobs) for t in new],
            finish_reason=reason, stop_reason=None, weight_versions=spans,
        )  # fmt: skip
        if p.flat_logprobs and p.logprobs is not None:
            out.logprobs = flat(out.logprobs)
        if reason:
            self._drop(r)
        return SimpleNamespace(
            request_id=r.key, outputs=[out], finished=reason is not None, num_cached_tokens=r.cached,
            prompt_logprobs=self._prompt(r) if first and p.prompt_logprobs is not None else None,
        )  # fmt: skip

    def _report(self, row, token, k, whole=False):
        if k is None:
            return None
        top = range(VOCAB) if whole else row.topk(k).indices.tolist()
        return {t: SimpleNamespace(logprob=float(row[t])) for t in [token, *top]}

    def _prompt(self, r):
        """At temperature 1, whatever the request says."""
        p, states = r.sampling_params, []
        for t in range(len(r.prompt_token_ids) - 1):
            decay = 0.7 ** torch.arange(t, -1, -1, dtype=torch.float32)
            states.append((torch.stack(r.kv[: t + 1]) * decay[:, None]).sum(0))
        rows = torch.log_softmax(torch.stack(states) @ self.head.T, -1)
        k, whole = p.prompt_logprobs, p.flat_logprobs
        out = [None] + [self._report(x, t, k, whole) for x, t in zip(rows, r.prompt_token_ids[1:])]
        return flat(out) if whole else out


class Flat(SimpleNamespace):
    def __len__(self):
        return len(self.start_indices)


def flat(positions):
    """vllm.logprobs.FlatLogprobs."""
    out = Flat(start_indices=[], end_indices=[], token_ids=[], logprobs=[])
    for position in positions:
        out.start_indices.append(len(out.token_ids))
        for token, x in (position or {}).items():
            out.token_ids.append(token)
            out.logprobs.append(x.logprob)
        out.end_indices.append(len(out.token_ids))
    return out


class FakeLLM:
    """vllm.LLM. `reload` may be replaced to misbehave."""

    last: FakeLLM

    def __init__(self, *, chunk=None, embed=None, **arguments):
        self.arguments = arguments
        self.llm_engine = Core(embed, arguments.get("logits_processors"), chunk, arguments)
        self.calls, self.resets, self.reset_answer = [], 0, True
        self.retie, self.written = True, None
        FakeLLM.last = self
        torch.manual_seed(0)  # as the real one does
        torch.set_num_threads = lambda n: None

    def collective_rpc(self, method, args=(), kwargs=None):
        self.calls.append((method, args, kwargs))
        return [getattr(self, method)(*args, **(kwargs or {}))]

    def appo_attach(self):
        worker_statistics.attach(self.llm_engine.runner)

    def appo_take_sampled(self, keys):
        return worker_statistics.take_sampled(keys)

    def appo_take_scored(self, keys):
        return worker_statistics.take_scored(keys)

    def appo_load(self, items=None, path=None):
        if items is None:
            from safetensors.torch import load_file

            items = load_file(path).items()
        new = dict(items)
        self.llm_engine.embed = new[EMBED]
        if self.retie:
            self.llm_engine.head = new[EMBED].clone()
        return self.written if self.written is not None else sorted(new)

    def reset_prefix_cache(self):
        self.resets += 1
        if self.reset_answer:
            self.llm_engine.cache.clear()
        return self.reset_answer


def api(cpu=True):
    return Api(FakeLLM, Params, dict, "delta", cpu)
