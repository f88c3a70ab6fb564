"""Building and installing copies of the checkout, apart from the environment that the tests run in."""

from __future__ import annotations

import os
import shutil
import site
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SKIPPED = (".git", ".venv", "venv", "build", "dist", "_native", "*.egg-info", "__pycache__", ".*_cache", ".ci",
           ".hypothesis", "runs")  # fmt: skip


def copy_tree(target: Path) -> Path:
    """The checkout without its environment, history and builds.

    Packaging must not depend on those.
    """
    shutil.copytree(ROOT, target, ignore=shutil.ignore_patterns(*SKIPPED), symlinks=True)
    return target


def clean(**more: str) -> dict[str, str]:
    """This environment without paths that lead to the checkout, and with `more`."""
    return {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | more


def run(command: list[str], timeout: int = 280, **options: object) -> str:
    """stdout and stderr of a command that must succeed."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, **options)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


def build(source: Path, out: Path, kind: str, timeout: int = 280, **env: str) -> tuple[Path, str]:
    """(archive, what the build said) of `kind`: "sdist" or "wheel"."""
    command = [sys.executable, "-m", "build", "--no-isolation", "--skip-dependency-check"]
    command += [f"--{kind}", "--outdir", str(out), str(source)]
    said = run(command, timeout, env=clean(**env))
    (made,) = out.glob("appo-*.tar.gz" if kind == "sdist" else "appo-*.whl")
    return made, said


def unpack(sdist: Path, target: Path) -> Path:
    """The folder that an sdist holds, unpacked below `target`."""
    shutil.unpack_archive(sdist, target)
    (folder,) = target.iterdir()
    return folder


def names(archive: Path) -> list[str]:
    """Files of a wheel or of an sdist (without its first folder), sorted.

    What is in it twice is named twice.
    """
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            return sorted(name for name in wheel.namelist() if not name.endswith("/"))
    with tarfile.open(archive) as sdist:
        return sorted(m.name.partition("/")[2] for m in sdist.getmembers() if not m.isdir())


def below(root: Path, folder: str) -> set[str]:
    """Files below a folder of a checkout, by path from its root. Links and caches are left out."""
    return {
        p.relative_to(root).as_posix()
        for p in (root / folder).rglob("*")
        if p.is_file() and "__pycache__" not in p.parts and not p.is_symlink()
    }


def environment(folder: Path) -> Path:
    """The Python of a new environment that sees what is installed here, but not the appo that is."""
    run([sys.executable, "-m", "venv", "--without-pip", str(folder)])
    (packages,) = folder.glob("lib/python*/site-packages")
    # A path entry: the .pth files of these folders, an editable install among them, are not read.
    (packages / "here.pth").write_text("\n".join(site.getsitepackages()) + "\n")
    return folder / "bin" / "python"
