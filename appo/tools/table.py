"""The tools by name, and those of the user by import string: all else follows from this table."""

from __future__ import annotations

from collections.abc import Callable

from appo.config import ToolsConfig
from appo.errors import ConfigError
from appo.imports import is_import, near, resolve
from appo.tools.base import ToolSpec
from appo.tools.own import EXPECTED, own_spec, problem
from appo.tools.python import python_spec

WHERE = "tools.enabled"

TOOLS: dict[str, Callable[[ToolsConfig], ToolSpec]] = {"python": python_spec}


def tool_specs(cfg: ToolsConfig) -> dict[str, ToolSpec]:
    """Name → specification of every enabled tool, in the order of `tools.enabled`.

    Nothing is started.

    Raises ConfigError for an unknown name, an import string that cannot be used, and two tools of
    one name.
    """
    specs: dict[str, ToolSpec] = {}
    for text in cfg.enabled:
        if is_import(text):
            spec = own_spec(resolve(text, WHERE, EXPECTED, problem), text)
        elif text in TOOLS:
            spec = TOOLS[text](cfg)
        else:
            raise ConfigError(
                f"{WHERE}: there is no tool {text!r}{near(text, TOOLS)}; built in: {', '.join(TOOLS)}; a tool of your "
                "own is named module:attribute"
            )
        if spec.name in specs:
            raise ConfigError(
                f"{WHERE}: {text!r} is a second tool named {spec.name!r}; rename it or leave the other out"
            )
        specs[spec.name] = spec
    return specs
