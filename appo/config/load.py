"""Recipe (YAML) ← dotted overrides → `Config`, and back to YAML."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from appo.config.convert import build, number
from appo.config.schema import Config, validate
from appo.errors import ConfigError

RECIPES = Path(__file__).parents[1] / "recipes"


def recipe_names() -> list[str]:
    """Names that `load_config` knows without a path."""
    return sorted(p.stem for p in RECIPES.glob("*.yaml"))


def load_config(recipe: str, overrides: Sequence[str] = ()) -> Config:
    """Read a recipe (name or path of a YAML file) and apply `key.sub=value` overrides.

    >>> cfg = load_config("quickstart", ["steps=3", "algo=grpo"])

    Raises ConfigError for an unknown recipe or key, a wrong type, or values that contradict each
    other.
    """
    path = _recipe_path(recipe)
    run = _resumed_run(overrides)
    values, places = _read_yaml(run or path)
    # A switch of algorithm or task resets what belonged to the old one, so it goes first: nothing
    # that the user wrote is lost.
    for text in sorted(overrides, key=lambda t: t.partition("=")[0] not in ("algo", "data.task")):
        _apply_override(values, places, text)
    cfg = build(Config, values, places, without=("recipe",))
    cfg.recipe = path.stem
    validate(cfg)
    return cfg


def _resumed_run(overrides: Sequence[str]) -> Path | None:
    """The configuration of the run that `resume=` names.

    It stands in for the recipe, overrides included.
    """
    for text in overrides:
        key, _, value = text.partition("=")
        if key == "resume" and (Path(value) / "config.yaml").is_file():
            return Path(value) / "config.yaml"
    return None


def dump(cfg: Config) -> str:
    """The configuration as YAML that `load_config` reads back to an equal one."""
    values = dataclasses.asdict(cfg)
    values.pop("recipe")
    return yaml.safe_dump(values, sort_keys=False)


def _recipe_path(recipe: str) -> Path:
    if recipe.endswith((".yaml", ".yml")) or "/" in recipe:
        path = Path(recipe)
        if not path.is_file():
            raise ConfigError(
                f"recipe file {recipe!r} does not exist; built-in recipes: {', '.join(recipe_names())}"
            )
        return path
    path = RECIPES / f"{recipe}.yaml"
    if not path.is_file():
        near = difflib.get_close_matches(recipe, recipe_names(), 1, 0.4)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigError(
            f"unknown recipe {recipe!r}{hint} Built-in recipes: {', '.join(recipe_names())}; or give the path of a "
            "YAML file"
        )
    return path


def _read_yaml(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """Values as nested dicts, and for each dotted key where it stands (file:line)."""
    try:
        root = yaml.compose(path.read_text(), Loader=yaml.SafeLoader)
        values = yaml.safe_load(path.read_text()) or {}
    except yaml.YAMLError as e:
        raise ConfigError(f"{path}: not valid YAML: {e}") from e
    if not isinstance(values, dict):
        raise ConfigError(
            f"{path}: a recipe is a mapping of keys to values, this is a {type(values).__name__}"
        )
    places: dict[str, str] = {}

    def mark(node: yaml.Node | None, prefix: str) -> None:
        if isinstance(node, yaml.MappingNode):
            for k, v in node.value:
                places[prefix + str(k.value)] = f"{path}:{k.start_mark.line + 1}"
                mark(v, f"{prefix}{k.value}.")

    mark(root, "")
    return values, places


def _apply_override(values: dict[str, Any], places: dict[str, str], text: str) -> None:
    key, eq, raw = text.partition("=")
    if not eq or not key:
        raise ConfigError(
            f"override {text!r} is not of the form key=value (for example learner.lr=1e-5)"
        )
    try:
        value = yaml.safe_load(raw)
    except yaml.YAMLError as e:
        raise ConfigError(f"override {text!r}: the value is not valid YAML: {e}") from e
    if isinstance(value, str):
        value = number(value)
    places[key] = "command line"
    if key == "algo" and isinstance(value, str):
        _switch_algorithm(values, value)
        return
    data = values.get("data")
    if key == "data.task" and isinstance(data, dict) and data.get("task") != value:
        data.pop("params", None)  # they belong to the recipe's task
    at = values
    *parents, last = key.split(".")
    for p in parents:
        at = at.setdefault(p, {})
        if not isinstance(at, dict):
            raise ConfigError(f"{key} (command line): {p!r} holds a value, not a group of keys")
    at[last] = value


def _switch_algorithm(values: dict[str, Any], name: str) -> None:
    """`algo=NAME` keeps the recipe's rollouts per prompt.

    Its other algorithm keys belong to the old algorithm.
    """
    old = values.get("algo") or {}
    if old.get("name") == name:
        return
    rollouts = old.get("rollouts")
    if rollouts is None and old.get("roots"):
        rollouts = old["roots"] * (old.get("branches", 0) + 1)
    values["algo"] = {"name": name} | ({"rollouts": rollouts} if rollouts else {})
