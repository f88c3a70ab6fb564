"""What the learner can be told: one dataclass, checked when it is made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from appo.errors import ConfigError
from appo.learner.lora import TARGETS


@dataclass(frozen=True)
class LearnerSettings:
    """How to train. lora_layers counts from the last layer (None: all). max_grad_norm 0 means no clipping.

    offload moves masters and moments ("optimizer", stage 1 or above), or the weights as well ("all", stage 3), to the
    memory of the host between uses. threads None leaves torch's number alone; dump_dir None is a folder in the temporary
    directory.
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
    offload: Literal["none", "optimizer", "all"] = "none"
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
            "offload": ("none", "optimizer", "all"),
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
        needed = {"none": 0, "optimizer": 1, "all": 3}[self.offload]
        if self.zero_stage < needed:
            raise ConfigError(
                f"learner.offload is {self.offload!r} and learner.zero_stage {self.zero_stage}: that needs stage {needed}"
                f"{' or above' if needed < 3 else ', the only one that splits the weights'}; raise zero_stage, or choose "
                "another offload"
            )
        if self.zero_stage == 0 and self.dtype == "bfloat16":
            raise ConfigError(
                "learner.zero_stage 0 keeps no float32 master weights for bfloat16; use 1 (same cost alone)"
            )
