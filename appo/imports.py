"""Import strings: `module:attribute` names a user's own part where a built-in name may stand.

A recipe may name code that Python can import, and nothing else: no file, no pickle. The current
folder is looked in last, behind everything that is installed, so that `my_tool.py` beside the
recipe is found by `my_tool:search`, and a file of the user never stands in for a library.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from appo.errors import ConfigError

_NAME = r"[^\W\d]\w*"
_FORM = re.compile(rf"({_NAME}(?:\.{_NAME})*):({_NAME}(?:\.{_NAME})*)")
_FILE = re.compile(r"[/\\]|^[.~]|\.(?:py|pyc|pkl|pickle|pt)(?::|$)")

Check = Callable[[Any], str]  # what is wrong with the object, or ""


def is_import(text: str, builtin: Iterable[str] = ()) -> bool:
    """Whether `text` is meant as an import string.

    It has a colon and does not begin with a built-in name.

    >>> is_import("my_tool:search"), is_import("python", ["python"])
    (True, False)
    >>> is_import("reasoning_gym:chain_sum", ["reasoning_gym"])
    False
    """
    head, colon, _ = text.partition(":")
    return bool(colon) and head not in builtin


def resolve(
    text: str, where: str, expected: str, check: Check | None = None, *, here: bool = True
) -> Any:
    """The object that `text` names. It is imported, and neither called nor changed.

    where     the key that holds the text, such as "tools.enabled"; every error begins with it
    expected  what must stand there, as the user would write it: "search(query: str) -> str"
    check     says what is wrong with the object, or "" (see `call_problem`)
    here      look in the current folder too

    Raises ConfigError that names key, module, attribute and what is expected.

    >>> resolve("math:sqrt", "data.task", "sqrt(x)")(9.0)
    3.0
    """
    module_name, path = split(text, where, expected)
    if here:
        use_current_folder()
    module = _import(module_name, text, where, expected)
    found: Any = module
    for i, name in enumerate(path.split(".")):
        try:
            there = hasattr(found, name)
        except Exception as error:  # a property or a module's __getattr__ of the user
            raise ConfigError(
                f"{where} is {text!r}: reading {name!r} of {module_name} ({_place(module)}) raised "
                f"{type(error).__name__}: {error}; expected: {expected}"
            ) from error
        if not there:
            owner = ".".join([module_name, *path.split(".")[:i]])
            public = [n for n in dir(found) if n[:2] != "__"]
            raise ConfigError(
                f"{where} is {text!r}: {owner} ({_place(module)}) has no attribute {name!r}{near(name, public)}; "
                f"expected: {expected}"
            )
        found = getattr(found, name)
    wrong = check(found) if check else ""
    if wrong:
        raise ConfigError(
            f"{where} is {text!r}: {path} of {module_name} ({_place(module)}) {wrong}; "
            f"expected: {expected}"
        )
    return found


def split(text: str, where: str, expected: str) -> tuple[str, str]:
    """(module, attribute) of an import string; ConfigError for a path and for any other form."""
    form = _FORM.fullmatch(text)
    if form and not _FILE.search(text):
        return form[1], form[2]
    if _FILE.search(text):
        raise ConfigError(
            f"{where} is {text!r}: an import string names a module and never a file; write module:attribute, "
            f"with module.py in the current folder or installed; expected: {expected}"
        )
    raise ConfigError(
        f"{where} is {text!r}: not of the form module:attribute, such as my_module:my_name; expected: {expected}"
    )


def call_problem(function: Any, *args: Any, **kwargs: Any) -> str:
    """Why `function(*args, **kwargs)` cannot be called, or "".

    The arguments are bound to its signature, not passed.

    >>> call_problem(len, 1), call_problem(3)
    ('', 'is of type int, which cannot be called')
    """
    if not callable(function):
        return f"is of type {type(function).__name__}, which cannot be called"
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # a few functions written in C do not say
        return ""
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        return f"has the signature {signature}, which does not fit ({error})"
    return deferred(function)


def deferred(function: Any) -> str:
    """What a call of `function` gives in place of its result, in words for after its name, or ""."""
    for code in (function, type(function).__call__):
        if inspect.iscoroutinefunction(code) or inspect.isasyncgenfunction(code):
            return "is an async function, which nothing here awaits; write it with def"
    return ""


def near(name: str, known: Iterable[str]) -> str:
    """The most alike of the known names as ", did you mean …?", or nothing."""
    found = difflib.get_close_matches(name, list(known), 3, 0.5)
    return f", did you mean {' or '.join(map(repr, found))}?" if found else ""


def use_current_folder() -> None:
    """Let modules of the current folder be imported, behind all that is installed.

    Done where a string is resolved.
    """
    folder = str(Path.cwd())
    if folder not in sys.path and "" not in sys.path:
        sys.path.append(folder)
        importlib.invalidate_caches()


def _import(name: str, text: str, where: str, expected: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        missing = error.name or name
        if name == missing or name.startswith(missing + "."):
            reason = (
                f"there is no module {missing!r}, neither installed nor in the folder {Path.cwd()}"
            )
        else:
            reason = (
                f"module {name!r} cannot be imported: it needs {missing!r}, which is not installed"
            )
    except (Exception, SystemExit) as error:  # a module of the user may do anything while it loads
        said = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        reason = f"module {name!r} cannot be imported ({said}{_line_in(error, name)})"
    raise ConfigError(f"{where} is {text!r}: {reason}; expected: {expected}")


def _line_in(error: BaseException, name: str) -> str:
    """Where in the module the error was raised, as ", file:line"."""
    spec = importlib.util.find_spec(name.partition(".")[0])
    folder = str(Path(spec.origin).parent) if spec and spec.origin else ""
    at, trace = "", error.__traceback__
    while trace is not None:
        file = trace.tb_frame.f_code.co_filename
        if folder and file.startswith(folder) and file != __file__:
            at = f", {file}:{trace.tb_lineno}"
        trace = trace.tb_next
    return at


def _place(module: Any) -> str:
    return getattr(module, "__file__", None) or "built into Python"
