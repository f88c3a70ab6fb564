"""Import strings in a recipe: listed, checked before anything is loaded, refused with a reason."""

import json
import re
import subprocess
import sys

import pytest

from appo.config import load_config
from appo.errors import ConfigError
from appo.imports import call_problem, is_import, resolve
from appo.observability.progress import Console
from appo.run.plan import plan
from appo.run.startup_card import card_rows

MINE = '''
from appo.types import Task

def lookup(term: str) -> str:
    """Look up a term."""
    return term

def silent(term: str) -> str:
    return term

def task(*, split, seed, tools, count=8, grader="maths"):
    message = lambda i: [{"role": "user", "content": f"{split} {i}?"}]
    return [Task(f"{split}-{i}", message(i), str(i), tools, grader=grader) for i in range(count)]

def near(answer, gold, meta):
    return 1.0

def one_argument(answer):
    return 1.0

NUMBER = 7
'''


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The current folder, with the user's modules in it."""
    (tmp_path / "mine.py").write_text(MINE)
    (tmp_path / "broken.py").write_text("import json\n\nraise RuntimeError('no key')\n")
    (tmp_path / "needs.py").write_text("import no_such_package\n")
    (tmp_path / "leaves.py").write_text("raise SystemExit('bye')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    for name in ("mine", "broken", "needs", "leaves"):
        sys.modules.pop(name, None)


def planned(*overrides, console=None):
    return plan(load_config("tiny", overrides), console or Console(quiet=True), need_output=False)


def test_every_import_string_is_on_the_card(folder, capsys):
    p = planned(
        "tools.enabled=[python,mine:lookup]", "data.task=mine:task", "reward.grader=mine:near",
        console=Console(plain=True),
    )  # fmt: skip
    rows = dict(card_rows(p))
    said = "mine:task (data.task), mine:near (reward.grader), mine:lookup (tools.enabled)"
    assert rows["imports"] == said and rows["tools"].startswith("python, lookup;")
    assert f"imports: {said}" in capsys.readouterr().out  # before any of it was imported
    assert "imports" not in dict(card_rows(planned()))


def test_the_line_comes_before_the_import(folder, capsys):
    with pytest.raises(ConfigError):
        planned("data.task=broken:task", console=Console(plain=True))
    assert "imports: broken:task (data.task)" in capsys.readouterr().out


def test_a_grader_that_only_a_task_names_is_checked_and_listed(folder):
    p = planned("data.task=mine:task", "data.params.grader=mine:near")
    assert p.imports[1] == ("mine:near", "data.params.grader")
    with pytest.raises(ConfigError, match="reward.grader 'maht' is unknown; use one of maths"):
        planned("reward.grader=maht")
    (folder / "other.py").write_text(MINE.replace('grader="maths"', 'grader="mine:nera"'))
    said = r"the grader of task 'train-\d' is 'mine:nera': mine .* no attribute 'nera', did you mean 'near'"
    with pytest.raises(ConfigError, match=said):
        planned("data.task=other:task")
    (folder / "other.py").write_text("")


def test_a_data_row_imports_nothing_into_the_trainer(folder):
    row = {"data_source": "x", "prompt": [{"role": "user", "content": "1?"}], "ability": "maths", "extra_info": {},
           "reward_model": {"ground_truth": "1", "style": "rule"}, "grader": "broken:f"}  # fmt: skip
    for name in ("train", "eval"):
        row["prompt"][0]["content"] = name
        (folder / f"{name}.jsonl").write_text(json.dumps(row))
    files = ["data.task=records", "data.train=train.jsonl", "data.eval=eval.jsonl"]
    assert planned(*files).imports == () and str(folder) not in sys.path
    with pytest.raises(ConfigError, match="reward.grader is 'broken:f': module 'broken' cannot"):
        planned(*files, "reward.grader=broken:f")


TOOL = re.escape("expected: a function such as `def lookup(term: str) -> str` with a docstring")
TASK = r"expected: a function my_task\(\*, split: str, seed: int, tools: tuple\[str, ...\], \*\*params\)"
GRADER = r"expected: a function my_grader\(answer: str, gold, meta: dict | None\) -> float"
FAMILY = r"expected: an appo.models.shape.ModelFamily\("
NO_FILE = "an import string names a module and never a file; write module:attribute"


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("tools.enabled=[nowhere:f]", rf"tools.enabled is 'nowhere:f': there is no module 'nowhere', neither installed nor in the folder .*{TOOL}"),
        ("tools.enabled=[mine:lokup]", rf"mine \(.*mine.py\) has no attribute 'lokup', did you mean 'lookup'\?; {TOOL}"),
        ("tools.enabled=[mine:silent]", rf"silent of mine .* has no docstring .*; {TOOL}"),
        ("tools.enabled=[mine:NUMBER]", rf"NUMBER of mine .* is of type int, which cannot be called; {TOOL}"),
        ("tools.enabled=[broken:f]", rf"module 'broken' cannot be imported \(RuntimeError: no key, .*broken.py:3\); {TOOL}"),
        ("tools.enabled=[needs:f]", rf"module 'needs' cannot be imported: it needs 'no_such_package', which is not installed; {TOOL}"),
        ("tools.enabled=[leaves:f]", rf"module 'leaves' cannot be imported \(SystemExit: bye.*\); {TOOL}"),
        ("data.task=nowhere:f", rf"data.task is 'nowhere:f': there is no module 'nowhere'.*{TASK}"),
        ("data.task=mine:lookup", rf"lookup of mine .* has the signature \(term: str\) -> str, which does not fit .*{TASK}"),
        ("data.task=mine:tsak", rf"no attribute 'tsak', did you mean 'task' or 'Task'\?; {TASK}"),
        ("reward.grader=mine:one_argument", rf"reward.grader is 'mine:one_argument'.*the signature \(answer\), which does not fit .*{GRADER}"),
        ("reward.grader=nowhere:f", rf"reward.grader is 'nowhere:f': there is no module 'nowhere'.*{GRADER}"),
        ("model.family=mine:NUMBER", rf"model.family is 'mine:NUMBER': NUMBER of mine .* is of type int; {FAMILY}"),
        ("model.family=mine:FAMILY", rf"has no attribute 'FAMILY'.*{FAMILY}"),
        ("tools.enabled=[/x.py:f]", f"tools.enabled is '/x.py:f': {NO_FILE}"),
        ("tools.enabled=[./mine.py:lookup]", NO_FILE),
        ("tools.enabled=['..mine:lookup']", NO_FILE),
        ("tools.enabled=[mine.py:lookup]", NO_FILE),
        ("data.task=./mine.py:task", f"data.task is './mine.py:task': {NO_FILE}"),
        ("reward.grader=mine.pkl:near", f"reward.grader is 'mine.pkl:near': {NO_FILE}"),
        ("model.family=~/mine:FAMILY", NO_FILE),
        ("tools.enabled=[':f']", "tools.enabled is ':f': not of the form module:attribute"),
        ("data.task='mine:a:b'", "data.task is 'mine:a:b': not of the form module:attribute"),
    ],
)  # fmt: skip
def test_what_the_run_would_refuse_the_plan_refuses(override, said, folder):
    with pytest.raises(ConfigError, match=said) as error:
        planned(override)
    assert "\n" not in str(error.value)


