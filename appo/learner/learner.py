"""The learner executes a loss function on packed trees.

It owns weights, optimiser and their persistence.

One mini-batch is one optimiser step, split into any number of micro-batches; loss denominators are
those of the whole mini-batch over all ranks, so the split never changes the gradient. A mini-batch
with anything not finite in it changes no weight.
"""

from __future__ import annotations

import itertools
import json
import random
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from appo.config import LearnerConfig, RunContext, check_learner
from appo.dist.ranks import Ranks
from appo.errors import CheckpointError
from appo.kernels import LogProbEntropy
from appo.learner import zero
from appo.learner.export import export
from appo.learner.guards import (
    NonFiniteGuard,
    default_dump_dir,
    nan_unless_finite,
    non_finite_counts,
    why_not_finite,
)
from appo.learner.lora import CastRetention, adapter_tensors, add_lora, merged_tensors
from appo.learner.policy import Policy, load_model
from appo.learner.shards import load_shards, save_shard
from appo.models.shape import ModelFamily
from appo.packing.pack import PackedBatch, pack_sequences
from appo.types import Counts

Metrics = Mapping[str, tuple[float | Tensor, float | Tensor]]  # name → (sum, count)
LossFunction = Callable[[LogProbEntropy, PackedBatch, Counts], tuple[Tensor, Metrics]]


