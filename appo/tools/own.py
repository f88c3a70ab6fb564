"""A user's own tool: a function, or a class or object with `name`, `description` and `__call__`.

    def lookup(term: str) -> str:
        "Look up a term in the glossary."

is the tool `lookup`. Its name is the tag, its docstring is what the model reads, and the type hints
say how it is called: one text parameter takes what stands between the tags as it is, several are
read from a JSON object.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
import time
import typing
from collections.abc import Callable, Mapping
from typing import Any

from appo.errors import ConfigError
from appo.imports import call_problem, deferred
from appo.tools.base import ToolResult, ToolSpec
from appo.tools.escape import TAGS, escape_tags, shorten

EXPECTED = (
    "a function such as `def lookup(term: str) -> str` with a docstring, or a class with name, description and "
    "__call__(self, term: str) -> str"
)
MAX_CHARS = 512  # of output, where the tool has no `max_chars` of its own
_NAME = re.compile(r"[a-z][a-z0-9_]*")
_JSON = {str: "string", int: "integer", float: "number", bool: "boolean", list: "array", dict: "object"}  # fmt: skip


class OwnTool:
    """A `Tool` around the user's code.

    Reads the argument, keeps time, escapes and cuts what comes back.

    parameters  JSON schema of the call's arguments; None: one plain text
    What `call` raises goes through to the pool, which makes a result of it that the model reads.
    """

    def __init__(
        self,
        name: str,
        description: str,
        call: Callable[..., Any],
        parameters: Mapping[str, Any] | None,
        max_chars: int,
    ):
        self.name, self.description, self.parameters = name, description, parameters
        self.max_chars, self._call = max_chars, call

    def __call__(self, argument: str) -> ToolResult:
        """One call.

        Raises what the user's code raises, and TypeError for a result that is no text.
        """
        started = time.monotonic()
        try:
            args, kwargs = read_argument(argument, self.parameters)
        except ValueError as error:
            text, cut = shorten(escape_tags(f"error: {error}"), self.max_chars)
            return ToolResult(text, False, 0.0, "bad_request", cut)
        value = self._call(*args, **kwargs)
        if not isinstance(value, ToolResult):
            if not isinstance(value, str | int | float):
                raise TypeError(f"{self.name} returned {type(value).__name__}, expected str")
            value = ToolResult(str(value), True, time.monotonic() - started)
        # Half a surrogate pair is no character: the tokenizer would refuse the whole rollout.
        output = value.output.encode("utf-8", "replace").decode()
        text, cut = shorten(escape_tags(output), self.max_chars)
        return dataclasses.replace(value, output=text, truncated=cut or value.truncated)

    def close(self) -> None:
        """Close the user's object, if it can be closed."""
        close = getattr(self._call, "close", None)
        if callable(close):
            close()


def own_spec(thing: Any, text: str) -> ToolSpec:
    """The specification of a user's tool that has no `problem`.

    `text` is its import string, for errors.
    """
    name, parameters = _name(thing), schema(thing)
    description = f"{_description(thing)} {usage(name, parameters)}"
    if f"<{name}>" in _description(thing):
        description = _description(thing)
    most = int(getattr(thing, "max_chars", MAX_CHARS))

    def make() -> OwnTool:
        call = thing
        if inspect.isclass(thing):
            try:
                call = thing()
            except Exception as error:  # the user's code may fail in any way
                raise ConfigError(
                    f"tools.enabled: {text!r} cannot be made: {type(error).__name__}: {error}"
                ) from error
        return OwnTool(name, description, call, parameters, most)

    return ToolSpec(name, description, most, make, tuple(getattr(thing, "example", ())))


