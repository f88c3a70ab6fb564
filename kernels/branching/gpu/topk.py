"""The best k ≤ 64 tokens of every group of segments, in a total order.

Rule, value, packed position.

A candidate is one signed 64-bit key, larger is better:

    bit 63       0 for strict candidates, 1 for the others: every strict key is ≥ 0, every other one
                 negative
    bits 62…31   the float32 value as an unsigned number of the same order (NaN as -inf, -0 as +0)
    bits 30…0    2³¹-1 minus the packed position: of equals the earlier one is larger

Keys are distinct, so any way of taking the largest k gives the same result: no atomics, and nothing
depends on the grid. Two launches: `parts` programs per group keep the best of their share, one
program per group merges them. Reads 13 bytes a token (three scores, eligible). Positions must fit
31 bits.
"""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from appo._kernels.common import packed
from appo._kernels.common.gpu import launch
from appo._kernels.common.gpu.aot import AotCase

BLOCK, WARPS, MAX_K, PROGRAMS = 1024, 8, 64, 512
EMPTY = tl.constexpr(-(2**63))  # below every key: no value is as low as the bits 62…31 all 0
LAST = tl.constexpr(2**31 - 1)


@triton.jit
def make_key(value, strict, position):
    """An int64 that sorts by strict, then value, then lower position; NaN counts as -inf."""
    value = tl.where(value == value, value, float("-inf"))
    bits = tl.where(value == 0.0, 0.0, value).to(tl.int32, bitcast=True)
    ordered = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64) + 0x80000000
    key = (ordered << 31) | (position ^ LAST)  # LAST - position
    return tl.where(strict, key, key + EMPTY)


@triton.jit
def best_of(a, b, K: tl.constexpr):
    """The K largest of two sets of K."""
    return tl.topk(tl.reshape(tl.join(a, b), [2 * K]), K)


