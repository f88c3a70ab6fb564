"""Registration of our operators with torch.

Opaque to torch.compile, with a fake implementation for tracing.

`torch.library.custom_op` would do the same, but imports the whole compiler at its first call: 4 s,
compiled code or not.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from itertools import islice
from typing import Any, get_type_hints

import torch

_LIBRARY = torch.library.Library("appo", "FRAGMENT")


def operator(
    name: str, function: Callable[..., Any], fake: Callable[..., Any]
) -> Callable[..., Any]:
    """`function` as torch.ops.appo.<name>, for every device; `fake` gives shapes and dtypes only.

    The schema is read from the annotations. A parameter that is a named tuple becomes one argument
    per field: the operator is called with `*value`, `function` and `fake` get the tuple. The
    operator has no derivative of its own: call it inside an autograd.Function. Its results never
    alias its inputs.
    """
    signature, pack = _flattened(function)

    def run(*args: Any) -> Any:
        return function(*pack(args))

    def trace(*args: Any) -> Any:
        return fake(*pack(args))

    run.__signature__ = signature  # type: ignore[attr-defined]
    schema = torch.library.infer_schema(run, mutates_args=())
    _LIBRARY.define(name + schema)
    _LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"appo::{name}", trace, lib=_LIBRARY)
    made: Callable[..., Any] = getattr(torch.ops.appo, name).default
    return made


def _flattened(
    function: Callable[..., Any],
) -> tuple[inspect.Signature, Callable[[tuple[Any, ...]], list[Any]]]:
    """A signature without named tuples, and what makes the tuples of flat arguments.

    Their fields stand in their place.
    """
    hints = get_type_hints(function)
    signature = inspect.signature(function)
    flat: list[inspect.Parameter] = []
    kinds: list[tuple[Any, int]] = []
    for parameter in signature.parameters.values():
        kind = hints[parameter.name]
        fields = get_type_hints(kind) if hasattr(kind, "_fields") else {parameter.name: kind}
        flat += [parameter.replace(name=n, annotation=t) for n, t in fields.items()]
        kinds.append((kind if hasattr(kind, "_fields") else None, len(fields)))

    def pack(args: tuple[Any, ...]) -> list[Any]:
        given = iter(args)
        return [next(given) if kind is None else kind(*islice(given, n)) for kind, n in kinds]

    return signature.replace(parameters=flat, return_annotation=hints["return"]), pack
