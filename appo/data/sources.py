"""Where tasks come from: arithmetic, reasoning-gym, question files.

Each is a pure function of (split, index).

A question belongs to `train` or `eval` by a hash of its text, so the two never overlap, whatever
the seed or the order.
"""

from __future__ import annotations

import difflib
import hashlib
import operator
import random
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol

from appo.data.rl_records import question_text, scan_records
from appo.errors import DataError
from appo.types import Task

Split = Literal["train", "eval"]
EVAL_SHARE = 8  # one question in eight is kept for evaluation
ATTEMPTS = 256  # draws until one falls into the wanted split: fails once in 10^15


class TaskSource(Protocol):
    """Deterministic tasks of one kind. `describe` is what must be unchanged for a run to go on."""

    def count(self, split: Split) -> int | None:
        """Number of distinct tasks, None when endless."""

    def task(self, split: Split, index: int) -> Task:
        """Task number `index` of a split, the same one at every call."""

    def describe(self) -> dict[str, Any]:
        """What decides the tasks, as JSON types."""


def split_of(question: str) -> Split:
    """The split a question belongs to, by its text alone."""
    return "eval" if stable_hash("split", question) % EVAL_SHARE == 0 else "train"


def stable_hash(*parts: object) -> int:
    """63-bit integer from the text of the parts; equal on every machine, unlike hash()."""
    data = "\x1f".join(map(str, parts)).encode("utf-8", errors="surrogatepass")
    return int.from_bytes(hashlib.sha256(data).digest()[:8], "big") >> 1


class Arithmetic:
    """`What is 43*26-65?` with integer answers.

    operations  characters out of + - *
    digits      of each operand: a number, or [low, high]
    terms       operands: a number, or [low, high]
    """

    OPERATORS: ClassVar[dict[str, Callable[[int, int], int]]] = {
        "+": operator.add,
        "-": operator.sub,
        "*": operator.mul,
    }

    def __init__(
        self,
        *,
        seed: int,
        tools: tuple[str, ...],
        operations: str = "+-*",
        digits: Any = 2,
        terms: Any = 3,
    ):
        unknown = [c for c in operations if c not in self.OPERATORS]
        if unknown or not operations:
            raise DataError(
                f"data.params.operations={operations!r}: use one or more of the characters '+-*'"
            )
        self.seed, self.tools, self.operations = seed, tools, operations
        self.digits = _range("digits", digits, 1, 18)
        self.terms = _range("terms", terms, 2, 64)

    def count(self, split: Split) -> int | None:
        """None: expressions are drawn without end."""
        return None

    def describe(self) -> dict[str, Any]:
        """The parameters that decide the expressions, without the seed."""
        return {
            "operations": self.operations,
            "digits": list(self.digits),
            "terms": list(self.terms),
        }

    def task(self, split: Split, index: int) -> Task:
        """The first draw of this number whose question falls into the split."""
        for attempt in range(ATTEMPTS):
            rng = random.Random(stable_hash("arithmetic", self.seed, split, index, attempt))
            expression, value = self._draw(rng)
            question = f"What is {expression}?"
            if split_of(question) == split:
                messages = [{"role": "user", "content": question}]
                return Task(
                    f"arithmetic-{split}-{index}",
                    messages,
                    str(value),
                    self.tools,
                    "maths",
                    "arithmetic",
                )
        raise DataError(
            f"data.params={self.describe()}: no {split} question among {ATTEMPTS} draws; raise digits or terms"
        )

    def _draw(self, rng: random.Random) -> tuple[str, int]:
        numbers, signs = [self._number(rng)], []
        for _ in range(rng.randint(*self.terms) - 1):
            signs.append(rng.choice(self.operations))
            numbers.append(self._number(rng))
        text = str(numbers[0]) + "".join(f"{s}{n}" for s, n in zip(signs, numbers[1:], strict=True))
        # Products bind first: fold each run of them, then add up.
        sums = [numbers[0]]
        pending: list[str] = []
        for sign, number in zip(signs, numbers[1:], strict=True):
            if sign == "*":
                sums[-1] *= number
            else:
                pending.append(sign)
                sums.append(number)
        value = sums[0]
        for sign, number in zip(pending, sums[1:], strict=True):
            value = self.OPERATORS[sign](value, number)
        return text, value

    def _number(self, rng: random.Random) -> int:
        digits = rng.randint(*self.digits)
        return rng.randint(10 ** (digits - 1) if digits > 1 else 0, 10**digits - 1)