@triton.jit(do_not_specialize=["parts"])
def topk_kernel(
    z_entropy_ptr, z_omega_ptr, score_ptr, eligible_ptr, offsets_ptr, first_ptr, member_ptr, keys_ptr,
    parts, PAPER: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (g, p).

    keys[g, p, K], the best of every parts-th block of the segments member[first[g] … first[g+1]-1].
    """
    group, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    lane = tl.arange(0, BLOCK)
    best = tl.full((K,), EMPTY, tl.int64)
    for m in range(tl.load(first_ptr + group), tl.load(first_ptr + group + 1)):
        segment = tl.load(member_ptr + m)
        end = tl.load(offsets_ptr + segment + 1)
        for first in range(tl.load(offsets_ptr + segment) + part * BLOCK, end, parts * BLOCK):
            at = first + lane
            usable = tl.load(eligible_ptr + at, mask=at < end, other=0) != 0
            z_entropy = tl.load(z_entropy_ptr + at, mask=usable, other=0.0)
            strict = (z_entropy > 0) & (tl.load(z_omega_ptr + at, mask=usable, other=0.0) > 0)
            value = tl.load(score_ptr + at, mask=usable, other=0.0)
            if PAPER:
                usable = usable & (z_entropy > 0)
                value = tl.where(strict, value, z_entropy)
            key = tl.where(usable, make_key(value, strict, at), EMPTY)
            if tl.max(key) > tl.min(best):
                best = best_of(best, tl.topk(key, K), K)
    tl.store(keys_ptr + (group * parts + part) * K + tl.arange(0, K), best)


@triton.jit(do_not_specialize=["parts", "k", "filler"])
def topk_merge_kernel(keys_ptr, index_ptr, rule_ptr, count_ptr, parts, k, filler, K: tl.constexpr):
    """index[G, k], rule[G, k] (0 strict, `filler`, -1 not filled), count[G] from keys[G, parts, K]."""
    group = tl.program_id(0).to(tl.int64)
    slot = tl.arange(0, K)
    best = tl.full((K,), EMPTY, tl.int64)
    for part in range(parts):
        best = best_of(best, tl.load(keys_ptr + (group * parts + part) * K + slot), K)
    filled = best != EMPTY
    position = tl.where(filled, (best & LAST) ^ LAST, -1)
    rule = tl.where(filled, tl.where(best >= 0, 0, filler), -1).to(tl.int64)
    tl.store(index_ptr + group * k + slot, position, mask=slot < k)
    tl.store(rule_ptr + group * k + slot, rule, mask=slot < k)
    tl.store(count_ptr + group, tl.sum((filled & (slot < k)).to(tl.int64)))


def select_branch_points(
    z: tuple[Tensor, ...],
    eligible: Tensor,
    offsets: Tensor,
    group: Tensor,
    n_groups: int,
    k: int,
    paper: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """z = (z_entropy, z_omega, score) float32[N], eligible[N] uint8, group[B] →.

    Index, rule, count. Waits for the device only where offsets or groups lie on the CPU.
    """
    launch.check_tensors("triton", eligible)
    n = eligible.shape[0]
    if z[2].dtype != torch.float32:
        raise TypeError(f"backend='triton' selects by float32 scores, these are {z[2].dtype}")
    if k > MAX_K or n > LAST.value:
        raise ValueError(f"backend='triton' with k={k}, N={n}; at most k={MAX_K}, N={LAST.value}")
    device = eligible.device
    cuts, group = packed.on_device(offsets, n, device), group.to(device)
    index = torch.full((n_groups, k), -1, dtype=torch.int64, device=device)
    rule, count = torch.full_like(index, -1), index.new_zeros(n_groups)
    if n_groups == 0 or k == 0:
        return index, rule, count
    ordered, member = torch.sort(group, stable=True)
    first = torch.searchsorted(ordered, torch.arange(n_groups + 1, device=device))
    size = max(2, triton.next_power_of_2(k))
    parts = max(1, min(16, PROGRAMS // n_groups))
    block = BLOCK
    if launch.interpreted():  # few, small blocks: it sorts in Python
        parts, block = 2, 64
    keys = index.new_empty(n_groups * parts * size)
    with launch.on(device):
        topk_kernel[(n_groups, parts)](
            *z, eligible, cuts, first, member, keys, parts, paper, size, block,
            num_warps=WARPS,
        )  # fmt: skip
        topk_merge_kernel[(n_groups,)](
            keys, index, rule, count, parts, k, 1 if paper else 2, size, num_warps=1
        )  # fmt: skip
    return index, rule, count


def traffic(n: int) -> tuple[int, int]:
    """(bytes, operations): 13·N in, about 20 operations a token.

    A block is sorted only if it holds a new best.
    """
    return 13 * n, 20 * n


def aot_cases(arch: str) -> list[AotCase]:
    """Compilations of the kernels of this file that a package for `arch` holds."""
    pointers = dict.fromkeys(("z_entropy_ptr", "z_omega_ptr", "score_ptr"), "*fp32")
    pointers |= {"eligible_ptr": "*u8"}
    pointers |= dict.fromkeys(("offsets_ptr", "first_ptr", "member_ptr", "keys_ptr"), "*i64")
    found = pointers | {"parts": "i32"} | dict.fromkeys(("PAPER", "K", "BLOCK"), "constexpr")
    merged = dict.fromkeys(("keys_ptr", "index_ptr", "rule_ptr", "count_ptr"), "*i64")
    merged |= {"parts": "i32", "k": "i32", "filler": "i32", "K": "constexpr"}
    cases = []
    for size in (4, 16, MAX_K):
        constexprs = {"PAPER": True, "K": size, "BLOCK": BLOCK}
        aligned = tuple(pointers)
        cases += [
            AotCase(f"topk {size}", topk_kernel, found, constexprs, WARPS, divisible=aligned),
            AotCase(f"topk merge {size}", topk_merge_kernel, merged, {"K": size}, 1),
        ]
    return cases
