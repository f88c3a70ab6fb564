"""What goes wrong on one rank is refused by all of them alike."""

from __future__ import annotations

from pathlib import Path

import pytest
from support import rank_runs
from support.tiny_models import build


@pytest.mark.timeout(200)
def test_a_fault_on_one_rank_is_met_by_both(tmp_path: Path) -> None:
    build("qwen3", tmp_path / "model")
    script = Path(__file__).with_name("two_ranks.py")
    ended = rank_runs.run(2, script, tmp_path, tmp_path / "model", timeout=180)
    assert all(e.out.endswith("all is well\n") for e in ended)
