"""One tile of logits.

The only matrix product of the package that is written in Triton, used forward and backward.
"""
# mypy: disable-error-code="no-untyped-def, misc"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def grouped(program, blocks, slots, GROUP: tl.constexpr):
    """(token block, slot) of a program.

    Token blocks run fastest inside a group of them, then slots, then groups.

    What runs at once then covers few token blocks, whose hidden states stay in L2, and neighbouring
    parts of the head.
    """
    first = program // (GROUP * slots) * GROUP
    size = tl.minimum(blocks - first, GROUP)
    local = program % (GROUP * slots)
    return first + local % size, local // size


@triton.jit
def logit_tile(
    h, w, h_rows, w_rows, stride_h, stride_w, row0, col0, H,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
    H_TMA: tl.constexpr, W_TMA: tl.constexpr, EVEN: tl.constexpr, TYPE: tl.constexpr,
):  # fmt: skip
    """acc[ROWS, COLUMNS] float32 = h[h_rows] @ w[w_rows].T, summed in float32.

    float32 inputs: exact products.

    h, w     pointers, or tensor descriptors (H_TMA, W_TMA) that read rows from row0, col0 on, zeros
             past the end
    h_rows, w_rows  int64 rows for the pointer path, all of them inside the tensor
    EVEN     H is a multiple of DEPTH: no masks      TYPE     what both operands are converted to
    """
    acc = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for k0 in range(0, H, DEPTH):
        k = (k0 + tl.arange(0, DEPTH))[None, :]
        if H_TMA:
            a = h.load([row0, k0])
        elif EVEN:
            a = tl.load(h + h_rows[:, None] * stride_h + k)
        else:
            a = tl.load(h + h_rows[:, None] * stride_h + k, mask=k < H, other=0.0)
        if W_TMA:
            b = w.load([col0, k0])
        elif EVEN:
            b = tl.load(w + w_rows[:, None] * stride_w + k)
        else:
            b = tl.load(w + w_rows[:, None] * stride_w + k, mask=k < H, other=0.0)
        acc = tl.dot(a.to(TYPE), b.to(TYPE).T, acc, input_precision="ieee")
    return acc


@triton.jit
def halves(x, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The left and the right half of the columns of x[ROWS, COLUMNS]."""
    return tl.split(tl.permute(tl.reshape(x, (ROWS, 2, COLUMNS // 2)), (0, 2, 1)))


@triton.jit
def column_pieces(x, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PIECES: tl.constexpr):
    """x[ROWS, COLUMNS] as 1, 2, 4 or 8 tensors of neighbouring columns."""
    out = (x,)
    if PIECES > 1:
        out = halves(x, ROWS, COLUMNS)
    if PIECES > 2:
        out = halves(out[0], ROWS, COLUMNS // 2) + halves(out[1], ROWS, COLUMNS // 2)
    if PIECES > 4:
        a = halves(out[0], ROWS, COLUMNS // 4) + halves(out[1], ROWS, COLUMNS // 4)
        out = a + halves(out[2], ROWS, COLUMNS // 4) + halves(out[3], ROWS, COLUMNS // 4)
    return out
