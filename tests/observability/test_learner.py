"""What a user is told of the learner's work: two separate factors, and that nothing is learned."""

from __future__ import annotations

from appo.observability.learner import NoSignal, learner_parts, learner_section
from appo.observability.progress import step_parts
from appo.observability.report import report_text

STEPS = [
    {"step": 1, "pack/tokens_all": 1000.0, "pack/tokens_rows": 400.0, "pack/tokens_unique": 250.0,
     "pack/imbalance": 1.0, "pack/over_budget": 0.0, "pack/rows": 4.0},
    {"step": 2, "pack/tokens_all": 1000.0, "pack/tokens_rows": 100.0, "pack/tokens_unique": 80.0,
     "pack/imbalance": 1.3, "pack/over_budget": 2.0, "pack/rows": 1.0},
]  # fmt: skip


def test_dropping_and_sharing_are_told_apart(tmp_path) -> None:
    text = learner_section(STEPS)
    _, _, everything, rows, unique = text.split("\n\n")[0].splitlines()
    assert "2,000" in everything
    assert [cell.strip() for cell in rows.split("|")][3:6] == ["500", "1,500", "4.00"]
    assert [cell.strip() for cell in unique.split("|")][3:6] == ["330", "170", "1.52"]
    assert "1.15 on average, 1.30 at most" in text
    assert "2 rows were longer than learner.token_budget" in text
    assert text in report_text(tmp_path, STEPS, "")


def test_what_was_not_counted_is_left_out() -> None:
    assert learner_section([{"step": 1}]) == "Nothing was counted."
    assert learner_parts({"step": 1}) == []
    idle = {"step": 1, "pack/tokens_all": 900.0, "pack/tokens_rows": 0.0, "pack/tokens_unique": 0.0}
    assert learner_parts(idle) == []
    assert "900" in learner_section([idle])  # all of them avoided, and no factor of zero
    assert ("learned", "250 (4.0x)") in step_parts(STEPS[0])[1]


def test_steps_that_teach_nothing_are_explained_every_fifth_time() -> None:
    watch = NoSignal()
    idle = [watch.look({"step": n, "pack/rows": 0.0, "reward/mean": 0.0}) for n in range(1, 11)]
    assert [n for n, text in enumerate(idle, 1) if text] == [5, 10]
    assert "5 steps in a row, up to step 5, have changed no weight" in str(idle[4])
    assert "mean reward of the last one: 0" in str(idle[4])
    assert watch.look({"step": 11, "pack/rows": 3.0}) is None
    assert watch.look({"step": 11, "kind": "eval"}) is None
    again = [watch.look({"step": n, "pack/rows": 0.0}) for n in range(12, 17)]
    assert [text is None for text in again] == [True] * 4 + [False]
