"""Registration of our operators with torch: opaque to torch.compile, with a fake implementation for tracing.

`torch.library.custom_op` would do the same, but imports the whole compiler at its first call: 4 s, compiled code or not.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_LIBRARY = torch.library.Library("appo", "FRAGMENT")


def operator(
    name: str, function: Callable[..., Any], fake: Callable[..., Any]
) -> Callable[..., Any]:
    """`function` as torch.ops.appo.<name>, for every device; `fake` gives shapes and dtypes only.

    The schema is read from the annotations. The operator has no derivative of its own: call it inside an
    autograd.Function. Its results never alias its inputs.
    """
    schema = torch.library.infer_schema(function, mutates_args=())
    _LIBRARY.define(name + schema)
    _LIBRARY.impl(name, function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"appo::{name}", fake, lib=_LIBRARY)
    made: Callable[..., Any] = getattr(torch.ops.appo, name).default
    return made
