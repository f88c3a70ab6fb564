"""What a person watching a run sees.

A card, one line per step, a bar for what takes long, warnings.

On a terminal this is drawn with rich; in a pipe, under CI or with NO_COLOR it is plain lines
without escape sequences, never wrapped, so that they can be searched. Numbers are the same in both.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TextIO

from appo.observability.card import card_rich, card_text, escape
from appo.observability.engine import engine_parts
from appo.observability.learner import learner_parts
from appo.observability.metrics import PHASES, eval_questions, wilson

SHOW_AFTER_S = 2.0  # phases shorter than this are not worth a bar
PLAIN_EVERY_S = 10.0  # seconds between progress lines in a log

Part = tuple[str, str]  # (label, value) of a step line


class Console:
    """All output of a command.

    `steps`: number of steps of the run, shown as `step 3/5`; set it once it is known.

    plain: True: lines without ANSI; False: rich; None: plain unless stdout is a capable terminal.
    quiet: only warnings and errors. rank: of several processes; all but 0 are quiet, and sign what
    they say.
    """

    def __init__(
        self,
        plain: bool | None = None,
        quiet: bool = False,
        *,
        rank: int = 0,
        file: TextIO | None = None,
        err: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.file = file
        self.err = err or file
        self.plain = _is_plain(file or sys.stdout) if plain is None else plain
        self.quiet = quiet or rank > 0
        self.sign = f"rank {rank}: " if rank else ""
        self.steps: int | None = None
        self.clock = clock
        self.last_progress = float("-inf")
        self._lock = threading.RLock()
        self._live: Any = None  # the rich Progress that is on screen
        self._rich: Any = None if self.plain else _rich_console(file, stderr=False)

    # -- blocks --------------------------------------------------------------------------------

    def card(
        self, title: str, rows: Sequence[tuple[str, str]], warnings: Sequence[str] = ()
    ) -> None:
        """A titled list of facts, and below it what the user should know before going on."""
        if self.quiet:
            for w in warnings:
                self.warn(w)
        elif self.plain:
            self._line(card_text(title, rows, warnings))
        else:
            self._print(card_rich(title, rows, warnings))

    def note(self, text: str) -> None:
        """A line that is good to know."""
        if self.quiet:
            return
        if self.plain:
            self._line(escape(text, "\n"))
        else:
            from rich.text import Text

            self._print(Text(escape(text, "\n"), "dim"))

    def warn(self, text: str) -> None:
        """A line that the user should not miss; shown even when quiet, on stderr."""
        self._problem("warning", "red", escape(text, "\n"))

    def error(self, title: str, text: str = "") -> None:
        """One paragraph: what is wrong and how to mend it; on stderr."""
        body = " ".join(escape(text, "\n").split())
        self._problem("error", "bold red", f"{escape(title)}: {body}" if body else escape(title))

    def _problem(self, label: str, style: str, text: str) -> None:
        if self.plain:
            return self._line(f"{self.sign}{label}: {text}", to=self.err or sys.stderr)
        from rich.text import Text

        line = Text.assemble(
            (f"{self.sign}{label}: ", style), (text, "red" if label == "warning" else "")
        )
        with self._lock:
            # A bar and other output overwrite each other unless both pass through its console.
            console = self._rich if self._live else _rich_console(self.err, stderr=True)
            console.print(line)

    # -- steps ---------------------------------------------------------------------------------

    def step(self, record: Mapping[str, Any]) -> None:
        """One line for a record of metrics.jsonl (a step or an evaluation)."""
        if self.quiet:
            return
        head, parts = step_parts(record, self.steps)
        if self.plain:
            return self._line("  ".join([head, *(f"{k} {v}".strip() for k, v in parts)]))
        from rich.text import Text

        if 2 + len(head) + sum(len(k) + len(v) + 3 for k, v in parts) > self._rich.width:
            parts = [(k, v if k else v.partition(" (")[0]) for k, v in parts]  # seconds unspecified
        text = Text(head, "bold cyan" if record.get("kind") == "eval" else "bold")
        for label, value in parts:
            text.append("  ")
            text.append(f"{label} " if label else "", "dim")
            number, _, rest = value.partition(" (")
            text.append(number, "bold" if label in ("reward", "accuracy") else "")
            text.append(f" ({rest}" if rest else "", "dim")
        self._print(text)

    # -- phases --------------------------------------------------------------------------------

    @contextmanager
    def phase(self, name: str, total: int | None = None) -> Iterator[Phase]:
        """Something that may take long. Shows nothing at all if it ends within two seconds.

        >>> with console.phase("rollout", 24) as p:
        ...     p.update(3, tokens=412)
        """
        p = Phase(self, name, total)
        p.begin()
        try:
            yield p
        finally:
            p.end()

    # -- output --------------------------------------------------------------------------------

    def _print(self, renderable: Any) -> None:
        with self._lock:
            self._rich.print(renderable)

    def _line(self, text: str, to: TextIO | None = None) -> None:
        out = to or self.file or sys.stdout
        with self._lock:
            try:
                out.write(text + "\n")
            except UnicodeEncodeError:  # LANG=C: better a question mark than a crash
                encoding = out.encoding or "ascii"
                out.write(text.encode(encoding, "replace").decode(encoding) + "\n")
            out.flush()


class Phase:
    """Progress of one phase; `update` may be called from any thread and as often as one likes."""

    def __init__(self, console: Console, name: str, total: int | None):
        self.console = console
        self.name = name
        self.total = total
        self.done = 0
        self.info: dict[str, Any] = {}
        self.started = console.clock()
        self._timer: threading.Timer | None = None
        self._task: Any = None

    def update(self, done: int, **info: Any) -> None:
        """`done` of `total`; further facts are shown behind it (`tokens=412`)."""
        self.done, self.info = done, info
        if self.console.quiet:
            return
        if self.console.plain:
            self._plain_line()
        else:
            with self.console._lock:
                if self._task is not None and self.console._live is not None:
                    self.console._live.update(self._task, completed=done, info=self._facts())

    def begin(self) -> None:
        """Start the clock after which the bar appears; a quiet or plain console draws none."""
        if self.console.quiet or self.console.plain:
            return
        # A timer, not `update`, brings up the bar: a phase that hangs is the one to see.
        self._timer = threading.Timer(SHOW_AFTER_S, self._show)
        self._timer.daemon = True
        self._timer.start()

    def end(self) -> None:
        """Take the bar down, and the whole display with the last one."""
        with self.console._lock:
            timer, self._timer = self._timer, None
            if timer is not None:
                timer.cancel()
            if self._task is not None and self.console._live is not None:
                self.console._live.remove_task(self._task)
                self._task = None
                if not self.console._live.tasks:
                    self.console._live.stop()
                    self.console._live = None
        if timer is not None:
            timer.join()  # outside the lock: it may be waiting for it in `_show`

    def _show(self) -> None:
        with self.console._lock:
            if self._timer is None:  # ended while the timer was firing
                return
            if self.console._live is None:
                self.console._live = _progress(self.console._rich)
                self.console._live.start()
            self._task = self.console._live.add_task(
                self.name, total=self.total, completed=self.done, info=self._facts()
            )

    def _plain_line(self) -> None:
        with self.console._lock:
            now = self.console.clock()
            if now - self.started < SHOW_AFTER_S:
                return
            if now - self.console.last_progress < PLAIN_EVERY_S:
                return
            self.console.last_progress = now
        of = f"{self.done:,}/{self.total:,}" if self.total is not None else f"{self.done:,}"
        facts = f"  {self._facts()}" if self.info else ""
        self.console._line(f"  {self.name} {of}{facts}  {now - self.started:.0f} s")

    def _facts(self) -> str:
        return "  ".join(f"{k} {_number(v)}" for k, v in self.info.items())


# -- what a line says ----------------------------------------------------------------------------


def step_parts(record: Mapping[str, Any], steps: int | None = None) -> tuple[str, list[Part]]:
    """(head, [(label, value), …]) of the line of a record, without what the record lacks."""
    total = record.get("steps", steps)
    width = len(str(total)) if total else 0
    is_eval = record.get("kind") == "eval"
    number = f"{record.get('step', 0):>{width}}" + (f"/{total}" if total else "")
    parts = eval_parts(record) if is_eval else _train_parts(record)
    return f"{'eval' if is_eval else 'step'} {number}", [
        *parts,
        *engine_parts(record),
        *learner_parts(record),
        *_seconds(record),
    ]


def eval_parts(record: Mapping[str, Any]) -> list[Part]:
    """Accuracy with its count and 95 % interval, and tool use."""
    out: list[Part] = []
    accuracy = _get(record, "eval/accuracy")
    n = eval_questions(record)
    if accuracy is not None:
        value = f"{accuracy:.2f}"
        if n:
            low, high = wilson(accuracy * n, n)
            value += f" ({round(accuracy * n)} of {n}, 95 % {low:.2f}–{high:.2f})"
        out.append(("accuracy", value))
    use = _get(record, "eval/tool_use")
    return [*out, ("tools", f"{use:.2f}")] if use is not None else out


def _train_parts(record: Mapping[str, Any]) -> list[Part]:
    out: list[Part] = []

    def add(label: str, *keys: str) -> None:
        value = _get(record, *keys)
        if value is not None:
            out.append((label, f"{value:.2f}"))

    add("reward", "reward/mean")
    add("tools", "tool/use")
    add("accuracy", "eval/accuracy")
    add("entropy", "policy/entropy", "rollout/entropy")
    unique, total = _get(record, "tokens/unique"), _get(record, "tokens/total")
    if unique is not None and total is not None:
        factor = f" ({total / unique:.1f}x)" if unique else ""
        out.append(("tokens", f"{unique:,.0f}/{total:,.0f}{factor}"))
    add("uninformative", "branch/omega_uninformative")
    for label, key in (("ungraded", "group/ungraded_leaves"), ("non-finite", "learner/nonfinite")):
        value = _get(record, key)
        if value:
            out.append((label, _number(value)))
    if "reward/mean" in record and _get(record, "reward/mean") is None:
        out.insert(0, ("reward", "none"))
    return out


def _seconds(record: Mapping[str, Any]) -> list[Part]:
    phases = {p: s for p in PHASES if (s := _get(record, f"time/{p}"))}
    total = _get(record, "time/step", "time/eval")
    if total is None:
        total = sum(phases.values())
    if not total:
        return []
    digits = 0 if total >= 20 else 1
    shown = [f"{p} {t}" for p, s in phases.items() if float(t := f"{s:.{digits}f}") > 0]
    return [("", f"{total:.{digits}f} s" + (f" ({' '.join(shown)})" if shown else ""))]


def _get(record: Mapping[str, Any], *keys: str) -> float | None:
    """The first of the keys that holds a number."""
    return next((float(record[k]) for k in keys if record.get(k) is not None), None)


def _number(value: Any) -> str:
    if isinstance(value, float) and not value.is_integer():
        return f"{value:.2f}"
    return f"{value:,.0f}" if isinstance(value, int | float) else escape(str(value))


# -- terminal ------------------------------------------------------------------------------------


def _is_plain(stream: TextIO) -> bool:
    env = os.environ
    if env.get("NO_COLOR") or env.get("CI") or env.get("TERM", "") in ("dumb", "unknown"):
        return True
    isatty = getattr(stream, "isatty", None)
    return not (isatty is not None and isatty())


def _rich_console(file: TextIO | None, stderr: bool) -> Any:
    from rich.console import Console as RichConsole

    return RichConsole(file=file, stderr=stderr, highlight=False, soft_wrap=False)


def _progress(console: Any) -> Any:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    return Progress(
        TextColumn("  {task.description:<8}", style="dim"),
        BarColumn(bar_width=28),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[info]}", style="dim"),
        console=console,
        transient=True,
    )
