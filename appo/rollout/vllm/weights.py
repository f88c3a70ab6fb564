"""New weights into vLLM, by its own in-place reload.

The reload works layer by layer and trusts its caller: a fused layer (q, k and v are one) of which
only a part arrives is filled up with whatever was in memory, and a name it does not know ends it
half-way. So a push is completed and checked here before vLLM sees any of it.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from appo.errors import EngineError, ModelError

FUSED = {
    "q_proj": "qkv_proj", "k_proj": "qkv_proj", "v_proj": "qkv_proj",
    "gate_proj": "gate_up_proj", "up_proj": "gate_up_proj",
}  # fmt: skip


def vllm_name(name: str) -> str:
    """vLLM's parameter that holds the Hugging Face tensor `name`.

    >>> vllm_name("model.layers.0.self_attn.k_proj.weight")
    'model.layers.0.self_attn.qkv_proj.weight'
    """
    module, _, kind = name.rpartition(".")
    parent, _, last = module.rpartition(".")
    return ".".join(p for p in (parent, FUSED.get(last, last), kind) if p)


def layer(name: str) -> str:
    """vLLM's layer: what must be loaded as a whole."""
    return vllm_name(name).rpartition(".")[0]


class Checkpoint:
    """Names, shapes and tensors of a model folder."""

    def __init__(self, model_dir: Path):
        self.file: dict[str, Path] = {}
        for path in sorted(Path(model_dir).glob("*.safetensors")):
            with safe_open(path, framework="pt") as tensors:
                self.file |= dict.fromkeys(tensors.keys(), path)
        if not self.file:
            raise ModelError(
                f"model_dir={str(model_dir)!r}: no *.safetensors there; convert the weights first"
            )
        self.layers: dict[str, set[str]] = {}
        for name in self.file:
            self.layers.setdefault(layer(name), set()).add(name)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, read from the head of its file."""
        with safe_open(self.file[name], framework="pt") as tensors:
            return tuple(tensors.get_slice(name).get_shape())

    def tensor(self, name: str) -> Tensor:
        """A tensor, read from its file at every call."""
        with safe_open(self.file[name], framework="pt") as tensors:
            return tensors.get_tensor(name)


class WeightLoader:
    """Pushes of one engine.

    `loaded`: Hugging Face names that the last push is known to have written.
    """

    def __init__(self, checkpoint: Checkpoint, in_process: bool):
        self.checkpoint, self.in_process = checkpoint, in_process
        self.loaded: set[str] = set()
        self._pushed: set[str] = set()  # ever: these differ from the folder

    def collect(
        self, named_tensors: Iterable[tuple[str, object]]
    ) -> tuple[dict[str, Tensor], set[str]]:
        """(checked copy of the push with what its layers need beside it, names of the push itself).

        Raises EngineError; nothing has changed then.

        A copy, because vLLM keeps tensors until their layer is whole and the source may reuse their
        memory by then.
        """
        out: dict[str, Tensor] = {}
        for name, value in named_tensors:
            tensor = value if isinstance(value, Tensor) else torch.as_tensor(value)
            if name not in self.checkpoint.file:
                raise EngineError(
                    f"load_weights: {name!r} is not a tensor of this model; use Hugging Face names, adapters merged"
                )
            if tuple(tensor.shape) != self.checkpoint.shape(name):
                raise EngineError(
                    f"load_weights: {name!r} has shape {tuple(tensor.shape)}, the model's is {self.checkpoint.shape(name)}"
                )
            out[name] = tensor.detach().to(tensor.device if self.in_process else "cpu", copy=True)
        if not out:
            raise EngineError("load_weights: no tensors; push the weights that changed")
        asked = set(out)
        for name in sorted({n for k in out for n in self.checkpoint.layers[layer(k)]} - asked):
            if name in self._pushed:
                raise EngineError(
                    f"load_weights: {name!r} shares a layer with tensors of this push and was in an earlier one; push it "
                    "again, as vLLM replaces whole layers"
                )
            out[name] = self.checkpoint.tensor(name)
        return out, asked

    def send(self, llm: Any, tensors: dict[str, Tensor], asked: set[str]) -> None:
        """Have every worker reload.

        Raises EngineError if a tensor was not written anywhere; vLLM is unusable then.
        """
        if self.in_process:
            wrote = llm.collective_rpc("appo_load", kwargs={"items": list(tensors.items())})
        else:
            with tempfile.TemporaryDirectory(dir=_memory_folder()) as folder:
                path = str(Path(folder) / "weights.safetensors")
                save_file({n: t.contiguous() for n, t in tensors.items()}, path)
                wrote = llm.collective_rpc("appo_load", kwargs={"path": path})
        names = {name for worker in wrote for name in worker}
        self.loaded = {name for name in asked if vllm_name(name) in names}
        self._pushed |= asked
        if asked - self.loaded:
            lost = sorted(asked - self.loaded)
            raise EngineError(
                f"load_weights: vLLM did not write {len(lost)} of {len(asked)} tensors, for example {lost[0]!r}"
            )


def _memory_folder() -> str | None:
    return "/dev/shm" if Path("/dev/shm").is_dir() else None
