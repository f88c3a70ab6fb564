"""What runs inside vLLM's worker process. vLLM imports this module by name; nothing else may.

`EntropyProcessor` is a logits processor (it reads logits and changes none), `WorkerExtension` adds
the calls that the engine makes through `collective_rpc`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor, MoveDirectionality

from appo.rollout.vllm import worker_statistics
from appo.rollout.vllm.head import check_head, retie


class EntropyProcessor(LogitsProcessor):
    """Files the entropy of the full distribution at the request's temperature.

    That is the one before top-k and top-p.
    """

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool):
        self.entropies = worker_statistics.SampledEntropies()

    def is_argmax_invariant(self) -> bool:
        """False: processors that are get no call in a batch of greedy requests."""
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Follow the rows of the batch: requests that left, came or changed places."""
        if batch_update is not None:
            moved = [(a, b, how is MoveDirectionality.SWAP) for a, b, how in batch_update.moved]
            self.entropies.update(batch_update.removed, batch_update.added, moved)

    def apply(self, logits: Tensor) -> Tensor:
        """Note the entropy of each row; the logits go on as they came."""
        self.entropies.see(logits)
        return logits


class WorkerExtension:
    """Mixed into vLLM's worker; its names start with appo_ because vLLM refuses a clash."""

    def appo_attach(self) -> None:
        """Exact scoring from now on."""
        worker_statistics.attach(self.model_runner)  # type: ignore[attr-defined]

    def appo_take_sampled(self, keys: list[str]) -> dict[str, dict[int, float]]:
        """Entropies by request and draw, which the worker then forgets."""
        return worker_statistics.take_sampled(keys)

    def appo_take_scored(self, keys: list[str]) -> dict[str, list[worker_statistics.Piece]]:
        """Exact scores by request, in pieces, which the worker then forgets."""
        return worker_statistics.take_scored(keys)

    def appo_load(
        self, items: list[tuple[str, Tensor]] | None = None, path: str | None = None
    ) -> list[str]:
        """Replace weights in place by vLLM's own reload; → names of the parameters it wrote.

        items: (Hugging Face name, tensor), or path: a safetensors file with them, for a worker in
        another process.
        """
        if items is None:
            from safetensors.torch import load_file

            assert path is not None
            items = list(load_file(path).items())
        model = self.model_runner.get_model()  # type: ignore[attr-defined]
        wrote: set[str] = set()
        load = model.load_weights

        def noting(weights: Any) -> Any:
            found = load(weights)
            wrote.update(found or ())
            return found

        model.load_weights = noting  # reload_weights keeps the answer to itself
        try:
            self.reload_weights(weights_iterator=iter(items))  # type: ignore[attr-defined]
        finally:
            del model.load_weights
        retie(model, _pack)
        check_head(model)
        return sorted(wrote)


def _pack(layer: Any) -> None:
    """The layer's fast matrix product, from its weight as it is now.

    CPU only; elsewhere the weight itself is read.
    """
    from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm

    dispatch_cpu_unquantized_gemm(layer, remove_weight=False)
