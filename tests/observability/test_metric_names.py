"""The table of metrics and the code that writes them agree, in both directions."""

import ast
import re
from pathlib import Path

import pytest
from support.tiny_runs import train

from appo.observability.metric_names import GROUPS, METRICS, describe, group
from appo.observability.metrics import read_metrics
from appo.observability.renamed import METRICS as RENAMED

APPO = Path(__file__).resolve().parents[2] / "appo"
WRITERS = ("algo", "learner", "packing", "rollout", "run", "trainer")
FILES = [p for room in WRITERS for p in (APPO / room).rglob("*.py")]
FILES += [APPO / "observability" / "lines.py"]  # writes `nonfinite`
KEY = re.compile(rf"({'|'.join(g for g in GROUPS if g)})/[a-z_0-9]+")


def said(paths):
    """Words that stand in code as strings, and the beginnings of composed ones such as f"time/{phase}"."""
    words, begins = set(), set()
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                words.add(node.value)
            if isinstance(node, ast.JoinedStr) and isinstance(node.values[0], ast.Constant):
                begins.add(node.values[0].value)
    return words, begins


def has_writer(key, words, begins):
    if key.endswith("*"):
        return key[:-1] in begins
    return key in words or (f"{group(key)}/" in begins and key.partition("/")[2] in words)


def test_every_name_of_the_table_has_a_writer():
    words, begins = said(FILES)
    assert [key for key in METRICS if not has_writer(key, words, begins)] == []
    assert not has_writer("reward/median", words, begins)


def test_every_name_that_stands_in_the_code_is_in_the_table():
    words, _ = said(FILES)
    found = {word for word in words if KEY.fullmatch(word)}
    assert len(found) > 50
    assert sorted(key for key in found if describe(key) is None) == []


def test_names_of_today_are_those_that_old_ones_are_read_as():
    assert set(RENAMED.values()) <= set(METRICS) and not set(RENAMED) & set(METRICS)


def test_a_meaning_is_one_sentence_with_a_unit():
    for key, metric in METRICS.items():
        assert group(key) in GROUPS, key
        assert metric.unit and metric.meaning.endswith("."), key
    assert set(map(group, METRICS)) == set(GROUPS)


@pytest.mark.parametrize("key", ["grade/error:timeout", "reward/mean"])
def test_a_key_is_described(key):
    assert describe(key)


def test_an_unknown_key_is_not():
    assert describe("reward/median") is None and describe("reward/mean:x") is None


@pytest.mark.slow
def test_every_key_that_a_run_writes_is_in_the_table(tmp_path):
    train("steps=2", "staleness=1", f"output={tmp_path}/run")
    records = read_metrics(tmp_path / "run")
    assert {r["kind"] for r in records} == {"step", "eval"}
    keys = {key for r in records for key in r}
    assert sorted(key for key in keys if describe(key) is None) == []
    assert set(METRICS) - keys <= {"nonfinite", "grade/error:*"}  # nothing went wrong