def problem(thing: Any) -> str:
    """What keeps `thing` from being a tool, in words for after its name; "" when nothing does."""
    if not callable(thing):
        return f"is of type {type(thing).__name__}, which cannot be called"
    if inspect.isclass(thing):
        if not any("__call__" in vars(base) for base in thing.__mro__):
            return "is a class without __call__"
        wrong = call_problem(thing)
        if wrong:
            return f"{wrong}: the class is made without arguments"
    if late := deferred(thing.__call__ if inspect.isclass(thing) else thing):
        return late
    name = _name(thing)
    if not _NAME.fullmatch(name):
        return f"has the name {name!r}, which must be made of a-z, 0-9 and _, as it is the tag <{name}>"
    if name in TAGS and name not in ("search", "python"):
        return f"has the name {name!r}, which is a tag of the protocol itself"
    if not _description(thing):
        return "has no docstring (or description), which is what the model reads about it"
    try:
        found = _parameters(thing)
    except (TypeError, ValueError):
        return "does not say its parameters"
    if odd := [p for p in found if p.kind in (p.POSITIONAL_ONLY, p.VAR_POSITIONAL, p.VAR_KEYWORD)]:
        return f"takes {odd[0]}, but each parameter of a tool has a name"
    return ""


def schema(thing: Any) -> dict[str, Any] | None:
    """JSON schema of the arguments, from the type hints; None for a single text parameter."""
    found = _parameters(thing)
    if len(found) == 1 and found[0].annotation in (str, inspect.Parameter.empty):
        return None
    kinds = {p.name: _JSON.get(typing.get_origin(p.annotation) or p.annotation) for p in found}
    return {
        "type": "object",
        "properties": {name: {"type": kind} if kind else {} for name, kind in kinds.items()},
        "required": [p.name for p in found if p.default is p.empty],
    }


def usage(name: str, parameters: Mapping[str, Any] | None) -> str:
    """How the tool is called, as the model reads it."""
    back = "and the result comes back between <result> and </result>."
    if parameters is None:
        return f"Write its input between <{name}> and </{name}>, {back}"
    if not parameters["properties"]:
        return f"Write <{name}></{name}>, {back}"
    fields = ", ".join(
        f'"{field}": {kind.get("type", "any")}' + ("" if field in parameters["required"] else " (optional)")
        for field, kind in parameters["properties"].items()
    )  # fmt: skip
    return f"Write a JSON object {{{fields}}} between <{name}> and </{name}>, {back}"


def read_argument(
    argument: str, parameters: Mapping[str, Any] | None
) -> tuple[tuple[str, ...], dict[str, Any]]:
    """(positional, keyword) arguments of the call that `argument` writes.

    Raises ValueError with what is wrong.
    """
    if parameters is None:
        return (argument.strip(),), {}
    if not argument.strip() and not parameters["required"]:
        return (), {}
    try:
        values = json.loads(argument)
    except ValueError as error:
        raise ValueError(f"the input is not JSON ({error})") from error
    if not isinstance(values, dict):
        raise ValueError("the input is not a JSON object")
    known = parameters["properties"]
    if unknown := [k for k in values if k not in known]:
        raise ValueError(f"unknown field {unknown[0]!r}; known: {', '.join(known) or 'none'}")
    if missing := [k for k in parameters["required"] if k not in values]:
        raise ValueError(f"field {missing[0]!r} is missing")
    for field, value in values.items():
        kind = known[field].get("type")
        if kind is not None and not _is(value, kind):
            raise ValueError(f"field {field!r} must be of type {kind}")
    return (), values


def _is(value: Any, kind: str) -> bool:
    if kind in ("integer", "number") and isinstance(value, bool):
        return False
    if kind == "number":
        return isinstance(value, int | float)
    return isinstance(value, next(t for t, word in _JSON.items() if word == kind))


def _name(thing: Any) -> str:
    return str(getattr(thing, "name", None) or getattr(thing, "__name__", type(thing).__name__))


def _description(thing: Any) -> str:
    """`description`, or the first paragraph of the docstring, as one line."""
    said = getattr(thing, "description", None)
    if said is None:
        said = (
            (inspect.getdoc(thing) or "")
            if inspect.isroutine(thing) or inspect.isclass(thing)
            else ""
        )
        said = said.split("\n\n")[0]
    return " ".join(str(said).split())


def _parameters(thing: Any) -> list[inspect.Parameter]:
    """The parameters of a call, without self."""
    call = thing.__call__ if inspect.isclass(thing) else thing
    try:
        found = inspect.signature(call, eval_str=True)
    except NameError:  # a hint that exists for type checkers only
        found = inspect.signature(call)
    return list(found.parameters.values())[inspect.isclass(thing) :]
