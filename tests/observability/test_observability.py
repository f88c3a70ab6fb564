"""What a user sees: logs that survive a kill, lines and cards that say what they should, report and chart."""

from __future__ import annotations

import io
import json
import math
import os
import struct
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from appo.errors import ConfigError, DataError
from appo.observability import progress
from appo.observability.branches import BranchLog, branch_table
from appo.observability.card import card_text, elide, escape, md_code
from appo.observability.chart import reward_curve
from appo.observability.lines import append_lines
from appo.observability.metrics import MetricsWriter, newcombe, read_metrics, strip_times, wilson
from appo.observability.progress import Console, step_parts
from appo.observability.report import write_report
from appo.observability.trees import MAX_LINES, render_tree
from appo.rollout.store import append_trees
from appo.types import Finish, Leaf, Node, RolloutTree, Task, ToolCall

STEP = {
    "step": 3, "kind": "step", "reward/mean": 0.41, "reward/std": 0.49, "tool/use": 0.72, "policy/entropy": 0.63,
    "tokens/unique": 3101, "tokens/total": 6220, "branch/omega_uninformative": 0.5, "time/rollout": 20.1,
    "time/score": 0.9, "time/branch": 9.0, "time/reward": 1.2, "time/learn": 15.0, "time/push": 2.0, "time/step": 48.2,
}  # fmt: skip
EVAL = {"step": 0, "kind": "eval", "eval/accuracy": 5 / 128, "eval/tool_use": 0.25, "eval/questions": 128.0,
        "time/eval": 44.0}  # fmt: skip


# -- metrics.jsonl -------------------------------------------------------------------------------


def test_records_come_back_and_numpy_is_welcome(tmp_path):
    w = MetricsWriter(tmp_path / "run")
    w.write(STEP)
    w.write(
        {
            "step": np.int64(4),
            "reward/mean": np.float32(0.5),
            "list": np.arange(2),
            "ok": np.bool_(True),
        }
    )
    assert read_metrics(tmp_path / "run") == [
        STEP, {"step": 4, "reward/mean": 0.5, "list": [0, 1], "ok": True},
    ]  # fmt: skip


def test_every_line_is_strict_json_with_nonfinite_named(tmp_path):
    record = {
        "step": 1,
        "b": math.nan,
        "a": -math.inf,
        "c": [1.0, np.float32("inf")],
        "d": {"x": math.nan},
    }
    MetricsWriter(tmp_path).write(record)

    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    line = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
    assert line == {"step": 1, "a": None, "b": None, "c": [1.0, None], "d": {"x": None},
                    "nonfinite": ["a", "b", "c[1]", "d.x"]}  # fmt: skip


def test_key_order_depends_on_keys_alone(tmp_path):
    w = MetricsWriter(tmp_path)
    w.write(STEP)
    w.write(dict(reversed(STEP.items())))
    a, b = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert a == b
    keys = list(json.loads(a))
    assert keys[:3] == ["step", "kind", "reward/mean"]
    assert keys[-1].startswith("time/")


def test_resume_cuts_later_steps_and_a_torn_line(tmp_path):
    w = MetricsWriter(tmp_path)
    for s in (0, 1, 2, 2, 3):
        w.write({"step": s})
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes() + b'{"step": 4, "rew')
    assert [r["step"] for r in read_metrics(tmp_path)] == [0, 1, 2, 2, 3]
    resumed = MetricsWriter(tmp_path, resume_after=2)
    resumed.write({"step": 3, "again": 1})
    assert [r["step"] for r in read_metrics(tmp_path)] == [0, 1, 2, 2, 3]
    assert read_metrics(tmp_path)[-1]["again"] == 1
    assert os.listdir(tmp_path) == ["metrics.jsonl"]


def test_kept_lines_keep_their_bytes(tmp_path):
    path = tmp_path / "metrics.jsonl"
    odd = b'{"step":1,   "x": 1e-3}\n'  # not as we would write it
    path.write_bytes(odd + b'{"step": 2}\n')
    MetricsWriter(tmp_path, resume_after=1)
    assert path.read_bytes() == odd


