"""The python tool.

The model writes a program, the sandbox runs it, the model reads what it printed.

As in a notebook, a last expression is shown when nothing was printed. On an error the model reads
the last line of the traceback (`ZeroDivisionError: division by zero`): that is what it needs to
correct itself, in few tokens.
"""

from __future__ import annotations

import re
import textwrap
import time

from appo.config import ToolsConfig
from appo.errors import ToolError
from appo.tools.base import ToolResult, ToolSpec
from appo.tools.escape import escape_tags, shorten
from appo.tools.sandbox import SandboxLimits, SandboxResult, choose_level, run_python
from appo.tools.sandbox.remote import run_remote

_FENCE = re.compile(
    r"^\s*```[ \t]*(?:python3?|py)?[ \t]*\n(.*?)\n?[ \t]*```\s*$", re.DOTALL | re.IGNORECASE
)

WHY = {  # what the model reads when a limit ended its program
    "wall": "TimeoutError: stopped after {wall_s:g} s",
    "cpu": "TimeoutError: stopped after {cpu_s:g} s of CPU time",
    "memory": "MemoryError: used more than {memory_mb:g} MB",
    "processes": "RuntimeError: started more than {processes:g} processes",
    "disk": "OSError: wrote more than {file_mb:g} MB of files",
    "output": "RuntimeError: printed too much",
}


class PythonTool:
    """A `Tool` that runs Python code behind the best wall this machine has.

    level, allow_unsafe   see `appo.tools.sandbox.choose_level`, asked once, here; raises its
                          SandboxError
    max_chars             characters of output that the model gets to read; head and tail are kept

    >>> PythonTool()("print(6 * 7)").output
    '42'
    """

    name = "python"
    description = (
        "You may run Python code: write it between <python> and </python>, and what it prints comes back between "
        "<result> and </result>."
    )
    example = (
        {"role": "user", "content": "What is 17*24-9?"},
        {
            "role": "assistant",
            "content": (
                "Let me compute that.\n<python>print(17*24-9)</python>\n<result>399</result>\n<answer>399</answer>"
            ),
        },
    )

    def __init__(
        self,
        level: str = "auto",
        allow_unsafe: bool = False,
        limits: SandboxLimits | None = None,
        max_chars: int = 512,
    ) -> None:
        self.probe = choose_level(level, allow_unsafe)
        self.level = self.probe.level
        self.limits = limits or SandboxLimits()
        self.max_chars = max_chars

    def __call__(self, argument: str) -> ToolResult:
        """Run the program in `argument` (bare, or fenced as Markdown).

        Never raises for what the model wrote.
        """
        started = time.monotonic()
        code = clean(argument)
        if not code.strip():
            return ToolResult("there is no code to run", False, 0.0, "bad_request")
        try:
            if self.level == "remote":
                result = run_remote(code, self.limits)
            else:
                result = run_python(code, level=self.level, limits=self.limits, show_last=True)
        except ToolError as error:
            wall_s = time.monotonic() - started
            return ToolResult("the python tool is not available", False, wall_s, error.kind)
        return self._read(result)

    def _read(self, result: SandboxResult) -> ToolResult:
        """What the model reads of a result."""
        kind = None
        text = result.stdout.rstrip("\n")
        if result.exit != 0 or result.timed_out:
            kind = "timeout" if result.timed_out else "nonzero_exit"
            why = (
                WHY[result.reason].format(**vars(self.limits))
                if result.reason in WHY
                else last_error(result)
            )
            text = f"{text}\n{why}" if text else why
        text, cut = shorten(escape_tags(text), self.max_chars)
        return ToolResult(text, kind is None, result.wall_ms / 1000, kind, cut or result.truncated)

    def close(self) -> None:
        """Nothing is kept open between calls."""


def python_spec(cfg: ToolsConfig) -> ToolSpec:
    """The python tool as `tools.python.*` has it; the sandbox is chosen when the tool is made."""
    c = cfg.python

    def make() -> PythonTool:
        limits = SandboxLimits(wall_s=c.wall_s, cpu_s=c.cpu_s, memory_mb=c.memory_mb)
        return PythonTool(c.level, c.allow_unsafe, limits=limits, max_chars=c.max_chars)

    return ToolSpec(PythonTool.name, PythonTool.description, c.max_chars, make, PythonTool.example)


def clean(argument: str) -> str:
    r"""The program in what the model wrote: without Markdown fence and common indentation.

    >>> clean("```python\n  x = 1\n  x\n```")
    'x = 1\nx'
    """
    fenced = _FENCE.match(argument)
    return textwrap.dedent(fenced.group(1) if fenced else argument.strip("\n")).rstrip()


def last_error(result: SandboxResult) -> str:
    """The `Type: message` that ends a traceback, or what is known of an exit without one."""
    lines = result.stderr.rstrip("\n").split("\n")
    frames = [i for i, line in enumerate(lines) if line.startswith('  File "')]
    if frames:
        tail = lines[frames[-1] + 1 :]
        while tail and tail[0].startswith("    "):  # the source line and its carets
            tail.pop(0)
        if tail:
            return "\n".join(tail)
    if result.exit < 0:
        return f"the program was killed by signal {-result.exit}"
    return lines[-1] or f"the program ended with exit status {result.exit}"
