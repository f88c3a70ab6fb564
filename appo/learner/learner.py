"""The learner executes a loss function on packed trees.

It owns weights, optimiser and their persistence.

One mini-batch is one optimiser step, split into any number of micro-batches; loss denominators are
those of the whole mini-batch over all ranks, so the split never changes the gradient. A mini-batch
with anything not finite in it changes no weight.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from appo.config import LearnerConfig, RunContext, check_learner
from appo.dist.ranks import Ranks
from appo.kernels import LogProbEntropy
from appo.learner import zero
from appo.learner.accumulate import LossFunction, accumulate, means
from appo.learner.export import export
from appo.learner.guards import NonFiniteGuard, default_dump_dir
from appo.learner.identity import fingerprint, identity, read_state, write_state
from appo.learner.lora import CastRetention, adapter_tensors, add_lora, merged_tensors
from appo.learner.policy import Policy, load_model
from appo.learner.shards import load_shards, save_shard
from appo.models.shape import ModelFamily
from appo.packing.pack import PackedBatch, pack_sequences
from appo.types import Counts


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
        self._base = fingerprint(lm)
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
        metrics = means(self.ranks, {"learner/loss": (loss, 0.0)} | sums)
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
        return accumulate(
            self.engine,
            self._forward,
            [*batches, *[None] * (micro_batches - len(batches))],
            counts,
            loss_fn,
            lambda i: self.on_micro_batch(i, micro_batches),
        )

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
            write_state(path, self._identity() | self._progress())

    def load(self, path: Path | str) -> None:
        """Continue where `save` stopped, bit by bit with the same number of ranks.

        Call it on a fresh Learner. Collective.

        The ZeRO stage, offloading and the number of ranks may differ from those the checkpoint was
        made with. Raises CheckpointError when it belongs to another model or another set of trained
        parameters, or when a part is missing.
        """
        path = Path(path)
        saved = read_state(path, self._identity())
        load_shards(path, self.engine, self.lm, self.rank, saved["world_size"])
        self.step = saved["step"]
        self.guard.in_a_row, self.guard.total = saved["nonfinite"]

    def _identity(self) -> dict[str, Any]:
        return identity(self.cfg, self.context, self._base, self._trained)

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
