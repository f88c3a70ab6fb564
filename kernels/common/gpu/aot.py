"""What a Triton kernel module declares so that it can be compiled for GPUs that are not here.

Every module of kernels/gpu with a kernel has `aot_cases(arch) -> list[AotCase]`: one case per
shipped configuration, with exactly the constants and launch options that its launcher would use on
that architecture.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

ARCHS = ("sm_80", "sm_90", "sm_100", "gfx942")


@dataclass(frozen=True)
class AotCase:
    """One kernel in one shipped configuration.

    signature   argument name → Triton type ("*bf16", "*fp32", "*i64", "i32", "constexpr",
                "tensordesc<bf16[128,64]>")
    constexprs  values of the constexpr arguments
    divisible   names of pointers and integers that the launcher guarantees to be multiples of 16
    """

    name: str
    kernel: Any
    signature: dict[str, str]
    constexprs: dict[str, Any]
    num_warps: int = 4
    num_stages: int = 3
    divisible: tuple[str, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)
