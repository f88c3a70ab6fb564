"""The segmented reverse discounted scan, as one flat scan over all tokens.

A token is the map F → b + a·F with b its masked log-ratio and a = γ, or 0 at the last token of a
segment, so that nothing crosses a boundary; maps compose, and composing them in any grouping is a
scan. Three launches: each block's composed map, a carry through the blocks by one program, and the
blocks once more with the carry.

The order of tokens is reversed by the addresses, not by the scan operator: position N-1 comes
first. All arithmetic is in float64: at O(N) operations the kernel waits for memory on any GPU, and
1/(1-γ) would amplify float32 rounding. Reads 5 bytes a token twice (float32 and mask; the offsets
stay in cache), writes 4; workspace 16 bytes per 1,024 tokens.
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
from appo._kernels.common.gpu.config import ceil_div

BLOCK, WARPS = 1024, 4
INTERPRET = 64  # the interpreter composes the maps one by one in Python
# Products of γ stop here instead of at 0: a 0 is a boundary, and NaN must pass through a long
# segment but not through it.
TINY = tl.constexpr(1e-300)


@triton.jit
def chain(a1, b1, a2, b2):
    """First (a1, b1), then (a2, b2), which lies to the left of it.

    Behind a cut (a2 = 0) nothing counts, NaN or not.
    """
    a = tl.where((a1 == 0) | (a2 == 0), 0.0, tl.maximum(a1 * a2, TINY))
    b = tl.where(a2 == 0, b2, b2 + a2 * b1)
    return a, b


@triton.jit
def segment_of(offsets_ptr, at, segments, steps):
    """The segment b with offsets[b] ≤ at < offsets[b+1], by halving `steps` ≥ log2(segments) times."""
    low = tl.zeros_like(at)
    high = low + segments
    for _ in range(steps):
        middle = (low + high) // 2
        left = tl.load(offsets_ptr + middle) <= at
        low = tl.where(left, middle, low)
        high = tl.where(left, high, middle)
    return low


@triton.jit
def reversed_positions(N, BLOCK: tl.constexpr):
    """This program's positions in the order of the scan; negative past the first token."""
    return N - 1 - (tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK))


@triton.jit
def scan_block(d, at, segment, offsets_ptr, gamma):
    """(a, b) of the composed maps of this block's tokens up to each of them.

    d[BLOCK] float64, 0 where masked.
    """
    inside = at >= 0
    last = tl.load(offsets_ptr + segment + 1) == at + 1
    a = tl.where(inside, tl.where(last, 0.0, gamma + tl.zeros_like(d)), 1.0)
    return tl.associative_scan((a, d), 0, chain)


@triton.jit
def carried(a, b, state_ptr):
    """The values of this block: its own sums plus what the blocks before it carry in."""
    block = tl.program_id(0).to(tl.int64)
    carry = tl.load(state_ptr + block - 1, mask=block > 0, other=0.0)
    return tl.where(a == 0, b, b + a * carry)


@triton.jit
def store_block_map(a, b, a_ptr, b_ptr, BLOCK: tl.constexpr):
    """The composed map of the whole block is that at its last lane."""
    final = tl.arange(0, BLOCK) == BLOCK - 1
    block = tl.program_id(0).to(tl.int64)
    tl.store(a_ptr + block, tl.sum(tl.where(final, a, 0.0)))
    tl.store(b_ptr + block, tl.sum(tl.where(final, b, 0.0)))


@triton.jit
def load_difference(x_ptr, minus_ptr, mask_ptr, at):
    """x - minus (or x) in float64 where the mask is set, else 0."""
    keep = tl.load(mask_ptr + at, mask=at >= 0, other=0) != 0
    d = tl.load(x_ptr + at, mask=keep, other=0.0).to(tl.float64)
    if minus_ptr is not None:
        d -= tl.load(minus_ptr + at, mask=keep, other=0.0).to(tl.float64)
    return d, keep


@triton.jit(do_not_specialize=["N", "segments", "steps"])
def scan_blocks_kernel(
    x_ptr, minus_ptr, mask_ptr, offsets_ptr, a_ptr, b_ptr, N, segments, steps, gamma: tl.float64, BLOCK: tl.constexpr
):  # fmt: skip
    """Launch 1: a[blocks], b[blocks] float64, the composed map of each block of x - minus."""
    at = reversed_positions(N, BLOCK)
    d, _ = load_difference(x_ptr, minus_ptr, mask_ptr, at)
    segment = segment_of(offsets_ptr, tl.maximum(at, 0), segments, steps)
    a, b = scan_block(d, at, segment, offsets_ptr, gamma)
    store_block_map(a, b, a_ptr, b_ptr, BLOCK)


