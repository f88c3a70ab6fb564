"""Writes docs/configuration.md and docs/metrics.md from the code.

    python docs/generate.py           # write both
    python docs/generate.py --check   # exit code 1 and the names of pages that are not current

Keys, types and defaults are those of the dataclasses in `appo.config`; a meaning is the comment
beside the field, and its mark says what a resumed run may change. Metrics are the table of
`appo.observability.metric_names`.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import typing
from pathlib import Path
from typing import Any, NamedTuple

DOCS = Path(__file__).resolve().parent
sys.path.insert(0, str(DOCS.parent))

import yaml  # noqa: E402

from appo.config import Config  # noqa: E402
from appo.config.marks import Resume, resume_marks  # noqa: E402
from appo.config.meanings import meanings  # noqa: E402
from appo.observability.metric_names import GROUPS, METRICS, group  # noqa: E402

NOTE = "<!-- Made by docs/generate.py; do not edit. A test compares this page with the code. -->"
ON_RESUME = {
    Resume.SAME: "",
    Resume.FREE: "may change",
    Resume.ROUNDING: "may change, up to rounding",
    Resume.HIDDEN: "is another",
}
NOT_KEYS = {"recipe"}  # set by load_config


class Field(NamedTuple):
    """One key of a recipe.

    Its dotted name, type and default as a recipe spells them, and its meaning.
    """

    key: str
    type: str
    default: str
    meaning: str


# -- configuration ---------------------------------------------------------------------------------


def describe_fields(cls: type = Config, prefix: str = "") -> list[Field]:
    """All keys of a recipe in the order of the code, sections after the keys beside them."""
    hints, comments = typing.get_type_hints(cls), meanings(cls)
    here, below = [], []
    for field in dataclasses.fields(cls):
        key = prefix + field.name
        if dataclasses.is_dataclass(hints[field.name]):
            below += describe_fields(typing.cast("type", hints[field.name]), f"{key}.")
        elif key not in NOT_KEYS:
            meaning = comments.get(field.name, "")
            here.append(Field(key, type_name(hints[field.name]), default_of(field), meaning))
    return here + below


def sections(cls: type = Config, prefix: str = "") -> dict[str, str]:
    """Dotted prefix of each section → the first paragraph that its dataclass says of it.

    "" for none.
    """
    found = {prefix: own_words(cls)}
    for name, hint in typing.get_type_hints(cls).items():
        if dataclasses.is_dataclass(hint):
            found |= sections(typing.cast("type", hint), f"{prefix}{name}.")
    return found


def own_words(cls: type) -> str:
    """First paragraph of a class's docstring on one line.

    "" where dataclass has made the docstring.
    """
    text = cls.__doc__ or ""
    return "" if text.startswith(f"{cls.__name__}(") else " ".join(text.split("\n\n")[0].split())


def type_name(hint: Any) -> str:
    """`int`, `list of str`, `a | b | null`: what a recipe may hold."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        return type_name(args[0])
    if hint is type(None):
        return "null"
    if origin is typing.Literal:
        return " | ".join(str(a) for a in args)
    if origin is list:
        return f"list of {type_name(args[0])}"
    if origin is dict:
        return "mapping"
    if args:
        return " | ".join(type_name(a) for a in args)
    return "text" if hint is str else getattr(hint, "__name__", str(hint))


def default_of(field: dataclasses.Field[Any]) -> str:
    """The default as YAML on one line; "" where there is none."""
    value = field.default
    if value is dataclasses.MISSING:
        if field.default_factory is dataclasses.MISSING:
            return ""
        value = field.default_factory()
    if isinstance(value, float):
        return f"{value:g}"
    text = yaml.safe_dump(value, default_flow_style=True, width=1000).strip()
    return text.removesuffix("\n...").strip()


def configuration() -> str:
    """The page docs/configuration.md."""
    fields, words, marks = describe_fields(), sections(), resume_marks(Config)
    out = [
        "# Configuration",
        NOTE,
        "A recipe is a YAML file with any subset of these keys, and `key=value` on the command line\n"
        "wins. A default of `null` in `algo` means: what the preset of the algorithm says\n"
        "([algorithms](algorithms.md)).",
        "```bash\nappo train tiny algo=grpo learner.lr=1e-4 --dry-run\n```",
        "An unknown key or a wrong type is an error that names the place and the nearest spelling. The\n"
        "resolved configuration of a run is written to its `config.yaml`.",
        "A run that is resumed keeps every key that is not marked in the last column. A change that is\n"
        "equal up to rounding goes on, but not bit for bit.",
    ]
    for prefix, about in words.items():
        own = [f for f in fields if f.key.startswith(prefix) and "." not in f.key[len(prefix) :]]
        if not own:
            continue
        out.append(f"## {prefix.rstrip('.') or 'The run'}")
        if about and prefix:
            out.append(about)
        rows = [
            [
                f"`{f.key}`",
                cell(f.type),
                f"`{f.default}`" if f.default else "",
                cell(f.meaning),
                ON_RESUME[marks[f.key]],
            ]
            for f in own
        ]
        out.append(table(["key", "type", "default", "meaning", "on resume"], rows))
    return "\n\n".join(out) + "\n"


# -- metrics ---------------------------------------------------------------------------------------


def metrics() -> str:
    """The page docs/metrics.md."""
    out = [
        "# Metrics",
        NOTE,
        "`metrics.jsonl` has one line per step and one per evaluation; each line is a JSON object with\n"
        "these keys. Counts are sums over mini-batches and ranks. A share or a mean is a ratio of two\n"
        "such sums, and a time is that of the slowest rank. Names of older runs are read as those of\n"
        "today.",
        "```python\nimport appo\n\n"
        'for record in appo.read_metrics("RUN"):  # the run folder\n'
        '    print(record["step"], record.get("reward/mean"))\n```',
    ]
    for name, title in GROUPS.items():
        rows = [
            [f"`{key}`", cell(m.unit), cell(m.meaning)]
            for key, m in METRICS.items()
            if group(key) == name
        ]
        out.append(f"## {title}" + (f" (`{name}/`)" if name else ""))
        out.append(table(["key", "unit", "meaning"], rows))
    return "\n\n".join(out) + "\n"


# -- the pages -------------------------------------------------------------------------------------


def cell(text: str) -> str:
    """Text that may stand in a cell of a table."""
    return text.replace("|", "\\|").replace("<", "&lt;")


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


PAGES = {"configuration.md": configuration, "metrics.md": metrics}


def main() -> int:
    """Write the pages, or tell which are not current."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 if stale")
    check = parser.parse_args().check
    stale = [
        name
        for name, page in PAGES.items()
        if not (DOCS / name).is_file() or (DOCS / name).read_text() != page()
    ]
    for name in stale:
        if check:
            print(f"docs/{name} is not current: python docs/generate.py")
        else:
            (DOCS / name).write_text(PAGES[name]())
            print(f"docs/{name} written")
    return int(check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
