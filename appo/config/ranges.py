"""Ranges of numbers: the checks that many keys share. Each error names key, value and limit."""

from __future__ import annotations

from appo.errors import ConfigError


def above_zero(section: object, names: str, prefix: str = "") -> None:
    """ConfigError unless every named field of a section is greater than 0.

    names: separated by spaces.
    """
    for name in names.split():
        value = getattr(section, name)
        if not value > 0:
            raise ConfigError(f"{prefix}{name} is {value}, but must be greater than 0")


def not_negative(section: object, names: str, prefix: str = "") -> None:
    """ConfigError for a named field of a section that is below 0. names: separated by spaces."""
    for name in names.split():
        value = getattr(section, name)
        if not value >= 0:
            raise ConfigError(f"{prefix}{name} is {value}, but must not be negative")
