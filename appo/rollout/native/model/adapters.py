"""Low-rank adapters in the engine: applied beside the weights, fused as the weights are.

q, k, v (and gate, up) are one linear, so their adapters become one: the down projections stacked,
the up projections block-diagonal. A push of adapters alone neither touches nor repacks a weight.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from appo.errors import ModelError
from appo.rollout.native.model.linear import Linear, Slice, Target

DOWN, UP = ".lora_A", ".lora_B"


class Adapters:
    """Collects the adapters of one push, then installs them.

    They are `<module>.lora_A` [r, in] and `<module>.lora_B` [out, r].
    """

    def __init__(self) -> None:
        self.parts: dict[str, Tensor] = {}

    def take(self, name: str, value: object) -> bool:
        """Keep a copy if `name` is an adapter's; → whether it was."""
        if not name.endswith((DOWN, UP)):
            return False
        tensor = value if isinstance(value, Tensor) else torch.as_tensor(value)
        self.parts[name] = tensor.detach().clone()
        return True

    def check(self, slices: Mapping[str, Slice], dtype: torch.dtype) -> Callable[[], None]:
        """Check all of them against the model's linears, by module name.

        → what installs them, in `dtype`.

        Nothing is changed before that is called. Raises ModelError.
        """
        by_linear: dict[int, list[tuple[Slice, Tensor, Tensor]]] = defaultdict(list)
        names: dict[int, set[str]] = defaultdict(set)
        for name in self.parts:
            module = name.removesuffix(DOWN).removesuffix(UP)
            if name.endswith(DOWN):
                s, down, up = self._pair(slices, module)
                by_linear[id(s.linear)].append((s, down, up))
                names[id(s.linear)].add(module)
            elif module + DOWN not in self.parts:
                raise ModelError(f"adapter {name!r} came without {module + DOWN!r}; push both")
        for key, group in by_linear.items():
            lost = group[0][0].linear.adapted - names[key]
            if lost:  # they share one fused adapter, which is replaced as a whole
                raise ModelError(
                    f"adapters of {sorted(names[key])} came without those of {sorted(lost)}; push all"
                )

        def install() -> None:
            for key, group in by_linear.items():
                linear = group[0][0].linear
                linear.adapter = _fuse(linear, group, dtype)
                linear.adapted = frozenset(names[key])

        return install

    def _pair(self, slices: Mapping[str, Slice], module: str) -> tuple[Slice, Tensor, Tensor]:
        s = slices.get(module)
        if s is None:
            raise ModelError(
                f"adapter {module + DOWN!r}: the model has no linear of that name; use Hugging Face names"
            )
        down, up = self.parts[module + DOWN], self.parts.get(module + UP)
        want_in, want_out = s.linear.weight.shape[1], s.b - s.a
        if up is None:
            raise ModelError(f"adapter {module + DOWN!r} came without {module + UP!r}; push both")
        if down.shape[1] != want_in or tuple(up.shape) != (want_out, down.shape[0]):
            raise ModelError(
                f"adapter of {module!r}: lora_A {tuple(down.shape)} and lora_B {tuple(up.shape)} do not fit "
                f"[r, {want_in}] and [{want_out}, r]"
            )
        return s, down, up


def _fuse(
    linear: Linear, group: list[tuple[Slice, Tensor, Tensor]], dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Stacked down [Σr, in] and block-diagonal up [out, Σr].

    Rows of up are in the order of the fused weight.
    """
    total = sum(down.shape[0] for _, down, _ in group)
    fused = linear.weight.new_zeros(linear.weight.shape[0], total, dtype=dtype)
    at = 0
    for s, down, up in group:
        r = down.shape[0]
        Target(fused[s.a : s.b, at : at + r], tuple(up.shape), s.heads).write(up)
        at += r
    stacked = torch.cat([down for _, down, _ in group]).to(device=fused.device, dtype=dtype)
    return stacked.contiguous(), fused
