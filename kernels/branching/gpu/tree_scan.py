"""The discounted scan along a tree of segments, from the leaves up.

The segmented scan (scan.py) gives every node's sums as if nothing lay behind it. A level at a time,
the deepest first, one program per node adds up what its children hand on (in the order of their
numbers, without atomics) and what it hands on itself. A last launch adds γ^(distance to the node's
end) times the node's carry to every token. float64 throughout, as there. Reads 5 bytes a token
twice and 8 once, writes 8 and 4.
"""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from appo._kernels.branching.gpu.scan import TINY, future_value, segment_of
from appo._kernels.common.gpu import launch
from appo._kernels.common.gpu.aot import AotCase
from appo._kernels.common.gpu.config import ceil_div

BLOCK, WARPS = 1024, 4


@triton.jit
def tree_level_kernel(
    local_ptr, offsets_ptr, power_ptr, weight_ptr, node_ptr, first_child_ptr, child_ptr, carry_ptr, value_ptr
):  # fmt: skip
    """For the node of this program.

    Carry = Σ_c w_c · value(c) over child[first_child[n] … first_child[n+1]-1], and value, what its
    own parent adds up: the sum at its first token, or the carry if it has none. power[B] =
    γ^length.
    """
    node = tl.load(node_ptr + tl.program_id(0))
    carry = tl.full((), 0.0, tl.float64)
    for i in range(tl.load(first_child_ptr + node), tl.load(first_child_ptr + node + 1)):
        child = tl.load(child_ptr + i)
        weight, value = tl.load(weight_ptr + child), tl.load(value_ptr + child)
        carry = tl.where(weight == 0, carry, carry + weight * value)
    begin, end = tl.load(offsets_ptr + node), tl.load(offsets_ptr + node + 1)
    own = tl.load(local_ptr + begin, mask=begin < end, other=0.0)
    tl.store(carry_ptr + node, carry)
    tl.store(value_ptr + node, own + tl.load(power_ptr + node) * carry)


@triton.jit(do_not_specialize=["N", "segments", "steps"])
def tree_apply_kernel(
    local_ptr, offsets_ptr, carry_ptr, out_ptr, N, segments, steps, log_gamma: tl.float64, BLOCK: tl.constexpr
):  # fmt: skip
    """out[N] = local + γ^(end - i) · carry."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < N
    segment = segment_of(offsets_ptr, tl.minimum(at, N - 1), segments, steps)
    distance = (tl.load(offsets_ptr + segment + 1) - at).to(tl.float64)
    power = tl.maximum(tl.exp(distance * log_gamma), TINY)  # NaN passes through a long node, too
    value = tl.load(local_ptr + at, mask=inside, other=0.0)
    tl.store(out_ptr + at, value + power * tl.load(carry_ptr + segment), mask=inside)


def tree_future_value(
    x: Tensor, mask: Tensor, cuts: Tensor, parents: Tensor, weights: Tensor, gamma: float
) -> Tensor:
    """x[N] float32 or float64, mask[N] uint8 on the device.

    cuts[B+1], parents[B] int64, weights[B] float64 on the host.
    """
    if gamma == 0.0 or parents.shape[0] == 0:
        return future_value(x, mask, cuts, gamma)
    device, n, nodes = x.device, x.shape[0], parents.shape[0]
    local = future_value(x, mask, cuts, gamma, torch.float64)
    lengths = (cuts[1:] - cuts[:-1]).double()
    power = torch.pow(torch.tensor(gamma, dtype=torch.float64), lengths).clamp(min=TINY.value)
    ordered, child = torch.sort(parents, stable=True)
    first_child = torch.searchsorted(ordered, torch.arange(nodes + 1))
    constants = [t.to(device) for t in (cuts, power, weights, first_child, child)]
    cuts_d, power, weights, first_child, child = constants
    carry, value = x.new_empty(2, nodes, dtype=torch.float64).unbind()
    out = torch.empty_like(x)
    with launch.on(device):
        for level in levels(parents):
            tree_level_kernel[(len(level),)](
                local, cuts_d, power, weights, level.to(device), first_child, child, carry, value,
                num_warps=1,
            )  # fmt: skip
        if n:
            tree_apply_kernel[(ceil_div(n, BLOCK),)](
                local, cuts_d, carry, out, n, nodes, nodes.bit_length(), math.log(gamma), BLOCK,
                num_warps=WARPS,
            )  # fmt: skip
    return out


def levels(parents: Tensor) -> list[Tensor]:
    """Node numbers by depth, the deepest level first; a parent comes before its children."""
    depth: list[int] = []
    for parent in parents.tolist():
        depth.append(0 if parent < 0 else depth[parent] + 1)
    at = torch.tensor(depth)
    return [(at == d).nonzero()[:, 0] for d in range(max(depth), -1, -1)]


def traffic(n: int) -> tuple[int, int]:
    """(bytes, FLOP) for float32 beyond the segmented scan with a float64 result.

    8·N in, 4·N out. An exponential and 3 operations.
    """
    return 12 * n, 30 * n


def aot_cases(arch: str) -> list[AotCase]:
    """Compilations of the kernels of this file that a package for `arch` holds."""
    node = {
        "local_ptr": "*fp64",
        "offsets_ptr": "*i64",
        "power_ptr": "*fp64",
        "weight_ptr": "*fp64",
    }
    node |= dict.fromkeys(("node_ptr", "first_child_ptr", "child_ptr"), "*i64")
    node |= {"carry_ptr": "*fp64", "value_ptr": "*fp64"}
    token = {"local_ptr": "*fp64", "offsets_ptr": "*i64", "carry_ptr": "*fp64", "out_ptr": "*fp32"}
    numbers = {
        "N": "i32",
        "segments": "i32",
        "steps": "i32",
        "log_gamma": "fp64",
        "BLOCK": "constexpr",
    }
    aligned = tuple(token)
    return [
        AotCase("tree level", tree_level_kernel, node, {}, 1),
        AotCase(
            "tree apply", tree_apply_kernel, token | numbers, {"BLOCK": BLOCK}, WARPS, divisible=aligned
        ),
    ]  # fmt: skip
