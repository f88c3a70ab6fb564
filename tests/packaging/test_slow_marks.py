"""Slow tests are those of a recorded run; the list names tests that exist."""

import pytest
from support import durations

JUNIT = """<?xml version="1.0"?><testsuites><testsuite>
<testcase classname="tests.a.test_b" name="test_c[1 x]" file="tests/a/test_b.py" line="3" time="12.5"/>
<testcase classname="tests.a.test_b.TestD" name="test_e" file="tests/a/test_b.py" line="9" time="40.0"/>
<testcase classname="tests.a.test_b" name="test_quick" file="tests/a/test_b.py" line="1" time="10.0"/>
<testcase classname="" name="tests.a.broken" time="99.0"/>
</testsuite></testsuites>"""

LINES = """
============ slowest durations ============
9.00s call     tests/a/test_b.py::test_c[1 x]
1.50s setup    tests/a/test_b.py::test_c[1 x]
0.30s call     tests/a/test_b.py::test_quick
========= 2 passed in 11.00s =========
"""


def report(tmp_path, text):
    path = tmp_path / "report"
    path.write_text(text)
    return path


def test_a_junit_file_is_read_written_and_read_again(tmp_path):
    found = durations.durations(report(tmp_path, JUNIT))
    assert found["tests/a/test_b.py::TestD::test_e"] == 40.0 and len(found) == 3
    tests = durations.slow(found)
    assert list(tests) == ["tests/a/test_b.py::TestD::test_e", "tests/a/test_b.py::test_c[1 x]"]
    durations.write(tests, 10.0, tmp_path / "list")
    assert durations.read(tmp_path / "list") == {k: round(v) for k, v in tests.items()}


def test_setup_counts_and_a_summary_is_no_duration(tmp_path):
    found = durations.durations(report(tmp_path, LINES))
    assert found == {"tests/a/test_b.py::test_c[1 x]": 10.5, "tests/a/test_b.py::test_quick": 0.3}


def test_a_report_without_durations_says_what_to_do(tmp_path):
    with pytest.raises(ValueError, match="junit_family=xunit1"):
        durations.durations(report(tmp_path, "3 passed in 2.00s"))


def test_a_test_that_has_gone_is_found(tmp_path):
    (tmp_path / "test_b.py").write_text(
        "class TestD:\n    def test_e(self): ...\ndef test_c(): ...\n"
    )
    there = {"test_b.py::test_c[1 x]": 1.0, "test_b.py::TestD::test_e": 1.0}
    gone = {"test_b.py::test_e": 1.0, "test_x.py::test_c": 1.0, "test_b.py::TestD::test_f[0]": 1.0}
    assert durations.missing(there | gone, tmp_path) == list(gone)


def test_the_list_names_tests_that_exist():
    assert durations.missing(durations.read()) == []


def test_listed_tests_are_marked_and_no_others(request):
    plugins = request.config.pluginmanager.get_plugins()
    (conftest,) = [p for p in plugins if hasattr(p, "mark_slow_tests")]
    items = [Item("tests/a.py::test_a[1]"), Item("tests/a.py::test_a[2]")]
    conftest.mark_slow_tests(items, {"tests/a.py::test_a[1]": 11.0})
    assert [item.marks for item in items] == [["slow"], []]


class Item:
    """What the hook needs of a pytest item."""

    def __init__(self, nodeid):
        self.nodeid, self.marks = nodeid, []

    def add_marker(self, mark):
        self.marks.append(mark.name)