def test_a_cut_that_dies_leaves_the_old_file(tmp_path, monkeypatch):
    w = MetricsWriter(tmp_path)
    w.write({"step": 1})
    w.write({"step": 2})
    before = (tmp_path / "metrics.jsonl").read_bytes()

    def die(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("appo.observability.lines.os.replace", die)
    with pytest.raises(KeyboardInterrupt):
        MetricsWriter(tmp_path, resume_after=1)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_damage_before_the_end_is_not_hidden(tmp_path):
    append_lines(tmp_path / "metrics.jsonl", ['{"step": 1', '{"step": 2}'])
    with pytest.raises(DataError, match="line 1"):
        read_metrics(tmp_path)


def test_unwritable_folder_is_a_config_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="output"):
        MetricsWriter(tmp_path / "file" / "run")


def test_line_is_on_disk_when_write_returns(tmp_path):
    code = (
        "import os, signal, sys; from appo.observability.metrics import MetricsWriter\n"
        "MetricsWriter(sys.argv[1]).write({'step': 7}); os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], timeout=60, check=False)
    assert done.returncode == -9
    assert read_metrics(tmp_path) == [{"step": 7}]


def test_strip_times_leaves_what_must_be_equal():
    record = STEP | {
        "engine/tool_wait_s": 1.0,
        "memory/peak_gb": 2.0,
        "timestamp": 1.0,
        "nonfinite": ["time/x", "a"],
    }
    kept = strip_times(record)
    assert kept == {k: v for k, v in STEP.items() if not k.startswith("time/")} | {
        "nonfinite": ["a"]
    }
    assert "nonfinite" not in strip_times({"nonfinite": ["time/x"]})


def test_intervals_against_published_values():
    # Newcombe 1998 (one proportion): 81/263, 15/148, 0/20, 1/29; (difference) 56/70 - 48/80, 9/10 - 3/10.
    for (k, n), (low, high) in {
        (81, 263): (0.2553, 0.3662), (15, 148): (0.0624, 0.1605), (0, 20): (0.0, 0.1611), (1, 29): (0.0061, 0.1718),
    }.items():  # fmt: skip
        assert wilson(k, n) == pytest.approx((low, high), abs=6e-5)
    assert newcombe((48, 80), (56, 70)) == pytest.approx((0.0524, 0.3339), abs=6e-5)
    assert newcombe((3, 10), (9, 10)) == pytest.approx((0.1705, 0.8090), abs=6e-5)
    assert wilson(0, 0) == (0.0, 1.0)


# -- console -------------------------------------------------------------------------------------


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def plain_console(**kw):
    out = io.StringIO()
    return Console(True, file=out, **kw), out


def rich_console(width=200):
    from rich.console import Console as Rich

    out = io.StringIO()
    c = Console(False, file=out)
    c._rich = Rich(
        file=out, force_terminal=True, width=width, highlight=False, color_system="standard"
    )
    return c, out


def test_step_line_says_it_all():
    c, out = plain_console()
    c.steps = 5
    c.step(STEP)
    c.step(EVAL)
    assert out.getvalue().splitlines() == [
        "step 3/5  reward 0.41  tools 0.72  entropy 0.63  tokens 3,101/6,220 (2.0x)  uninformative 0.50  "
        "48 s (rollout 20 score 1 branch 9 reward 1 learn 15 push 2)",
        "eval 0/5  accuracy 0.04 (5 of 128, 95 % 0.02–0.09)  tools 0.25  44 s",
    ]


def test_step_line_with_little_to_say():
    assert step_parts({"step": 2}) == ("step 2", [])
    head, parts = step_parts({"step": 7, "steps": 20, "reward/mean": None, "rollout/entropy": 0.5, "tokens/unique": 0,
                              "tokens/total": 0, "learner/nonfinite": 1.0, "time/learn": 0.44})  # fmt: skip
    assert head == "step  7/20"  # columns stay in place from step 1 to 20
    assert parts == [("reward", "none"), ("entropy", "0.50"), ("tokens", "0/0"), ("non-finite", "1"),
                     ("", "0.4 s (learn 0.4)")]  # fmt: skip


def test_plain_has_no_escape_sequence_and_rich_has_the_same_words():
    from rich.text import Text

    texts = []
    for c, out in (plain_console(), rich_console()):
        c.card(
            "appo train x",
            [("batch", "3 × 8"), ("model", "[bold]tiny[/bold] \x1b[31m")],
            ["careful [red]"],
        )
        c.step(STEP)
        c.note("saved [1/2]")
        texts.append(out.getvalue())
    assert "\x1b" not in texts[0]
    assert "\x1b[" in texts[1]
    assert "\x1b[31m " not in texts[1]  # the model's own colour code was spelled out
    for words in (
        "[bold]tiny[/bold] \\x1b[31m",
        "careful [red]",
        "saved [1/2]",
        "reward 0.41",
        "3 × 8",
    ):
        assert words in texts[0]
        assert words in Text.from_ansi(texts[1]).plain


def test_narrow_terminal_drops_the_phases_first():
    c, out = rich_console(width=110)
    c.step(STEP)
    assert out.getvalue().count("\n") == 1
    assert "rollout" not in out.getvalue()


@pytest.mark.parametrize("plain", [True, False])
def test_quiet_keeps_warnings_and_errors(plain):
    out, err = io.StringIO(), io.StringIO()
    c = Console(plain, quiet=True, file=out, err=err)
    c.card("t", [("a", "b")], ["look here"])
    c.step(STEP)
    c.note("n")
    with c.phase("p", 1) as p:
        p.update(1)
    c.error("bad key", "one\n  two")
    assert out.getvalue() == ""
    assert err.getvalue().splitlines() == ["warning: look here", "error: bad key: one two"]


def test_plain_progress_is_sparse():
    clock = Clock()
    c, out = plain_console(clock=clock)
    with c.phase("short", 4) as p:
        for i in range(4):
            clock.now += 0.4
            p.update(i + 1)
    assert out.getvalue() == ""
    with c.phase("long", 60) as p:
        for i in range(60):
            clock.now += 0.5
            p.update(i + 1, tokens=1234 * i)
    lines = out.getvalue().splitlines()
    assert lines[0] == "  long 4/60  tokens 3,702  2 s"
    assert len(lines) == 3  # at 2, 12 and 22 of 30 seconds


@pytest.mark.parametrize(("delay", "shown"), [(0.02, True), (30.0, False)])
def test_bar_appears_only_for_long_phases_and_goes_away(monkeypatch, delay, shown):
    monkeypatch.setattr(progress, "SHOW_AFTER_S", delay)
    c, out = rich_console()
    before = threading.active_count()
    with pytest.raises(RuntimeError), c.phase("rollout", 24) as p:
        p.update(3)
        until = time.monotonic() + (10.0 if shown else 0.2)
        while time.monotonic() < until and "7/24" not in out.getvalue():
            time.sleep(0.02)
            p.update(7, tokens=412)
        c.warn("while the bar is up")
        raise RuntimeError
    assert ("7/24" in out.getvalue()) == shown
    assert "tokens 412" in out.getvalue() or not shown
    assert "while the bar is up" in out.getvalue()
    assert c._live is None
    until = time.monotonic() + 5  # rich tells its refresh thread to stop, but does not wait for it
    while threading.active_count() > before and time.monotonic() < until:
        time.sleep(0.01)
    assert threading.active_count() == before


def test_two_phases_at_once_share_the_screen(monkeypatch):
    monkeypatch.setattr(progress, "SHOW_AFTER_S", 0.0)
    c, _ = rich_console()
    with c.phase("outer", 2) as a:
        with c.phase("inner", 3) as b:
            until = time.monotonic() + 10
            while (a._task is None or b._task is None) and time.monotonic() < until:
                time.sleep(0.01)
            assert len(c._live.tasks) == 2
        assert [t.description for t in c._live.tasks] == ["outer"]
    assert c._live is None


def test_ascii_terminal_does_not_crash():
    raw = io.BytesIO()
    c = Console(True, file=io.TextIOWrapper(raw, encoding="ascii"))
    c.note("3 × 8")
    assert raw.getvalue() == b"3 ? 8\n"


def test_plain_is_chosen_by_terminal_and_environment(monkeypatch):
    class Tty(io.StringIO):
        def isatty(self):
            return True

    for key in ("NO_COLOR", "CI"):
        monkeypatch.delenv(key, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert not Console(file=Tty()).plain
    assert Console(file=io.StringIO()).plain
    for key, value in (("NO_COLOR", "1"), ("CI", "true"), ("TERM", "dumb")):
        with monkeypatch.context() as m:
            m.setenv(key, value)
            assert Console(file=Tty()).plain


# -- text ----------------------------------------------------------------------------------------


def test_escape_and_elide():
    assert escape("a\n\t\x1b[2J\u202e\u2028é×日") == "a\\n\\t\\x1b[2J\\u202e\\u2028é×日"
    assert escape("a\nb", keep="\n") == "a\nb"
    for n in range(1, 60):
        short = elide("x" * 1000 + "END", n)
        assert len(short) <= n
    assert elide("x" * 1000 + "END", 40).endswith("xEND")
    assert elide("short", 5) == "short"
    assert md_code("a|b`c\n") == "`` a\\|b`c\\n ``"


def test_card_is_aligned_and_wrapped():
    text = card_text("title", [("a", "x " * 40), ("long", "y")], ["w"], width=40)
    lines = text.splitlines()
    assert max(map(len, lines)) <= 40
    assert lines[2].startswith("a     x x")
    assert lines[3].startswith("      x x")
    assert lines[-1] == "warning: w"


# -- trees ---------------------------------------------------------------------------------------

WORDS = {1: "<q>", 4: "let me ", 5: "think ", 6: "<python>2+3</python>", 7: "<result>5", 8: "</result>",
         9: "<answer>5</answer>", 10: "guess\n", 11: "\x1b[31m", 12: "<result>late</result>"}  # fmt: skip


def text_of(ids):
    return "".join(WORDS.get(i, f"w{i} ") for i in ids)


def small_tree(step=1):
    call = ToolCall("python", "2+3", "5", True, 0.01, None, 2)
    failed = ToolCall("python", "2+3", "", False, 5.0, "timeout", 2)
    return RolloutTree(
        Task("t-1", [{"role": "system", "content": "SYS"}, {"role": "user", "content": "What is 2+3?"}], "5"),
        [
            Node(None, "prompt", 0, [1]),
            Node(0, "model", 1, [4, 5, 6], [0.0] * 3, [0.0] * 3, 0, (0,)),
            Node(1, "tool", 3, [7, 8]),
            Node(2, "model", 2, [9], [0.0], [0.0], 0, (0,)),
            Node(1, "model", 1, [10, 11], [0.0] * 2, [0.0] * 2, 0, (0, 0)),
            Node(4, "tool", 2, [12]),
            Node(2, "model", 2, [10], [0.0], [0.0], 0, (0, 1)),
        ],
        [
            Leaf(3, 0, finish=Finish.ANSWER, tool_calls=[call], reward=1.0),
            Leaf(6, 0, branch=1, parent_leaf=0, split=5, branch_score=-0.5, branch_rule="entropy",
                 tool_calls=[call], reward=0.5),
            Leaf(5, 0, branch=0, parent_leaf=0, split=1, branch_score=2.345, branch_rule="strict",
                 finish=Finish.LENGTH, tool_calls=[failed], grade_error="timeout: 5 s"),
        ],
        step=step,
    )  # fmt: skip


def test_tree_shows_each_thing_once_and_branches_under_their_root():
    shown = render_tree(small_tree(), text_of)
    assert "SYS" not in shown
    assert shown.count("let me") == shown.count("│   <answer>5</answer>") == 1
    assert shown == (
        "step 1 · t-1 · 1 root + 2 branches · mean reward 0.75 · 11 tokens for 19 (1.7x)\n"
        "\n"
        "question  What is 2+3?\n"
        "answer  5\n"
        "\n"
        "root 0  reward 1.00 · answer · 4 sampled\n"
        "│   let me think <python>2+3</python>\n"
        "│   python  <result>5</result>\n"
        "│   <answer>5</answer>\n"
        '├── ↳ branch at token 1 "think " (strict, 2.35)  not graded · length · 3 sampled\n'
        "│       guess\\n\\x1b[31m\n"
        "│       python (timeout)  <result>late</result>\n"
        "│       grader  timeout: 5 s\n"
        '└── ↳ branch at token 5 "<answer>5</answer>" (entropy, -0.50)  reward 0.50 · unfinished · 4 sampled\n'
        "        guess\n"
    )


def test_long_texts_are_elided_and_lines_fit():
    tree = small_tree()
    tree.nodes[1].token_ids = list(range(1000, 1900))
    tree.task.messages[1]["content"] = "why " * 3000
    for width in (60, 100):
        lines = render_tree(tree, text_of, width).splitlines()
        assert max(map(len, lines)) <= width
        assert len(lines) < 20 + 3 * MAX_LINES
        assert any("w1000" in x for x in lines)
        assert any("w1899" in x for x in lines)


def test_a_tree_of_one_ungraded_root_renders():
    tree = small_tree()
    tree.nodes, tree.leaves = tree.nodes[:2], [Leaf(1, 0)]
    shown = render_tree(tree, text_of)
    assert "not graded" in shown
    assert "root 0" in shown


# -- branches, chart, report ---------------------------------------------------------------------


def row(root, position, flat, **kw):
    return {"root": root, "position": position, "response_length": 10, "token": " so", "rule": "strict", "score": 1.0,
            "z_entropy": 2.0, "z_omega": 0.5, "omega_uninformative": flat, "root_reward": 0.0, "branch_reward": 1.0} | kw  # fmt: skip


def test_branch_table_counts(tmp_path):
    log = BranchLog(tmp_path)
    log.write(
        1,
        0,
        "a",
        [
            row(0, 0, True, rule="entropy", z_omega=0.0),
            row(1, 9, True, rule="entropy", z_omega=0.0),
        ],
    )
    log.write(
        1, 1, "b", [row(0, 4, False, z_omega=1.5), row(1, 5, True, token="|", branch_reward=None)]
    )
    log.write(
        1,
        1,
        "c",
        [row(0, 9, False, branch_reward=0.0, z_omega=math.nan)],
        omega_uninformative=[False, True, True],
        shortfall=2,
    )
    log.write(1, 1, "d", [])
    t = branch_table(tmp_path)
    assert (t["prompts"], t["points"], t["shortfall"]) == (4, 5, 2)
    assert t["by_minibatch"] == {
        0: {
            "prompts": 1,
            "roots": 2,
            "points": 2,
            "strict": 0.0,
            "uninformative_prompts": 1.0,
            "uninformative_roots": 1.0,
        },
        # d had no branch point, so nothing is known of it: 0 of the other two, 3 of their 5 roots.
        1: {
            "prompts": 3,
            "roots": 5,
            "points": 3,
            "strict": 1.0,
            "uninformative_prompts": 0.0,
            "uninformative_roots": 0.6,
        },
    }
    assert t["rules"] == {"strict": 0.6, "entropy": 0.4}
    assert t["positions"] == [0.2, 0.0, 0.4, 0.0, 0.4]
    assert t["tokens"][0] == {"token": " so", "count": 4, "z_entropy": 2.0, "z_omega": 1.5}
    assert t["reward"] == {"points": 4, "better": 0.75, "same": 0.25, "worse": 0.0}
    assert t["examples"][0]["prompt_id"] == "a"


def test_branch_log_resumes(tmp_path):
    log = BranchLog(tmp_path)
    for s in (1, 2, 3):
        log.write(s, 0, "p", [row(0, 1, True)])
    BranchLog(tmp_path, resume_after=1).write(2, 0, "p", [row(0, 1, False)])
    assert branch_table(tmp_path)["by_minibatch"][0]["uninformative_roots"] == 0.5


def test_branch_table_of_nothing(tmp_path):
    t = branch_table(tmp_path)
    assert (t["prompts"], t["points"], t["positions"], t["reward"]["better"]) == (0, 0, None, None)


@pytest.mark.parametrize("records", [[], [STEP], [EVAL], [EVAL, STEP, EVAL | {"step": 3, "eval/accuracy": 1.0}],
                                     [STEP | {"reward/mean": None}], [{"step": 1, "kind": "eval", "eval/accuracy": 0.3}]])  # fmt: skip
def test_chart_is_a_png_whatever_there_is(tmp_path, records):
    reward_curve(records, tmp_path / "c.png")
    data = (tmp_path / "c.png").read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", data[16:24])
    assert width > 800
    assert height > 600
    assert os.listdir(tmp_path) == ["c.png"]
    reward_curve([{"step": 1, "reward/mean": 0.9}], tmp_path / "other.png")
    assert (tmp_path / "other.png").read_bytes() != data  # it does depend on the records


def test_report_of_a_whole_run(tmp_path):
    w = MetricsWriter(tmp_path)
    w.write(EVAL)
    for s in (1, 2):
        w.write(
            STEP | {"step": s, "grade/errors": 2.0, "tool/errors": 0.25, "learner/loss": math.nan}
        )
    w.write(EVAL | {"step": 2, "eval/accuracy": 0.5})
    BranchLog(tmp_path).write(1, 0, "p|1", [row(0, 3, True, token="`|\n")])
    append_trees(tmp_path / "trees.jsonl", [small_tree(1), small_tree(2)], text_of)
    c, out = plain_console()
    write_report(tmp_path, "steps: 2\nseed: 0\n", c)
    text = (tmp_path / "report.md").read_text()
    assert "2 of 2 steps" in text
    assert "not finished" not in text
    low, high = wilson(5, 128)
    assert f"0.039 (5 of 128; {low:.3f}–{high:.3f})" in text
    low, high = newcombe((5, 128), (64, 128))
    assert f"Accuracy 0.039 → 0.500 (difference +0.461, 95 % {low:+.3f} to {high:+.3f})" in text
    assert "| answers that could not be graded | `grade/errors` | 4 |" in text
    assert "`learner/loss`" in text
    assert "| rollout | 40.2 | 20.10 | 0.417 |" in text
    assert "`` `\\|\\n ``" in text  # a hostile token does not break the table
    for line in (x for x in text.splitlines() if x.startswith("| `p\\|1`")):
        assert line.replace("\\|", "").count("|") == 13
    assert (tmp_path / "tree.txt").read_text() == render_tree(small_tree(2), text_of)
    assert (tmp_path / "curve.png").stat().st_size > 5000
    assert "report.md" in out.getvalue()
    assert "warning" not in out.getvalue()


def test_report_of_a_run_that_was_cut_short(tmp_path):
    c, out = plain_console()
    write_report(tmp_path, "steps: 5\n", c)  # nothing but a folder
    text = (tmp_path / "report.md").read_text()
    assert "0 of 5 steps" in text
    assert "No evaluation yet." in text
    MetricsWriter(tmp_path).write(
        {"step": 1, "kind": "step", "reward/mean": None, "nonfinite": ["reward/mean"]}
    )
    with open(tmp_path / "metrics.jsonl", "a") as f:
        f.write('{"step": 2, "rew')
    with open(tmp_path / "trees.jsonl", "w") as f:
        f.write('{"form')
    write_report(tmp_path, "steps: 5\n", c)
    text = (tmp_path / "report.md").read_text()
    assert "1 of 5 steps" in text
    assert "The run is not finished." in text
    assert "| 1 | – | – |" in text  # a number that is not there is a dash
    assert not (tmp_path / "tree.txt").exists()
    assert "warning" not in out.getvalue()


def test_report_goes_on_without_its_picture(tmp_path, monkeypatch):
    MetricsWriter(tmp_path).write(STEP)

    def broken(*_):
        raise OSError("no font")

    monkeypatch.setattr("appo.observability.report.reward_curve", broken)
    c, out = plain_console()
    write_report(tmp_path, "", c)
    assert "warning: curve.png could not be written: OSError: no font" in out.getvalue()
    assert "curve.png" not in (tmp_path / "report.md").read_text()


def test_console_costs_neither_torch_nor_matplotlib_nor_rich():
    code = (
        "import sys, appo.observability.report, appo.observability.trees; from appo.observability.progress import Console\n"
        "c = Console(True); c.card('t', [('a', 'b')]); c.step({'step': 1})\n"
        "bad = {'torch', 'matplotlib', 'rich'} & set(sys.modules); sys.exit(', '.join(bad) or 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
