"""The engine's numbers in the step line and in the report."""

from appo.observability.engine import engine_parts, engine_section
from appo.observability.progress import step_parts

STEP = {
    "step": 1, "kind": "step", "engine/prefill_tokens": 100.0, "engine/decode_tokens": 250.0,
    "engine/scored_tokens": 50.0, "engine/tokens_saved": 600.0, "engine/forks": 12.0, "memory/kv_blocks_peak": 40.0,
    "memory/kv_mb_peak": 3.75, "time/tool_wait": 1.26,
}  # fmt: skip


def test_a_step_line_says_what_sharing_saved():
    assert engine_parts(STEP) == [
        ("saved", "600 (2.5x)"),
        ("kv", "40 blocks (4 MB)"),
        ("tool wait", "1.3 s"),
    ]
    assert ("saved", "600 (2.5x)") in step_parts(STEP)[1]


def test_what_an_engine_does_not_count_is_left_out():
    plain = {"engine/prefill_tokens": 5.0, "engine/decode_tokens": 5.0, "time/tool_wait": 0.001}
    assert engine_parts(plain) == [] and engine_parts({}) == []
    assert "tokens_saved" not in engine_section([plain])
    assert engine_section([]) == "Nothing was counted."


def test_the_report_adds_up():
    text = engine_section([STEP, STEP | {"memory/kv_mb_peak": 5.0}])
    assert "| 1,200 |" in text and "2.50 times as many" in text
    assert "| 5.0 |" in text and "| 2.5 |" in text  # a peak is not a sum, seconds are