class Learner:
    """A policy under training.

    Collective: under torchrun every rank makes the same calls in the same order.

    >>> learner = Learner("models/SmolLM2-135M-Instruct", LearnerConfig(lr=1e-3), seed=0)
    >>> metrics = learner.train_minibatch(pack(trees, credits, token_budget=4096), counts, loss_fn)
    """

    def __init__(
        self,
        model_dir: Path | str,
        cfg: LearnerConfig,
        seed: int,
        ranks: Ranks | None = None,
        context: RunContext | None = None,
        family: ModelFamily | None = None,
    ):
        """Load the model of a folder.

        Raises ConfigError for settings that cannot work, ModelError for the folder.
        """
        context = context or RunContext()
        check_learner(cfg, context)
        if context.threads:
            torch.set_num_threads(context.threads)
        self.cfg, self.context, self.model_dir = cfg, context, Path(model_dir)
        self.step = 0  # optimiser steps that changed weights
        self.guard = NonFiniteGuard(
            cfg.max_nonfinite, Path(context.dump_dir) if context.dump_dir else default_dump_dir()
        )
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.manual_seed(seed)  # decides the adapters
        lm = load_model(model_dir, getattr(torch, context.dtype), family)
        self._base = _fingerprint(lm)
        self._peft = None
        if cfg.mode == "lora":
            self._peft = add_lora(
                lm,
                r=cfg.lora.r,
                alpha=cfg.lora.alpha,
                targets=cfg.lora.targets,
                layers=cfg.lora.layers,
            )
        self._trained = {n: tuple(p.shape) for n, p in lm.named_parameters() if p.requires_grad}
        self._count = {
            "total": sum(p.numel() for p in lm.parameters()),
            "trainable": sum(p.numel() for p in lm.parameters() if p.requires_grad),
        }
        self.ranks = ranks or Ranks.join()
        self.device = zero.join_group()
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        assert (self.rank, self.world) == (self.ranks.rank, self.ranks.world)
        self._multiple = (
            128 if self.device.type == "cuda" else 1
        )  # tokens: few lengths to compile for
        self.on_micro_batch: Callable[[int, int], None] = lambda i, n: None  # after each, of n
        policy = Policy(
            lm,
            gradient_checkpointing=cfg.gradient_checkpointing,
            head_backend=cfg.head_backend,
        ).to(self.device)
        policy.train()  # gradient checkpointing asks for it; there is no dropout
        self.engine = zero.start_engine(policy, cfg, context.dtype)
        self._closed = False

    @property
    def lm(self) -> nn.Module:
        """The Hugging Face model, with adapters in place."""
        return self.engine.module.lm

    # -- training

    def train_minibatch(
        self, batches: Sequence[PackedBatch], counts: Counts, loss_fn: LossFunction
    ) -> dict[str, float]:
        """One optimiser step on all `batches`.

        Returns metrics (means of the loss function's sums and our own).

        `counts` are this rank's denominators of the mini-batch; they are summed over ranks before
        any backward. `loss_fn(stats, batch, counts)` returns the loss of one micro-batch, already
        divided by those, and metrics as (sum, count), numbers or scalar tensors. No batch on any
        rank: no step, `learner/empty` is 1. Something not finite: no weight changes,
        `learner/nonfinite` is 1; after `max_nonfinite` in a row LearnerError names the dumped
        batch. Neither moves the learning-rate schedule. Metrics are over all ranks, and the same on
        all of them.
        """
        micro_batches = self._most(len(batches))
        if not micro_batches:
            return {"learner/empty": 1.0, "learner/nonfinite": 0.0, "learner/lr": self._lr()}
        counts = Counts(**self.ranks.sum(asdict(counts), "loss denominators"))
        lr = self._lr()
        loss, sums, reason = self.accumulate(batches, counts, loss_fn, micro_batches)
        for group in self.engine.optimizer.param_groups:
            group["lr"] = lr
        applied, norm = self._apply()
        metrics = self._means({"learner/loss": (loss, 0.0)} | sums)
        metrics |= {"learner/grad_norm": norm, "learner/lr": lr}
        metrics |= {"learner/empty": 0.0, "learner/nonfinite": float(not applied)}
        metrics |= {"learner/micro_batches": float(micro_batches)}
        if applied:
            self.step += 1
            self.guard.passed()
        else:
            reasons = self.ranks.all_gather(reason, "why a step was refused")
            said = [
                f"rank {r}, {why}" if self.world > 1 else why
                for r, why in enumerate(reasons)
                if why
            ]
            self.guard.refused(
                self.step,
                self.rank,
                list(batches),
                "; ".join(said) or "gradient norm is not finite",
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

        Ranks with fewer batches than `micro_batches` run idle ones: DeepSpeed's collectives must
        meet. Returns this rank's loss, its metric sums and what was not finite, if anything. On a
        device nothing is waited for before the last micro-batch was handed over.
        """
        losses: list[Tensor] = []
        wrong: list[Tensor] = []
        sums: dict[str, list[float | Tensor]] = {}
        for i in range(micro_batches):
            self.engine.set_gradient_accumulation_boundary(i == micro_batches - 1)
            idle = i >= len(batches)
            batch, stats = self._forward(None if idle else batches[i])
            loss, metrics = loss_fn(stats, batch, counts)
            if idle:  # through the same outputs: ZeRO-3 compares the order of modules between ranks
                loss = loss * 0.0
            else:
                losses.append(loss.detach().double())
                wrong.append(non_finite_counts(loss, stats, batch))
                loss = nan_unless_finite(loss, stats, wrong[-1])
                for name, pair in metrics.items():
                    a, b = sums.get(name, (0.0, 0.0))
                    sums[name] = [a + _alone(pair[0]), b + _alone(pair[1])]
            # DeepSpeed averages over ranks; our denominators are global, so the sum is what we want
            self.engine.backward(loss * self.world, scale_wrt_gas=False)
            self.on_micro_batch(i, micro_batches)
        total, *flat = _read([sum(losses), *(x for pair in sums.values() for x in pair)])
        pairs = dict(zip(sums, zip(flat[::2], flat[1::2])))
        return total, pairs, why_not_finite(wrong)

    def _apply(self) -> tuple[bool, float]:
        """The optimiser step, unless the gradient is not finite.

        → (applied, global gradient norm).
        """
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
        return zero.learning_rate(self.cfg, self.step, self.context.total_steps)

    def _most(self, batches: int) -> int:
        """The largest number of batches on any rank."""
        return int(self.ranks.reduce({"batches": batches}, "max", "micro-batches")["batches"])

    def _means(self, sums: dict[str, tuple[float, float]]) -> dict[str, float]:
        """Sum over ranks / count over ranks of each name.

        A count of 0 everywhere leaves the sum (a loss, an empty mean).
        """
        flat = {f"{name}|{k}": x for name, pair in sums.items() for k, x in enumerate(pair)}
        total = self.ranks.sum(flat, "metrics")  # names differ where a rank was idle
        names = dict.fromkeys(key.rpartition("|")[0] for key in total)
        return {n: total[f"{n}|0"] / (total[f"{n}|1"] or 1.0) for n in names}

    # -- reading the policy

    @torch.no_grad()
    def old_logprobs(self, batches: Sequence[PackedBatch]) -> list[Tensor]:
        """Log-prob of every edge of every batch under the weights as they are now.

        float32[E] each, on the CPU.

        0 where `mask` is False. Bit for bit what `train_minibatch` would see on the same batches
        before its step. Collective: ranks with fewer batches than others run idle forwards, so
        ZeRO-3's gathers meet.
        """
        out = []
        forwards = self._most(len(batches))
        for i in range(forwards):
            stats = self._forward(batches[i] if i < len(batches) else None)[1]
            if i < len(batches):
                out.append(stats.logp.float())
            self.on_micro_batch(i, forwards)
        return [logp.cpu() for logp in out]

    def _forward(self, batch: PackedBatch | None) -> tuple[PackedBatch, LogProbEntropy]:
        """(batch on our device, its statistics); None stands for an idle stream."""
        batch = (pack_sequences([[0, 0]]) if batch is None else batch).padded(self._multiple)
        batch = batch.to(self.device)
        return batch, self.engine(batch, 1 / self.context.temperature)

    @torch.no_grad()
    def logprobs(
        self, token_ids: Sequence[Sequence[int]], temperature: float | None = None
    ) -> list[np.ndarray]:
        """Log-probs of tokens 1 … n-1 of each sequence, float32, under the current weights.

        temperature None: that of the settings.
        """
        batch = pack_sequences(token_ids).to(self.device)
        stats = self.engine(batch, 1 / (temperature or self.context.temperature))
        flat, ends = stats.logp.float().cpu().numpy(), batch.offsets.tolist()
        return [flat[a:b] for a, b in itertools.pairwise(ends)]

    def gradients(self) -> dict[str, Tensor]:
        """Whole gradients between `accumulate` and the step, by parameter name.

        For tests and diagnosis.
        """
        from deepspeed.utils import safe_get_full_grad

        trained = [(n, p) for n, p in self.lm.named_parameters() if p.requires_grad]
        found = ((n, safe_get_full_grad(p)) for n, p in trained)
        return {n: g.detach().float().clone() for n, g in found if g is not None}

    def named_weights(
        self, retention: CastRetention | None = None, *, adapters: bool = False
    ) -> Iterator[tuple[str, Tensor]]:
        """What changed, for an engine that started from the same folder.

        (Hugging Face name, tensor).

        Under LoRA the adapted weights, merged, or with `adapters` the adapters themselves
        (`lora.adapter_tensors`); else every weight. Tensors are valid until the next one is asked
        for.
        """
        if adapters and self.cfg.mode == "lora":
            return adapter_tensors(self.lm, gather=self._gather())
        return merged_tensors(self.lm, gather=self._gather(), retention=retention)

    def _gather(self) -> Any:
        return zero.gathered if self.cfg.zero_stage == 3 else None

    def parameter_counts(self) -> dict[str, int]:
        """{"total", "trainable"}: numbers of parameters, adapters included, tied heads once."""
        return dict(self._count)

    # -- persistence

    def save(self, path: Path | str) -> None:
        """Write all that `load` needs into a folder.

        DeepSpeed's state of the trainable weights, step, RNG.
        """
        path = Path(path)
        path.mkdir(parents=True, exist_ok=True)
        save_shard(path, self.engine, self.lm, self.rank)
        if self.rank == 0:
            (path / "learner.json").write_text(
                json.dumps(self._identity() | self._progress(), indent=1)
            )

    def load(self, path: Path | str) -> None:
        """Continue where `save` stopped, bit by bit with the same number of ranks.

        Call it on a fresh Learner. Collective.

        The ZeRO stage, offloading and the number of ranks may differ from those the checkpoint was
        made with. Raises CheckpointError when it belongs to another model or another set of trained
        parameters, or when a part is missing.
        """
        path = Path(path)
        try:
            saved = json.loads((path / "learner.json").read_text())
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path} holds no learner state: {error}") from error
        for name, mine in self._identity().items():
            if saved.get(name) != mine:
                raise CheckpointError(
                    f"{path}: {name} is {_difference(saved.get(name), mine)}; "
                    "resume with the settings the checkpoint was made with, or start a new run"
                )
        load_shards(path, self.engine, self.lm, self.rank, saved["world_size"])
        self.step = saved["step"]
        self.guard.in_a_row, self.guard.total = saved["nonfinite"]

    def _identity(self) -> dict[str, Any]:
        """What must agree between a checkpoint and the run that loads it."""
        c = self.cfg.lora
        lora = None
        if self.cfg.mode == "lora":
            lora = [c.r, c.alpha, sorted(c.targets), c.layers]
        return {
            "dtype": self.context.dtype,  # first: it changes the checksum of the base model too
            "base_model": self._base,
            "mode": self.cfg.mode,
            "lora": lora,
            "trained": {n: list(s) for n, s in self._trained.items()},
        }

    def _progress(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "world_size": self.world,
            "nonfinite": [self.guard.in_a_row, self.guard.total],
            "settings": asdict(self.cfg) | asdict(self.context),
        }

    def save_hf(self, path: Path | str) -> None:
        """Export a folder that transformers and engines load.

        Merged weights, config, tokenizer files.

        Under LoRA the adapter alone is in `adapter/` as peft writes it. Rank 0 writes; collective.
        """
        export(
            Path(path),
            self.lm,
            self._peft,
            self.model_dir,
            gather=self._gather(),
            writes=self.ranks.main,
        )

    def close(self) -> None:
        """Free the engine.

        Calling it twice is fine. The process group stays until the process ends.
        """
        if not self._closed:
            self._closed = True
            self.engine.destroy()

    def __enter__(self) -> Learner:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _difference(saved: Any, mine: Any) -> str:
    """Both values in words; of two dicts the entries that differ."""
    if isinstance(saved, dict) and isinstance(mine, dict):
        keys = [k for k in saved.keys() | mine.keys() if saved.get(k) != mine.get(k)]
        saved, mine = ({k: d.get(k) for k in sorted(keys)[:3]} for d in (saved, mine))
    return f"{saved!r} in the checkpoint and {mine!r} in this run"


def _alone(x: float | Tensor) -> float | Tensor:
    """A number, or a scalar that stays where it is: in float64 and without its graph."""
    return x.detach().double() if isinstance(x, Tensor) else float(x)


def _read(values: Sequence[float | Tensor]) -> list[float]:
    """Numbers and scalars as numbers, with one wait for the device."""
    scalars = [x for x in values if isinstance(x, Tensor)]
    read = iter(torch.stack(scalars).tolist() if scalars else [])
    return [next(read) if isinstance(x, Tensor) else float(x) for x in values]


def _fingerprint(lm: nn.Module) -> str:
    """A checksum of the weights as loaded.

    Names, shapes and about a thousand values of each tensor.
    """
    crc = 0
    for name, p in lm.named_parameters():
        sample = p.detach().flatten()[:: max(1, p.numel() // 1000)].float().contiguous()
        crc = zlib.crc32(
            sample.numpy().tobytes(), zlib.crc32(f"{name}{tuple(p.shape)}".encode(), crc)
        )
    return f"{crc:08x}"
