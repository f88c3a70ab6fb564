"""What every launcher needs to know.

Is there a device for this tensor, which one, and how operands are handed over.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor

from appo._kernels.common.gpu.config import Tile, pick

try:
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError as error:
    raise ImportError(
        "backend='triton' and 'cublas32' need Triton, which is not installed: pip install 'triton>=3.7'"
    ) from error

TYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}
# A product and the subtraction after it stay two roundings: x2 - m is then exactly 0 at the
# maximum, hence s ≥ 1, logp ≤ 0 and entropy ≥ 0; and backward rebuilds the x2 that forward saw.
OPTIONS: dict[str, Any] = {"enable_fp_fusion": False}


def interpreted() -> bool:
    """True when kernels run in Triton's CPU interpreter.

    TRITON_INTERPRET=1 before the first import.
    """
    return bool(triton.knobs.runtime.interpret)


def check_tensors(backend: str, *tensors: Tensor | None) -> None:
    """A tensor that these kernels cannot take is an error that says what to do, not a wrong number."""
    for x in tensors:
        if x is None:
            continue
        if x.dtype == torch.float64:
            raise TypeError(f"backend={backend!r} has no float64 kernel; use backend='torch'")
        if interpreted() and x.dtype == torch.bfloat16:
            raise TypeError(
                f"backend={backend!r} under TRITON_INTERPRET: the interpreter computes bfloat16 wrongly and silently; "
                "pass float32 tensors (they may hold bfloat16 values)"
            )
        if not x.is_cuda and not (interpreted() and x.device.type == "cpu"):
            raise ValueError(
                f"backend={backend!r} needs a CUDA tensor, this one is on {x.device}; use backend='auto', or set "
                "TRITON_INTERPRET=1 before triton is imported to run the kernels slowly on a CPU"
            )


def arch(device: torch.device) -> str:
    """Key of the tile tables: "sm_90", "gfx942", … or "interpret"."""
    return "interpret" if device.type == "cpu" else _arch(device.index or 0)


@cache
def _arch(index: int) -> str:
    if torch.version.hip:
        return "gfx942"
    major, minor = torch.cuda.get_device_capability(index)
    return f"sm_{major}0" if major >= 9 else f"sm_{major}{minor}"  # one table for 10.0 and 10.3


def processors(device: torch.device) -> int:
    """Multiprocessors of the device (4 in the interpreter)."""
    if device.type == "cpu":
        return 4
    return torch.cuda.get_device_properties(device).multi_processor_count


def on(device: torch.device) -> AbstractContextManager[Any]:
    """Triton launches on the current device; make it the one that holds the tensors."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def regular(h: Tensor, w: Tensor, depth: int) -> bool:
    """True when operands are read in whole, aligned vectors.

    One 16-bit type, rows at multiples of 32 bytes, H % depth == 0.
    """
    aligned = all(
        x.data_ptr() % 16 == 0 and x.stride(0) % 16 == 0 and x.stride(0) >= x.shape[1]
        for x in (h, w)
    )
    return aligned and h.dtype == w.dtype != torch.float32 and h.shape[1] % depth == 0


def tile(table: dict[str, Tile], h: Tensor, w: Tensor) -> Tile:
    """The tile of a table for these operands on their device."""
    name = arch(h.device)
    return pick(table, name, regular(h, w, table.get(name, table["default"]).depth))


def descriptor(x: Tensor, rows: int, depth: int) -> TensorDescriptor:
    """x[·, H] as kernel argument that reads blocks [rows, depth], zeros past the end."""
    return TensorDescriptor(x, list(x.shape), [x.stride(0), 1], [rows, depth])


def contiguous_rows(x: Tensor) -> Tensor:
    """x with unit stride inside a row; a copy only if it has not."""
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


def triton_type(*tensors: Tensor) -> Any:
    """The Triton type in which operands are multiplied: their own if they agree, else float32."""
    kinds = {x.dtype for x in tensors}
    return TYPES[kinds.pop()] if len(kinds) == 1 else tl.float32
