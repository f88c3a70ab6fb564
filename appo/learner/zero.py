"""DeepSpeed, brought up the same way in one plain process and under torchrun.

Everything that goes wrong by default is decided here: no C++ extension is compiled at first use (a
client torch.optim.AdamW, no shared-memory collectives), one process needs no port and no launcher,
the loss is not scaled behind our back, and gradients are accumulated in float32 when weights are
bfloat16.
"""

from __future__ import annotations

import atexit
import contextlib
import io
import logging
import math
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from appo.config import LearnerConfig

if not torch.cuda.is_available():  # before anything (transformers does) imports DeepSpeed
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

# Elements that DeepSpeed sends at a time; its buffers have this size. The default (5e8) takes 2 GB
# of float32 per rank at stages 2 and 3, whatever the model; from a few tens of megabytes on a
# larger message is no faster.
BUCKET = 50_000_000

# Stage 3 keeps parameters of fewer elements whole on every rank: norms and small adapters are not
# worth a gather.
KEPT_WHOLE = 100_000


def import_deepspeed() -> Any:
    """DeepSpeed with its CPU collectives off and its chatter too.

    Building the collectives takes two minutes at first use.
    """
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # torch has renamed collectives that DeepSpeed calls
    warnings.filterwarnings(
        "ignore", r"`torch\.distributed\..* is deprecated", FutureWarning, r"torch\.distributed"
    )
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def join_group() -> torch.device:
    """Join the process group of the launcher, or make a group of one without opening a port.

    Returns our device.

    The group lives as long as the process: DeepSpeed remembers it and cannot be told of another.
    """
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    if not dist.is_initialized():
        if "WORLD_SIZE" in os.environ and "MASTER_ADDR" in os.environ:
            dist.init_process_group(backend)
        else:
            _group_of_one(backend)
        atexit.register(dist.destroy_process_group)
    elif dist.get_world_size() == 1:
        _name_ranks()  # a rollout engine in this process (vLLM) has made the group
    if backend == "gloo":
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    return device


def _group_of_one(backend: str) -> None:
    _name_ranks()
    folder = tempfile.mkdtemp(prefix="appo-group-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    dist.init_process_group(backend, init_method=f"file://{folder}/store", rank=0, world_size=1)


def _name_ranks() -> None:
    for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1")):
        os.environ[name] = value  # DeepSpeed reads them


def zero_config(s: LearnerConfig, dtype: str, trained: int = BUCKET) -> dict[str, Any]:
    """DeepSpeed's configuration for `trained` parameters.

    One micro-batch is one backward; boundaries are set by hand.
    """
    bf16 = dtype == "bfloat16"
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": s.max_grad_norm,  # 0: DeepSpeed clips nothing
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": _zero_optimization(s, max(1, min(BUCKET, trained))),
        "bf16": {"enabled": bf16},
        "steps_per_print": 2**31,
        "wall_clock_breakdown": False,
    }
    if bf16 and s.zero_stage:
        config["data_types"] = {"grad_accum_dtype": "fp32"}
        config["communication_data_type"] = "fp32"
    return config


def _zero_optimization(s: LearnerConfig, bucket: int) -> dict[str, Any]:
    out: dict[str, Any] = {"stage": s.zero_stage, "reduce_bucket_size": bucket}
    out["allgather_bucket_size"] = BUCKET
    if s.zero_stage == 3:
        out["stage3_prefetch_bucket_size"] = BUCKET
        out["stage3_param_persistence_threshold"] = KEPT_WHOLE
    cpu = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    if s.offload != "none":
        out["offload_optimizer"] = cpu
    if s.offload == "all":
        out["offload_param"] = cpu
    return out


def start_engine(model: nn.Module, s: LearnerConfig, dtype: str) -> Any:
    """The DeepSpeed engine around `model`, with AdamW on the parameters that require a gradient."""
    deepspeed = import_deepspeed()
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        params,
        lr=s.lr,
        betas=(s.betas[0], s.betas[1]),
        eps=s.eps,
        weight_decay=s.weight_decay,
        fused=True,
    )  # fused: one pass over memory, a tenth of the time on a CPU
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter(
            "ignore", FutureWarning
        )  # names that transformers renames and DeepSpeed still reads
        engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=optimizer,
            config=zero_config(s, dtype, sum(p.numel() for p in params)),
            dist_init_required=False,
        )
    return engine


def gathered(params: Iterable[nn.Parameter]) -> AbstractContextManager:
    """ZeRO-3: the whole value of partitioned parameters inside the context."""
    deepspeed = import_deepspeed()
    return deepspeed.zero.GatheredParameters(list(params), modifier_rank=None)


def learning_rate(s: LearnerConfig, step: int, total_steps: int) -> float:
    """Learning rate of the optimiser step number `step` (0 for the first).

    Linear warm-up over `warmup_steps`, then constant, or to 0 at `total_steps` by a line or half a
    cosine. Only steps that changed weights count: skipped mini-batches do not advance the schedule.
    """
    if step < s.warmup_steps:
        return s.lr * (step + 1) / s.warmup_steps
    if s.schedule == "constant":
        return s.lr
    done = min(1.0, (step - s.warmup_steps) / max(1, total_steps - s.warmup_steps))
    return s.lr * (1 - done if s.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done)))