class ReasoningGym:
    """A data set of reasoning-gym, graded by its own scorer.

    `params` are the data set's own parameters.
    """

    BLOCK = 64  # tasks per seed of the data set; SIZE / BLOCK draws are left for each

    def __init__(
        self, *, seed: int, tools: tuple[str, ...], dataset: str | None = None, **params: Any
    ):
        try:
            from reasoning_gym.factory import DATASETS
        except ImportError as error:
            raise DataError(
                f"data.task='reasoning_gym:{dataset}' needs the package reasoning-gym: pip install 'appo[tasks]'"
            ) from error
        if dataset not in DATASETS:
            raise DataError(
                f"data.task='reasoning_gym:{dataset}': no such data set{nearest(str(dataset), DATASETS)}"
            )
        self.dataset, self.seed, self.tools, self.params = str(dataset), seed, tools, params
        try:
            self._entry(0, 0)
        except (TypeError, ValueError, AssertionError, AttributeError) as error:
            raise DataError(
                f"data.params={params!r} do not fit reasoning_gym:{dataset}: {error}"
            ) from error

    def count(self, split: Split) -> int | None:
        """None: entries are generated without end."""
        return None

    def describe(self) -> dict[str, Any]:
        """The dataset, its parameters and the version of the library that generates it."""
        from importlib.metadata import version

        return {
            "dataset": self.dataset,
            "params": self.params,
            "reasoning_gym": version("reasoning-gym"),
        }

    def _entry(self, index: int, attempt: int) -> tuple[dict[str, Any], dict[str, Any]]:
        from appo.reward.procedural import reasoning_gym_entry

        block, place = divmod(index, self.BLOCK)
        recipe = {
            "dataset": self.dataset,
            "params": self.params,
            "seed": stable_hash("reasoning_gym", self.seed, block) % 2**31,
            "index": place + self.BLOCK * attempt,
        }
        return reasoning_gym_entry(recipe)[1], recipe

    def task(self, split: Split, index: int) -> Task:
        """The first entry of this number that falls into the split; DataError when none does."""
        for attempt in range(ATTEMPTS):
            entry, recipe = self._entry(index, attempt)
            if split_of(entry["question"]) == split:
                return Task(
                    task_id=f"{self.dataset}-{split}-{index}",
                    messages=[{"role": "user", "content": entry["question"]}],
                    answer=entry["answer"],
                    tools=self.tools,
                    grader="reasoning_gym",
                    source=f"reasoning_gym:{self.dataset}",
                    meta={"reasoning_gym": recipe},
                )
        raise DataError(
            f"reasoning_gym:{self.dataset}: no {split} question in {ATTEMPTS} draws; it has too few"
        )


class Records:
    """Tasks from files (see appo.data.rl_records).

    Without an `eval` file, `train` is divided by question text.

    train, eval  paths   repair  mend known corruption   grader  use this one for all rows
    Training questions that also stand in the eval file are left out, and counted in a warning.
    """

    def __init__(
        self,
        *,
        seed: int,
        tools: tuple[str, ...],
        train: str | None = None,
        eval: str | None = None,
        repair: bool = False,
        grader: str | None = None,
    ):
        if train is None and eval is None:
            raise DataError(
                "data.train is not set: task 'records' reads a .parquet or .jsonl file (data.train=FILE)"
            )
        self.seed, self.repair, self.grader = seed, repair, grader
        self.files = {
            k: Path(p).expanduser() for k, p in (("train", train), ("eval", eval)) if p is not None
        }
        loaded = {k: self._read(p, tools) for k, p in self.files.items()}
        if len(loaded) == 2:
            held_out = {question_text(t) for t in loaded["eval"]}
            kept = [t for t in loaded["train"] if question_text(t) not in held_out]
            if len(kept) < len(loaded["train"]):
                lost = len(loaded["train"]) - len(kept)
                warnings.warn(
                    f"{train}: {lost} questions also stand in {eval}: left out of training",
                    stacklevel=2,
                )
            self.tasks: dict[Split, list[Task]] = {"train": kept, "eval": loaded["eval"]}
        elif "eval" in loaded:
            self.tasks = {"train": [], "eval": loaded["eval"]}
        else:
            parts: dict[Split, list[Task]] = {"train": [], "eval": []}
            for t in loaded["train"]:
                parts[split_of(question_text(t))].append(t)
            self.tasks = parts

    def _read(self, path: Path, tools: tuple[str, ...]) -> list[Task]:
        tasks, report = scan_records(path, repair=self.repair, tools=tools, grader=self.grader)
        for line in report.warnings():
            warnings.warn(line, stacklevel=2)
        return tasks

    def count(self, split: Split) -> int | None:
        """Number of records of the split."""
        return len(self.tasks[split])

    def describe(self) -> dict[str, Any]:
        """The files' SHA-256 and how their rows are read."""
        digests = {f"sha256 of {k} file": _file_digest(p) for k, p in self.files.items()}
        return {**digests, "repair": self.repair, "grader": self.grader}

    def task(self, split: Split, index: int) -> Task:
        """Record number `index` of the split, in file order."""
        return self.tasks[split][index]


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown name."""
    known = list(known)
    near = difflib.get_close_matches(name, known, 1, 0.5)
    return f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(sorted(known))}"


def _range(field: str, value: Any, low: int, high: int) -> tuple[int, int]:
    pair = value if isinstance(value, (list, tuple)) else (value, value)
    good = (
        len(pair) == 2
        and all(type(v) is int and low <= v <= high for v in pair)
        and pair[0] <= pair[1]
    )
    if not good:
        raise DataError(
            f"data.params.{field}={value!r}: must be an integer or [low, high] within {low} … {high}"
        )
    return int(pair[0]), int(pair[1])


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
