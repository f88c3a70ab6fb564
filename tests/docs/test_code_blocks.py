"""What the pages tell a reader to type works: Python blocks run, commands are parsed against the program and its recipes.

Python blocks of a page run one after the other in one process, in a folder that holds `RUN`, a finished run, and `model`,
the tiny model. Commands with --dry-run are run. Of other commands the files, subcommands, options and keys are looked up.
"""

import os
import re
import shutil
import subprocess
import sys
import tomllib

import pytest
import typer
from support.pages import NAMES, PAGES, ROOT, blocks, commands, inline_code

from appo.cli import app
from appo.config import load_config, recipe_names
from appo.errors import ConfigError

RUN = ROOT / "tests" / "golden" / "written_by_9f05734" / "run"
TAGS = {"python", "bash", "text", "console", "files", "yaml", ""}
WITH_PYTHON = [p for p in PAGES if blocks(p, "python")]
# A block that would train for a minute does less: page → (what stands there, what is run).
SMALLER = {
    "README.md": ('"steps=10"', '"steps=1", "prompts_per_step=4", "eval.questions=8", "threads=1"')
}
# In running text: a command, not a message that begins with one.
INLINE = re.compile(rf"^appo (doctor|sft|[a-z]+ (RECIPE|RUN|{'|'.join(recipe_names())}))\b")
CLI = typer.main.get_command(app)
# Placeholders for values of a reader's own.
PLACE_HOLDER = re.compile(r"\b(FILE|HOST|SHARED|my_module)\b|…|\.parquet\b")


def name(page):
    return str(page.relative_to(ROOT))


DRY_RUNS = [
    (page, line)
    for page in PAGES
    for block in blocks(page, "bash")
    for line in block.text.splitlines()
    if "--dry-run" in line
]


@pytest.mark.timeout(300)
@pytest.mark.parametrize("page", WITH_PYTHON, ids=map(name, WITH_PYTHON))
def test_python_blocks_run(page, tmp_path):
    shutil.copytree(RUN, tmp_path / "RUN")
    (tmp_path / "model").symlink_to(ROOT / "appo" / "models" / "tiny_qwen3")
    write_files(page, tmp_path)
    code = "\n".join(
        "\n" * 2 + f"# {name(page)}:{block.line}\n" + block.text for block in blocks(page, "python")
    )
    if change := SMALLER.get(name(page)):
        assert change[0] in code
        code = code.replace(*change)
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=280,
        env=environment(),
    )  # fmt: skip
    assert done.returncode == 0, f"{code}\n{done.stdout[-2000:]}{done.stderr[-3000:]}"
    for expected in re.findall(r"^# (\[.*\])$", code, re.M):
        assert expected in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("page", "line"), DRY_RUNS, ids=[f"{name(page)}: {line}" for page, line in DRY_RUNS]
)
def test_dry_runs_end_well(page, line, tmp_path):
    write_files(page, tmp_path)
    (words,) = commands(line)
    done = subprocess.run(
        [sys.executable, "-m", *words, "--plain"], cwd=tmp_path, capture_output=True, text=True,
        timeout=200, env=environment(),
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


def write_files(page, folder):
    """A block that begins with `# name.py` is that file."""
    for block in blocks(page, "python"):
        if found := re.match(r"# (\w+\.py)\n", block.text):
            (folder / found[1]).write_text(block.text)


def environment():
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return os.environ | {"PYTHONPATH": path}


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_a_block_says_what_it_is(page):
    assert [(b.line, b.tag) for b in blocks(page) if b.tag not in TAGS] == []


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_commands_are_commands(page, tmp_path):
    shutil.copytree(RUN, tmp_path / "RUN")
    found = [words for block in blocks(page, "bash") for words in commands(block.text)]
    found += [code.split() for code in inline_code(page) if INLINE.match(code)]
    for words in found:
        check_command(words, tmp_path)


def check_command(words, folder):
    """Raises AssertionError or ConfigError for what cannot be typed."""
    program, *rest = words
    if program in ("torchrun", "deepspeed"):
        at = max(rest.index(flag) for flag in ("-m", "--module") if flag in rest) + 1
        return check_command(rest[at:], folder)
    if program == "python" and rest[0] == "-m":
        return check_command(rest[1:], folder)
    if program == "appo":
        return check_appo(rest, folder)
    if program == "python":
        assert (ROOT / rest[0]).is_file(), words
        return None
    if program in ("pip", "python3"):
        return check_extras(rest)
    assert program in ("pytest", "make", "mkdocs", "cd", "git", "pre-commit"), words
    if program == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M)
        assert set(rest) <= set(targets), words
    return None


def check_appo(words, folder):
    """Subcommand, options, recipe and keys of `appo WORDS`."""
    at, command = 0, CLI
    while subcommands := getattr(command, "commands", None):
        assert words[at] in subcommands, words
        at, command = at + 1, subcommands[words[at]]
    values = [w for w in words[at:] if not w.startswith("[") and not w.endswith("]")]
    unknown = [w for w in values if w.startswith("-") and w not in options(command)]
    assert unknown == [], words
    params = command.make_context("appo", values, resilient_parsing=True).params
    recipe = params.get("recipe")
    if recipe and recipe not in ("RECIPE", "…"):
        overrides = [o for o in params.get("overrides") or [] if not PLACE_HOLDER.search(o)]
        overrides = [o.replace("=RUN", f"={folder}/RUN") for o in overrides]
        load_config(re.sub(r"^RUN", f"{folder}/RUN", recipe), overrides)


def options(command):
    return {opt for p in command.params for opt in (*p.opts, *p.secondary_opts)} | {"--help"}


def check_extras(words):
    """`pip install -e '.[dev]'`: the extras are in pyproject.toml."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    for wanted in re.findall(r"\[([\w,-]+)\]", " ".join(words)):
        assert set(wanted.split(",")) <= set(extras), words


@pytest.mark.parametrize(
    "text",
    ["appo trian tiny", "appo train tinny", "appo train tiny learner.lrr=1", "appo train tiny --dry",
     "torchrun -m appo train tiny stepz=3", "python bench/gone.py", "pip install '.[gone]'", "rm x"],
)  # fmt: skip
def test_a_command_that_cannot_be_typed_is_found(text, tmp_path):
    (words,) = commands(text)
    with pytest.raises((AssertionError, ConfigError)):
        check_command(words, tmp_path)


def test_commands_of_a_block_are_taken_apart():
    text = "A=1 pip install x && appo train y  # why\nappo eval \\\n  z\n"
    assert commands(text) == [
        ["pip", "install", "x"],
        ["appo", "train", "y"],
        ["appo", "eval", "z"],
    ]
