"""Digest of what a run computed: the bits of every number in trees, metrics and branch points.

Two runs of one command in deterministic mode have one digest, on one kind of processor. A change
that must not change what a run computes is checked by the digests of a run before and after it.

Left out are measured seconds (`is_timed`). A renamed field counts the same in both spellings
(`RENAMED`). Order counts: of records in a file, and of values in a list; not of keys in a record.

    python bench/evidence/run_digest.py RUN [--json FILE]
    python bench/evidence/run_digest.py RUN --compare RUN2
"""

from __future__ import annotations

import argparse
import hashlib
import json
import struct
import sys
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

PARTS = ("trees", "metrics", "branches")

# Old name of a field → name of today, at any depth of a record. Whoever renames a field adds a row.
# The hash is taken under the first old name, so that a new row leaves recorded digests as they are.
RENAMED = {
    "policy/kl_anchor": "policy/kl_old_logp",
    "policy/log_ratio_behaviour": "policy/log_ratio_behavior",
    "branch/omega_flat": "branch/omega_uninformative",
    "time/anchors": "time/old_logprobs",
    "anchor": "old_logp",  # of a node in trees.jsonl
    "flat": "omega_uninformative",  # of a prompt's roots and of a branch point in branches.jsonl
}
_HASHED_AS = {new: old for old, new in reversed(RENAMED.items())}

# All that differs between two runs of one command: metrics in seconds, seconds of a tool call.
# Peaks of KV blocks (memory/kv_*) are counted, not measured, and stay.
TIMED_GROUPS = ("time/",)
TIMED_KEYS = frozenset({"wall_s"})

MISSING = "(missing)"


class Digest(NamedTuple):
    """Of one file of a run."""

    sha256: str
    records: int
    numbers: int  # whole and fractional, booleans not counted


class Difference(NamedTuple):
    """The first place where two runs differ. record counts from 0."""

    part: str
    record: int
    key: str
    left: Any
    right: Any

    def __str__(self) -> str:
        return (
            f"{self.part}.jsonl, record {self.record}, {self.key}: {_shown(self.left)} "
            f"against {_shown(self.right)}"
        )


def is_timed(key: str) -> bool:
    """Whether a field of this name holds measured seconds."""
    return key.startswith(TIMED_GROUPS) or key in TIMED_KEYS


def normal(value: Any) -> Any:
    """The value with today's field names and without timed fields, at any depth.

    Raises ValueError when a record holds a field in both spellings: one of them would be lost.
    """
    if isinstance(value, list):
        return [normal(v) for v in value]
    if not isinstance(value, dict):
        return value
    out: dict[str, Any] = {}
    for key, inner in value.items():
        if is_timed(key):
            continue
        name = str(RENAMED.get(key, key))
        if name in out:
            raise ValueError(f"a record holds {name!r} twice, once under its old name")
        out[name] = normal(inner)
    return out


def encoded(value: Any) -> Iterator[bytes]:
    """Bytes that two normal values share only if they are equal bit by bit.

    A fraction is its float64 bits; 1 and 1.0, 0.0 and -0.0, and "1" and 1 all differ.
    """
    if isinstance(value, dict):
        yield b"{%d:" % len(value)
        for name, key in sorted((_HASHED_AS.get(k, k), k) for k in value):
            yield from encoded(name)
            yield from encoded(value[key])
    elif isinstance(value, list):
        yield b"[%d:" % len(value)
        for inner in value:
            yield from encoded(inner)
    elif isinstance(value, str):
        text = value.encode("utf-8", "surrogatepass")
        yield b"s%d:" % len(text) + text
    elif isinstance(value, float):
        yield b"d" + struct.pack(">d", value)
    elif value is None or isinstance(value, bool):
        yield b"n" if value is None else b"t" if value else b"f"
    else:
        yield b"i%d:" % value


