"""Nested values → dataclasses, by the types of their fields. Knows no key by name."""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Collection, Mapping
from typing import Any, Literal, Union

from appo.errors import ConfigError


def number(text: str) -> Any:
    """YAML 1.1 reads 1e-6 as a string; nobody means that."""
    try:
        return float(text)
    except ValueError:
        return text


def build(
    cls: type,
    values: Any,
    places: Mapping[str, str],
    prefix: str = "",
    without: Collection[str] = (),
) -> Any:
    """A `cls` of nested dicts. places: dotted key → file:line; without: fields that are no keys."""
    if values is None:
        values = {}
    if not isinstance(values, dict):
        where = places.get(prefix[:-1], "?")
        raise ConfigError(f"{prefix[:-1]} ({where}): expected a group of keys, got {values!r}")
    hints = typing.get_type_hints(cls)
    known = {f.name for f in dataclasses.fields(cls)} - set(without)
    out: dict[str, Any] = {}
    for key, value in values.items():
        dotted = f"{prefix}{key}"
        where = places.get(dotted, "?")
        if key not in known:
            near = difflib.get_close_matches(str(key), sorted(known), 1, 0.5)
            suggestion = f"did you mean {prefix}{near[0]}?" if near else ""
            hint = suggestion or f"known keys: {', '.join(sorted(known))}"
            raise ConfigError(f"unknown key {dotted!r} ({where}); {hint}")
        if dataclasses.is_dataclass(hints[key]):
            out[key] = build(typing.cast("type", hints[key]), value, places, dotted + ".")
        else:
            out[key] = convert(hints[key], value, dotted, where)
    return cls(**out)


def check_types(section: Any, prefix: str) -> None:
    """ConfigError for a field whose value is not of its type.

    The field is one of a dataclass instance, or of one in it.
    """
    hints = typing.get_type_hints(type(section))
    for f in dataclasses.fields(section):
        value = getattr(section, f.name)
        if dataclasses.is_dataclass(value):
            check_types(value, f"{prefix}{f.name}.")
        else:
            convert(hints[f.name], value, prefix + f.name, f"in {type(section).__name__}")


def convert(hint: Any, value: Any, key: str, where: str) -> Any:
    """Return `value` as the hinted type (int → float, numeric string → float) or raise."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        inner = [a for a in args if a is not type(None)]
        words = [w for a in inner[1:] for w in typing.get_args(a)]  # int | Literal["all"]
        if value in words:
            return value
        try:
            return convert(inner[0], value, key, where)
        except ConfigError as error:
            if not words:
                raise
            raise ConfigError(f"{error}, or {' or '.join(map(repr, words))}") from error
    if origin is Literal:
        return _choice(args, value, key, where)
    if origin is list:
        if not isinstance(value, list):
            raise ConfigError(
                f"{key}={value!r} ({where}): expected a list, for example {key}=[a,b]"
            )
        return [convert(args[0], v, key, where) for v in value]
    if origin is dict:
        if not isinstance(value, dict):
            raise ConfigError(f"{key}={value!r} ({where}): expected a mapping")
        return value
    return _scalar(hint, value, key, where)


def _choice(allowed: tuple[Any, ...], value: Any, key: str, where: str) -> Any:
    if value in allowed:
        return value
    near = difflib.get_close_matches(str(value), [str(a) for a in allowed], 1, 0.5)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    raise ConfigError(
        f"{key}={value!r} ({where}): must be one of {', '.join(map(str, allowed))}{hint}"
    )


def _scalar(hint: Any, value: Any, key: str, where: str) -> Any:
    if hint is float and isinstance(value, str):
        value = number(value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is int and isinstance(value, float) and value.is_integer():
        return int(value)
    if hint is str and isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)
    if hint is Any or (isinstance(value, hint) and not (hint is int and isinstance(value, bool))):
        return value
    raise ConfigError(
        f"{key}={value!r} ({where}): expected {hint.__name__}, got {type(value).__name__}"
    )
