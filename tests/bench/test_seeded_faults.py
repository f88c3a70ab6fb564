"""bench/evidence/seeded_faults.py still fits the sources, and two of its faults turn tests red."""

import importlib.util
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "bench" / "evidence" / "seeded_faults.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("seeded_faults", SCRIPT)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(
        spec
    )  # dataclasses look there
    spec.loader.exec_module(module)
    return module


def test_every_fault_still_applies(script):
    for fault in script.FAULTS:
        assert script.patched(script.ROOT, fault) != (script.ROOT / fault.file).read_text()


def test_a_fault_whose_text_is_gone_is_an_error(script):
    fault = script.Fault("gone", "kernels/common/stats.py", "no such line", "", "")
    with pytest.raises(ValueError, match=r"'gone'.*kernels/common/stats.py holds its text 0 times"):
        script.patched(script.ROOT, fault)


@pytest.mark.slow
def test_shifted_targets_and_a_dropped_entropy_gradient_are_caught(script, tmp_path):
    """The two that need no interpreter and no compiler; the script itself plants them all."""
    wanted = ("targets shifted by one", "entropy gradient set to 0")
    faults = [f for f in script.FAULTS if f.name in wanted]
    results = [row["result"] for row in script.examine(faults, tmp_path)]
    assert results == ["green", "caught", "caught"]
