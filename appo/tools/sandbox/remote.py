"""The remote level: code is sent to a SandboxFusion-compatible server, which does the isolating.

Wire format (POST `<url>/run_code`): {"code", "language": "python", "run_timeout", "stdin"} →
{"status": "Success" | "Failed" | "SandboxError", "message", "run_result": {"status", "return_code",
"stdout", "stderr"}}. The address comes from the environment (APPO_SANDBOX_URL), like everything
that names a machine.
"""

from __future__ import annotations

import http.client
import json
import os
import time
import urllib.error
import urllib.request
from typing import Any

from appo.errors import ToolError
from appo.tools.sandbox.limits import SandboxLimits, SandboxResult

URL = "APPO_SANDBOX_URL"
EXTRA_S = 10.0  # for the network and the server's queue
LARGEST_REPLY = 1 << 24  # bytes


def probe() -> tuple[bool, str]:
    """(works, reason): whether the server computes 6*7."""
    url = os.environ.get(URL)
    if not url:
        return False, f"set {URL} to the address of a SandboxFusion-compatible server"
    try:
        result = run_remote("print(6*7)", SandboxLimits())
    except ToolError as error:
        return False, str(error)
    works = result.stdout.strip() == "42"
    return (
        works,
        f"{url} {'answers; it does the isolating' if works else f'answers {result.stdout[:80]!r}'}",
    )


def run_remote(code: str, limits: SandboxLimits, stdin: str = "") -> SandboxResult:
    """Run `code` on the server.

    Raises ToolError("unavailable") when there is no (sensible) answer.
    """
    url = os.environ.get(URL, "")
    body = {"code": code, "language": "python", "run_timeout": limits.wall_s, "stdin": stdin}
    started = time.monotonic()
    try:
        request = urllib.request.Request(
            url.rstrip("/") + "/run_code",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=limits.wall_s + EXTRA_S) as reply:
            answer = json.loads(reply.read(LARGEST_REPLY))
        return _result(answer, limits, (time.monotonic() - started) * 1000)
    except (urllib.error.URLError, http.client.HTTPException, TimeoutError, OSError) as error:
        raise ToolError(f"sandbox level remote: {URL}={url}: {error}", "unavailable") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ToolError(
            f"sandbox level remote: {url}: unexpected answer: {error!r}", "unavailable"
        ) from error


def _result(answer: dict[str, Any], limits: SandboxLimits, wall_ms: float) -> SandboxResult:
    if answer["status"] == "SandboxError" or answer.get("run_result") is None:
        raise ToolError(
            f"sandbox level remote: {answer.get('message') or 'server error'}", "unavailable"
        )
    run = answer["run_result"]
    keep = int(limits.output_bytes)
    out, err = (str(run.get(k) or "") for k in ("stdout", "stderr"))
    timed_out = run["status"] == "TimeLimitExceeded"
    code = run.get("return_code")
    return SandboxResult(
        out[:keep],
        err[:keep],
        -9 if code is None else int(code),
        timed_out,
        len(out) > keep or len(err) > keep,
        wall_ms,
        "wall" if timed_out else "exited",
    )
