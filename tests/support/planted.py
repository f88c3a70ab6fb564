"""Planted errors: one piece of a definition is replaced by a wrong one, and tests of it must fail.

A definition that no test notices to be wrong is a definition that nothing calls, or that nothing
tests.
"""

from __future__ import annotations
import __future__

import importlib.util
import inspect
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

Planted = tuple[str, str, str]  # (function, right piece of its source, wrong piece)


def plant(monkeypatch: pytest.MonkeyPatch, module: ModuleType, error: Planted) -> None:
    """Make a function of the module wrong, for everyone who holds a reference to it."""
    name, right, wrong = error
    function = inspect.unwrap(getattr(module, name))  # below @torch.no_grad()
    source = textwrap.dedent(inspect.getsource(function))
    found = source.count(right)
    if found != 1:
        raise LookupError(f"{module.__name__}.{name} has {right!r} {found} times")
    flags = __future__.annotations.compiler_flag
    code = compile(source.replace(right, wrong), f"planted in {name}", "exec", flags)
    namespace = dict(vars(module))
    exec(code, namespace)
    monkeypatch.setattr(function, "__code__", inspect.unwrap(namespace[name]).__code__)


def functions_of(module: ModuleType) -> set[str]:
    """Names of the functions that a module defines."""
    return {
        name
        for name, value in vars(module).items()
        if inspect.isfunction(value) and value.__module__ == module.__name__
    }


def load_tests(path: Path) -> Any:
    """A test file as a module, to call its tests by name."""
    spec = importlib.util.spec_from_file_location(f"planted_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def who_fails(tests: Sequence[tuple[Callable[..., Any], tuple[Any, ...]]]) -> str | None:
    """The first test that fails, or None if all pass. Only assertions count, not crashes."""
    for function, arguments in tests:
        try:
            function(*arguments)
        except (AssertionError, pytest.fail.Exception):  # the latter: "did not raise"
            return f"{function.__name__}{arguments}"
    return None