def count_numbers(value: Any) -> int:
    """Numbers in a value, at any depth."""
    if isinstance(value, dict):
        return sum(map(count_numbers, value.values()))
    if isinstance(value, list):
        return sum(map(count_numbers, value))
    return int(isinstance(value, int | float) and not isinstance(value, bool))


def read_part(run: Path, part: str) -> Iterator[Any]:
    """Normal records of one file of a run, in its order.

    Raises SystemExit, with what to do, when the file does not exist or a line is not JSON.
    """
    path = run / f"{part}.jsonl"
    if not path.is_file():
        raise SystemExit(f"{path}: no such file; name a run folder, of a run with save_trees=all")
    with open(path) as file:
        for number, line in enumerate(file, 1):
            try:
                yield normal(json.loads(line))
            except ValueError as error:
                raise SystemExit(f"{path}:{number}: {error}; name a run that has ended") from error


def digest_part(run: Path, part: str) -> Digest:
    """Digest of one file of a run."""
    total, records, numbers = hashlib.sha256(), 0, 0
    for record in read_part(run, part):
        total.update(b"".join(encoded(record)))
        records += 1
        numbers += count_numbers(record)
    return Digest(total.hexdigest(), records, numbers)


def digest_run(run: Path) -> dict[str, Any]:
    """{"overall": sha256, "trees": {sha256, records, numbers}, …}, a key for each of PARTS."""
    parts = {part: digest_part(run, part) for part in PARTS}
    joined = "".join(f"{part} {found.sha256}\n" for part, found in parts.items())
    overall = hashlib.sha256(joined.encode()).hexdigest()
    return {"overall": overall} | {part: found._asdict() for part, found in parts.items()}


def first_difference(left: Path, right: Path) -> Difference | None:
    """Where two runs differ first, in the order of PARTS. None if they are equal bit by bit."""
    for part in PARTS:
        pairs = zip_longest(read_part(left, part), read_part(right, part), fillvalue=MISSING)
        for number, (a, b) in enumerate(pairs):
            found = _first_in(a, b, "")
            if found is not None:
                return Difference(part, number, *found)
    return None


def _first_in(a: Any, b: Any, key: str) -> tuple[str, Any, Any] | None:
    """(key, value of a, value of b) of the first place below `key` where the bits differ."""
    if b"".join(encoded(a)) == b"".join(encoded(b)):
        return None
    if isinstance(a, dict) and isinstance(b, dict):
        pairs = [
            (f"{key}.{k}".lstrip("."), a.get(k, MISSING), b.get(k, MISSING)) for k in {**a, **b}
        ]
    elif isinstance(a, list) and isinstance(b, list):
        both = enumerate(zip_longest(a, b, fillvalue=MISSING))
        pairs = [(f"{key}[{i}]", x, y) for i, (x, y) in both]
    else:
        return key or "(whole record)", a, b
    inner = (_first_in(x, y, name) for name, x, y in pairs)
    return next(found for found in inner if found is not None)


def _shown(value: Any) -> str:
    """A value for a person: of a fraction its bits as well, of anything long its beginning."""
    if isinstance(value, float):
        return f"{value!r} (bits {struct.pack('>d', value).hex()})"
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}… ({len(text)} characters)"


def main(argv: list[str] | None = None) -> int:
    """Print the digest of a run and where two differ. Exit status: 1 if they differ."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("run", type=Path, help="run folder")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the digest there, too")
    parser.add_argument("--compare", type=Path, metavar="RUN2", help="name the first difference")
    args = parser.parse_args(argv)
    found = digest_run(args.run)
    for part in PARTS:
        row = found[part]
        print(f"{part:9}{row['sha256']}  {row['records']:,} records, {row['numbers']:,} numbers")
    print(f"{'overall':9}{found['overall']}")
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")
    if args.compare is None:
        return 0
    difference = first_difference(args.run, args.compare)
    if difference is None:
        print("the runs are equal bit by bit")
        return 0
    print(f"first difference: {difference}")
    return 1


if __name__ == "__main__":
    sys.exit(main())