@triton.jit(do_not_specialize=["blocks"])
def scan_carry_kernel(a_ptr, b_ptr, blocks, BLOCK: tl.constexpr):
    """Launch 2, one program.

    b[blocks] becomes the value at the first token of each block, what the next one continues.
    """
    value = tl.full((), 0.0, tl.float64)
    lane = tl.arange(0, BLOCK)
    for first in range(0, blocks, BLOCK):
        here = first + lane < blocks
        a = tl.load(a_ptr + first + lane, mask=here, other=1.0)
        b = tl.load(b_ptr + first + lane, mask=here, other=0.0)
        a, b = tl.associative_scan((a, b), 0, chain)
        b = tl.where(a == 0, b, b + a * value)
        tl.store(b_ptr + first + lane, b, mask=here)
        value = tl.sum(tl.where(lane == BLOCK - 1, b, 0.0))


@triton.jit(do_not_specialize=["N", "segments", "steps"])
def scan_apply_kernel(
    x_ptr, mask_ptr, offsets_ptr, state_ptr, out_ptr, N, segments, steps, gamma: tl.float64, BLOCK: tl.constexpr
):  # fmt: skip
    """Launch 3: out[N]."""
    at = reversed_positions(N, BLOCK)
    d, _ = load_difference(x_ptr, None, mask_ptr, at)
    segment = segment_of(offsets_ptr, tl.maximum(at, 0), segments, steps)
    a, b = scan_block(d, at, segment, offsets_ptr, gamma)
    tl.store(out_ptr + at, carried(a, b, state_ptr), mask=at >= 0)


def block_size() -> int:
    """Tokens per program."""
    return INTERPRET if launch.interpreted() else BLOCK


def carries(x: Tensor, minus: Tensor | None, mask: Tensor, cuts: Tensor, gamma: float) -> Tensor:
    """Launches 1 and 2: state[blocks] float64, the value at the first token of each block."""
    n, segments = x.shape[0], cuts.shape[0] - 1
    size = block_size()
    blocks = ceil_div(n, size)
    a, b = (x.new_empty(blocks, dtype=torch.float64) for _ in range(2))
    scan_blocks_kernel[(blocks,)](
        x, minus, mask, cuts, a, b, n, segments, segments.bit_length(), gamma, size, num_warps=WARPS
    )  # fmt: skip
    scan_carry_kernel[(1,)](a, b, blocks, size, num_warps=WARPS)
    return b


def future_value(
    x: Tensor, mask: Tensor, offsets: Tensor, gamma: float, dtype: torch.dtype | None = None
) -> Tensor:
    """x[N] float32 or float64, mask[N] uint8, offsets[B+1] → [N] in `dtype` (that of x).

    Waits for the device only where offsets or groups lie on the CPU.
    """
    launch.check_tensors("triton", mask)
    out = torch.empty_like(x, dtype=dtype)
    n = x.shape[0]
    cuts = packed.on_device(offsets, n, x.device)
    if n:
        segments = cuts.shape[0] - 1
        with launch.on(x.device):
            state = carries(x, None, mask, cuts, gamma)
            scan_apply_kernel[(len(state),)](
                x, mask, cuts, state, out, n, segments, segments.bit_length(), gamma, block_size(),
                num_warps=WARPS,
            )  # fmt: skip
    return out


def traffic(n: int) -> tuple[int, int]:
    """(bytes, FLOP) for float32: 5·N read twice and 4·N written.

    About 3·(log2(BLOCK) + 1) operations a token and launch.
    """
    return 14 * n, 2 * 3 * 11 * n


def aot_cases(arch: str) -> list[AotCase]:
    """Compilations of the kernels of this file that a package for `arch` holds."""
    pointers = {"x_ptr": "*fp32", "mask_ptr": "*u8", "offsets_ptr": "*i64"}
    numbers = {"N": "i32", "segments": "i32", "steps": "i32", "gamma": "fp64", "BLOCK": "constexpr"}
    blocks = {"a_ptr": "*fp64", "b_ptr": "*fp64"}
    first = pointers | {"minus_ptr": "constexpr"} | blocks | numbers
    apply = pointers | {"state_ptr": "*fp64", "out_ptr": "*fp32"} | numbers
    carry = blocks | {"blocks": "i32", "BLOCK": "constexpr"}

    def case(name: str, kernel, signature: dict[str, str], constexprs: dict) -> AotCase:
        aligned = tuple(k for k, v in signature.items() if v.startswith("*"))
        return AotCase(name, kernel, signature, constexprs, WARPS, divisible=aligned)

    size = {"BLOCK": BLOCK}
    return [
        case("scan blocks", scan_blocks_kernel, first, size | {"minus_ptr": None}),
        case("scan blocks difference", scan_blocks_kernel, first | {"minus_ptr": "*fp32"}, size),
        case("scan carry", scan_carry_kernel, carry, size),
        case("scan apply", scan_apply_kernel, apply, size),
        case("scan apply f64", scan_apply_kernel, apply | {"out_ptr": "*fp64"}, size),
    ]