def test_parameters_that_a_task_does_not_take(folder):
    planned("data.task=mine:task", "data.params.count=4")
    with pytest.raises(ConfigError, match="does not fit .*unexpected keyword argument 'cuont'"):
        planned("data.task=mine:task", "data.params.cuont=4")


def test_an_own_family_needs_the_own_engine(folder):
    (folder / "mine_family.py").write_text(
        "from appo.models.shape import ModelFamily\nF = ModelFamily('mine', 'MineForCausalLM')\n"
    )
    with pytest.raises(
        ConfigError, match=r"model.family is mine_family:F and rollout.engine is vllm"
    ):
        planned("model.family=mine_family:F", "rollout.engine=vllm")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("tools.enabled=[mine:lokup]", ["mine", "'lokup'", "did you mean 'lookup'", "lookup(term: str) -> str"]),
        ("tools.enabled=[./mine.py:lookup]", ["names a module and never a file"]),
        ("data.task=mine:lookup", ["(term: str) -> str", "my_task(*, split: str"]),
        ("model.family=nowhere:F", ["there is no module 'nowhere'", "ModelFamily("]),
    ],
)  # fmt: skip
def test_a_dry_run_refuses_it_in_one_paragraph(override, words, folder):
    done = subprocess.run(
        [sys.executable, "-P", "-m", "appo", "train", "tiny", override, "--dry-run", "--plain"],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert f"imports: {override.partition('=')[2].strip('[]')}" in done.stdout
    said = " ".join(done.stderr.split())
    assert all(word in said for word in words), said
    assert not (folder / "runs").exists()


def test_the_current_folder_comes_last(folder):
    (folder / "json.py").write_text("dumps = 1\n")
    assert resolve("json:dumps", "data.task", "f") is not None
    assert sys.modules["json"].__file__ != str(folder / "json.py")
    assert sys.path[-1] == str(folder)


def test_what_is_an_import_string():
    assert is_import("a:b") and not is_import("python")
    assert not is_import("reasoning_gym:chain_sum", ["reasoning_gym"])
    assert resolve("os.path:join", "x", "join") is not None
    assert call_problem(print, 1) == "" and "cannot be called" in call_problem(3)


def test_an_attribute_that_raises_and_an_async_function_are_refused(folder):
    more = (
        "def __getattr__(name): raise OSError('no disk')\nasync def late(answer, gold, meta): ...\n"
    )
    (folder / "mine.py").write_text(MINE + more)
    with pytest.raises(ConfigError, match="tools.enabled is 'mine:far': reading 'far'.* OSError"):
        planned("tools.enabled=[mine:far]")
    with pytest.raises(ConfigError, match="reward.grader is 'mine:late': .* is an async function"):
        planned("reward.grader=mine:late")
