"""The learner: executes a loss function on packed trees and owns weights, optimiser and their persistence.

One mini-batch is one optimiser step, split into any number of micro-batches; loss denominators are those of the
whole mini-batch over all ranks, so the split never changes the gradient. A mini-batch with anything not finite
in it changes no weight.
"""

from __future__ import annotations

import json
import random
import shutil
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from appo.data.packing import PackedBatch, pack_sequences
from appo.errors import CheckpointError, ConfigError
from appo.kernels import LogProbEntropy
from appo.learner import zero
from appo.learner.forward import Policy, load_model
from appo.learner.guards import NonFiniteGuard, default_dump_dir, poison, why_not_finite
from appo.learner.lora import TARGETS, MergeGain, adapter_tensors, add_lora, merged_tensors
from appo.types import Counts

Metrics = dict[str, tuple[float | Tensor, float | Tensor]]  # name → (sum, count)
LossFunction = Callable[[LogProbEntropy, PackedBatch, Counts], tuple[Tensor, Metrics]]


@dataclass(frozen=True)
class LearnerSettings:
    """How to train. lora_layers counts from the last layer (None: all). max_grad_norm 0 means no clipping.

    threads None leaves torch's number alone; dump_dir None is a folder in the temporary directory.
    """

    mode: Literal["lora", "full"] = "lora"
    lora_r: int = 16
    lora_alpha: float = 32.0
    lora_targets: tuple[str, ...] = TARGETS
    lora_layers: int | None = None
    lr: float = 1e-6
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    warmup_steps: int = 0
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    total_steps: int = 0
    max_grad_norm: float = 1.0
    zero_stage: int = 1
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    gradient_checkpointing: bool = False
    head_backend: Literal["auto", "torch", "cpu", "triton", "cublas32"] = "auto"
    temperature: float = 1.0
    max_nonfinite: int = 3
    threads: int | None = None
    dump_dir: str | None = None

    def __post_init__(self) -> None:
        choices = {
            "mode": ("lora", "full"),
            "schedule": ("constant", "linear", "cosine"),
            "zero_stage": (0, 1, 2, 3),
            "dtype": ("bfloat16", "float32"),
            "head_backend": ("auto", "torch", "cpu", "triton", "cublas32"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ConfigError(
                    f"learner.{name} is {getattr(self, name)!r}; choose one of {allowed}"
                )
        for name, low in {"lr": 0.0, "temperature": 0.0, "max_nonfinite": 0}.items():
            if not getattr(self, name) > low:
                raise ConfigError(
                    f"learner.{name} is {getattr(self, name)!r}; it must be above {low:g}"
                )
        if self.schedule != "constant" and self.total_steps <= self.warmup_steps:
            raise ConfigError(
                f"learner.schedule {self.schedule!r} needs total_steps ({self.total_steps}) above "
                f"warmup_steps ({self.warmup_steps})"
            )
        if self.zero_stage == 0 and self.dtype == "bfloat16":
            raise ConfigError(
                "learner.zero_stage 0 keeps no float32 master weights for bfloat16; use 1 (same cost alone)"
            )


class Learner:
    """A policy under training. Collective: under torchrun every rank makes the same calls in the same order.

    >>> learner = Learner("models/SmolLM2-135M-Instruct", LearnerSettings(lr=1e-3), seed=0)
    >>> metrics = learner.train_minibatch(pack(trees, credits, token_budget=4096), counts, loss_fn)
    """

    def __init__(self, model_dir: Path | str, cfg: LearnerSettings, seed: int):
        if cfg.threads:
            torch.set_num_threads(cfg.threads)
        self.cfg, self.model_dir = cfg, Path(model_dir)
        self.step = 0  # optimiser steps that changed weights
        self.guard = NonFiniteGuard(
            cfg.max_nonfinite, Path(cfg.dump_dir) if cfg.dump_dir else default_dump_dir()
        )
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.manual_seed(seed)  # decides the adapters
        lm = load_model(model_dir, getattr(torch, cfg.dtype))
        self._base = _fingerprint(lm)
        self._peft = None
        if cfg.mode == "lora":
            self._peft = add_lora(
                lm,
                r=cfg.lora_r,
                alpha=cfg.lora_alpha,
                targets=cfg.lora_targets,
                layers=cfg.lora_layers,
            )
        self._count = {
            "total": sum(p.numel() for p in lm.parameters()),
            "trainable": sum(p.numel() for p in lm.parameters() if p.requires_grad),
        }
        self.device = zero.join_group()
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        policy = Policy(
            lm,
            gradient_checkpointing=cfg.gradient_checkpointing,
            head_backend=cfg.head_backend,
        ).to(self.device)
        policy.train()  # gradient checkpointing asks for it; there is no dropout
        self.engine = zero.start_engine(policy, cfg)
        self._closed = False

    @property
    def lm(self) -> nn.Module:
        """The Hugging Face model, with adapters in place."""
        return self.engine.module.lm

    # -- training

    def train_minibatch(
        self, batches: Sequence[PackedBatch], counts: Counts, loss_fn: LossFunction
    ) -> dict[str, float]:
        """One optimiser step on all `batches`; returns metrics (means of the loss function's sums and our own).

        `counts` are this rank's denominators of the mini-batch; they are summed over ranks before any backward.
        `loss_fn(stats, batch, counts)` returns the loss of one micro-batch, already divided by those, and metrics as
        (sum, count). No batch on any rank: no step, `learner/empty` is 1. Something not finite: no weight changes,
        `learner/nonfinite` is 1; after `max_nonfinite` in a row LearnerError names the dumped batch. Neither moves
        the learning-rate schedule.
        """
        micro_batches = self._largest(len(batches))
        if not micro_batches:
            return {"learner/empty": 1.0, "learner/nonfinite": 0.0, "learner/lr": self._lr()}
        counts = self._global(counts)
        lr = self._lr()
        loss, sums, reason = self.accumulate(batches, counts, loss_fn, micro_batches)
        for group in self.engine.optimizer.param_groups:
            group["lr"] = lr
        applied, norm = self._apply()
        metrics = self._mean_over_ranks(sums)
        metrics |= {"learner/loss": loss, "learner/grad_norm": norm, "learner/lr": lr}
        metrics |= {"learner/empty": 0.0, "learner/nonfinite": float(not applied)}
        metrics |= {"learner/micro_batches": float(micro_batches)}
        if applied:
            self.step += 1
            self.guard.passed()
        else:
            self.guard.refused(
                self.step, self.rank, list(batches), reason or "gradient norm is not finite"
            )
        return metrics | {"learner/nonfinite_total": float(self.guard.total)}

    def accumulate(
        self,
        batches: Sequence[PackedBatch],
        counts: Counts,
        loss_fn: LossFunction,
        micro_batches: int,
    ) -> tuple[float, dict[str, tuple[float, float]], str | None]:
        """Forward and backward of every micro-batch, without the step.

        Ranks with fewer batches than `micro_batches` run idle ones: DeepSpeed's collectives must meet. Returns the
        loss (sum over ranks), this rank's metric sums and what was not finite, if anything.
        """
        total, reason = 0.0, None
        sums: dict[str, tuple[float, float]] = {}
        for i in range(micro_batches):
            self.engine.set_gradient_accumulation_boundary(i == micro_batches - 1)
            idle = i >= len(batches)
            batch = (pack_sequences([[0, 0]]) if idle else batches[i]).to(self.device)
            stats = self.engine(batch, 1 / self.cfg.temperature)
            loss, metrics = loss_fn(stats, batch, counts)
            if idle:  # through the same outputs: ZeRO-3 compares the order of modules between ranks
                loss, metrics = loss * 0.0, {}
            elif wrong := why_not_finite(loss, stats, batch):
                reason, loss = reason or f"micro-batch {i}: {wrong}", poison(loss, stats)
            for name, (s, n) in metrics.items():
                a, b = sums.get(name, (0.0, 0.0))
                sums[name] = (a + _number(s), b + _number(n))
            total += float(loss.detach())
            # DeepSpeed averages over ranks; our denominators are global, so the sum is what we want
            self.engine.backward(loss * self.world, scale_wrt_gas=False)
        return self._sum(total), sums, reason

    def _apply(self) -> tuple[bool, float]:
        """The optimiser step, unless the gradient is not finite. (applied, global gradient norm)"""
        if self.cfg.zero_stage == 0:  # the only stage at which DeepSpeed does not check by itself
            grads = [p.grad for p in self.engine.module.parameters() if p.grad is not None]
            norm = float(torch.nn.utils.get_total_norm(grads))
            if not np.isfinite(norm):
                self.engine.zero_grad()
                return False, norm
            self.engine.step()
            return True, norm
        self.engine.step()
        norm = self.engine.get_global_grad_norm()
        return not self.engine.optimizer.overflow, float("nan" if norm is None else norm)

    def _lr(self) -> float:
        return zero.learning_rate(self.cfg, self.step)

    # -- ranks

    def _sum(self, value: float) -> float:
        if self.world == 1:
            return value
        t = torch.tensor(value, dtype=torch.float64, device=self.device)
        dist.all_reduce(t)
        return float(t)

    def _largest(self, value: int) -> int:
        if self.world == 1:
            return value
        t = torch.tensor(value, device=self.device)
        dist.all_reduce(t, op=dist.ReduceOp.MAX)
        return int(t)

    def _global(self, counts: Counts) -> Counts:
        return Counts(*(self._sum(float(x)) for x in (counts.tokens, counts.rows, counts.rollouts)))

    def _mean_over_ranks(self, sums: dict[str, tuple[float, float]]) -> dict[str, float]:
        everyone: list[Any] = [sums]
        if self.world > 1:
            everyone = [None] * self.world
            dist.all_gather_object(everyone, sums)
        names = {name: None for one in everyone for name in one}  # a rank may have been idle
        out = {}
        for name in names:
            pairs = [one.get(name, (0.0, 0.0)) for one in everyone]
            n = sum(c for _, c in pairs)
            out[name] = sum(s for s, _ in pairs) / n if n else 0.0
        return out

    # -- reading the policy

    @torch.no_grad()
    def logprobs(
        self, token_ids: Sequence[Sequence[int]], temperature: float | None = None
    ) -> list[np.ndarray]:
        """Log-probs of tokens 1 … n-1 of each sequence, float32, under the current weights.

        temperature None: that of the settings.
        """
        batch = pack_sequences(token_ids).to(self.device)
        stats = self.engine(batch, 1 / (temperature or self.cfg.temperature))
        flat, ends = stats.logp.float().cpu().numpy(), batch.offsets.tolist()
        return [flat[a:b] for a, b in zip(ends, ends[1:])]

    def gradients(self) -> dict[str, Tensor]:
        """Whole gradients between `accumulate` and the step, by parameter name; for tests and diagnosis."""
        from deepspeed.utils import safe_get_full_grad

        trained = [(n, p) for n, p in self.lm.named_parameters() if p.requires_grad]
        found = ((n, safe_get_full_grad(p)) for n, p in trained)
        return {n: g.detach().float().clone() for n, g in found if g is not None}

    def named_weights(
        self, gain: MergeGain | None = None, *, adapters: bool = False
    ) -> Iterator[tuple[str, Tensor]]:
        """What changed, for an engine that started from the same folder: (Hugging Face name, tensor).

        Under LoRA the adapted weights, merged, or with `adapters` the adapters themselves (`lora.adapter_tensors`);
        else every weight. Tensors are valid until the next one is asked for.
        """
        if adapters and self.cfg.mode == "lora":
            return adapter_tensors(self.lm, gather=self._gather())
        return merged_tensors(self.lm, gather=self._gather(), gain=gain)

    def _gather(self) -> Any:
        return zero.gathered if self.cfg.zero_stage == 3 else None

    def parameter_counts(self) -> dict[str, int]:
        """{"total", "trainable"}: numbers of parameters, adapters included, tied heads once."""
        return dict(self._count)

    # -- persistence

    def save(self, path: Path | str) -> None:
        """Write all that `load` needs into a folder: DeepSpeed's state of the trainable weights, step, RNG."""
        path = Path(path)
        path.mkdir(parents=True, exist_ok=True)
        self.engine.save_checkpoint(
            str(path),
            tag="zero",
            save_latest=False,
            exclude_frozen_parameters=self.cfg.mode == "lora",
        )
        rng = {
            "torch": torch.get_rng_state(),
            "numpy": np.random.get_state(),
            "python": random.getstate(),
        }
        if self.device.type == "cuda":
            rng["cuda"] = torch.cuda.get_rng_state(self.device)
        torch.save(rng, path / f"rng_rank{self.rank}.pt")
        if self.rank == 0:
            (path / "learner.json").write_text(
                json.dumps(self._identity() | self._progress(), indent=1)
            )

    def load(self, path: Path | str) -> None:
        """Continue bit by bit where `save` stopped. Call it on a fresh Learner.

        Raises CheckpointError when the checkpoint belongs to another model, another set of trained parameters or
        another number of ranks.
        """
        path = Path(path)
        try:
            saved = json.loads((path / "learner.json").read_text())
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path} holds no learner state: {error}") from error
        for name, mine in self._identity().items():
            if saved.get(name) != mine:
                raise CheckpointError(
                    f"{path}: {name} is {saved.get(name)!r} in the checkpoint and {mine!r} in this run; "
                    "resume with the settings the checkpoint was made with, or start a new run"
                )
        loaded, _ = self.engine.load_checkpoint(
            str(path), tag="zero", load_module_strict=self.cfg.mode == "full"
        )
        if loaded is None:
            raise CheckpointError(f"{path}: DeepSpeed found nothing to load in {path / 'zero'}")
        rng = torch.load(path / f"rng_rank{self.rank}.pt", weights_only=False)
        torch.set_rng_state(rng["torch"])
        np.random.set_state(rng["numpy"])
        random.setstate(rng["python"])
        if "cuda" in rng and self.device.type == "cuda":
            torch.cuda.set_rng_state(rng["cuda"], self.device)
        self.step = saved["step"]
        self.guard.in_a_row, self.guard.total = saved["nonfinite"]

    def _identity(self) -> dict[str, Any]:
        """What must agree between a checkpoint and the run that loads it."""
        c = self.cfg
        lora = (
            [c.lora_r, c.lora_alpha, sorted(c.lora_targets), c.lora_layers]
            if c.mode == "lora"
            else None
        )
        return {
            "base_model": self._base,
            "mode": c.mode,
            "lora": lora,
            "dtype": c.dtype,
            "zero_stage": c.zero_stage,
            "world_size": self.world,
        }

    def _progress(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "nonfinite": [self.guard.in_a_row, self.guard.total],
            "settings": asdict(self.cfg),
        }

    def save_hf(self, path: Path | str) -> None:
        """Export a folder that transformers and engines load: merged weights, config, tokenizer files.

        Under LoRA the adapter alone is in `adapter/` as peft writes it. On rank 0; collective.
        """
        from huggingface_hub import save_torch_state_dict

        path = Path(path)
        tensors = {}
        for name, t in merged_tensors(self.lm, changed_only=False, gather=self._gather()):
            if self.rank == 0:
                tensors[name] = t.to("cpu", copy=True).contiguous()
        if self.rank == 0:
            path.mkdir(parents=True, exist_ok=True)
            self.lm.config.save_pretrained(path)
            save_torch_state_dict(tensors, path, metadata={"format": "pt"})
            for pattern in (
                "tokenizer*",
                "vocab*",
                "merges*",
                "special_tokens*",
                "added_tokens*",
                "chat_template*",
                "generation_config.json",
            ):
                for file in self.model_dir.glob(pattern):
                    shutil.copy2(file, path / file.name)
        if self._peft is not None:
            self._save_adapter(path / "adapter")

    def _save_adapter(self, path: Path) -> None:
        trained = [p for p in self.lm.parameters() if p.requires_grad]
        if self.cfg.zero_stage == 3:
            with zero.gathered(trained):
                if self.rank == 0:
                    self._peft.save_pretrained(path)
        elif self.rank == 0:
            self._peft.save_pretrained(path)

    def close(self) -> None:
        """Free the engine. Calling it twice is fine. The process group stays until the process ends."""
        if not self._closed:
            self._closed = True
            self.engine.destroy()

    def __enter__(self) -> Learner:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _number(x: float | Tensor) -> float:
    return float(x.detach()) if isinstance(x, Tensor) else float(x)


def _fingerprint(lm: nn.Module) -> str:
    """A checksum of the weights as loaded: names, shapes and about a thousand values of each tensor."""
    crc = 0
    for name, p in lm.named_parameters():
        sample = p.detach().flatten()[:: max(1, p.numel() // 1000)].float().contiguous()
        crc = zlib.crc32(
            sample.numpy().tobytes(), zlib.crc32(f"{name}{tuple(p.shape)}".encode(), crc)
        )
    return f"{crc:08x}"
