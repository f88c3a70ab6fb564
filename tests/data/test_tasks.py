"""Tasks by name, splits that never overlap, record files with their defects, and the cursor of a resumed run."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest

from appo.data.rl_records import question_text, scan_records
from appo.data.tasks import Cursor, build_tasks, read_rl_records, split_of
from appo.errors import DataError


def row(
    question: str, answer: Any = "5", ability: str = "math", system: str = "s"
) -> dict[str, Any]:
    return {
        "data_source": "made",
        "prompt": [{"role": "system", "content": system}, {"role": "user", "content": question}],
        "ability": ability,
        "reward_model": {"ground_truth": answer, "style": "rule"},
        "extra_info": {"index": 1, "split": "train"},
    }


def jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text(
        "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), encoding="utf-8"
    )
    return path


def parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


# ---- arithmetic ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "params", [{}, {"operations": "*", "digits": 1, "terms": [2, 5]}, {"digits": [1, 9]}]
)
def test_arithmetic_answers_are_right(params: dict[str, Any]) -> None:
    stream = build_tasks("arithmetic", split="train", seed=3, params=params, tools=("python",))
    for i in range(200):
        task = stream[i]
        match = re.fullmatch(r"What is ([\d+*-]+)\?", task.messages[0]["content"])
        assert match
        assert str(eval(match[1])) == task.answer
        assert task.tools == ("python",)


def test_positions_are_pure_functions_of_seed_and_split() -> None:
    one, two = (build_tasks("arithmetic", split="train", seed=7) for _ in range(2))
    assert [one[i] for i in (9, 0, 5)] == [two[i] for i in (9, 0, 5)]
    assert build_tasks("arithmetic", split="train", seed=8)[0] != one[0]
    # The same in another process: nothing depends on the hash seed of the interpreter.
    code = (
        "from appo.data.tasks import build_tasks;"
        "print(build_tasks('arithmetic', split='train', seed=7)[41].messages[0]['content'])"
    )
    env = {
        **os.environ,
        "PYTHONHASHSEED": "123",
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }
    out = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True
    )
    assert out.stdout.strip() == one[41].messages[0]["content"]


def test_train_and_eval_never_share_a_question_across_seeds() -> None:
    small = {"digits": 1, "terms": 2}  # 300 expressions: they would collide at once
    train = [build_tasks("arithmetic", split="train", seed=s, params=small) for s in range(3)]
    eval_ = build_tasks("arithmetic", split="eval", seed=9, params=small, size=20)
    asked = {question_text(stream[i]) for stream in train for i in range(300)}
    held = [question_text(t) for t in eval_]
    assert len(held) == len(set(held)) == 20
    assert not asked & set(held)
    assert all(split_of(q) == "train" for q in asked)


def test_eval_says_when_it_runs_out_of_questions() -> None:
    stream = build_tasks(
        "arithmetic",
        split="eval",
        seed=0,
        params={"digits": 1, "terms": 2, "operations": "+"},
        size=100,
    )
    with pytest.raises(DataError, match=r"only about \d+ distinct eval questions, but 100"):
        stream[99]


def test_reasoning_gym_is_deterministic_and_split() -> None:
    pytest.importorskip("reasoning_gym", reason="the extra 'tasks' is not installed")
    train, again = (build_tasks("reasoning_gym:chain_sum", split="train", seed=1) for _ in range(2))
    eval_ = build_tasks("reasoning_gym:chain_sum", split="eval", seed=1, size=30)
    assert train[70] == again[70]
    assert train[70].grader == "reasoning_gym"
    assert not {question_text(train[i]) for i in range(100)} & {question_text(t) for t in eval_}
    assert json.loads(json.dumps(train[0].meta)) == train[0].meta  # it crosses a pipe


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("aritmetic", {}, "did you mean 'arithmetic'"),
        ("arithmetic:x", {}, "unknown"),
        ("reasoning_gym:chainsum", {}, "did you mean 'chain_sum'"),
        ("reasoning_gym:chain_sum", {"params": {"min_termz": 3}}, "min_termz"),
        ("arithmetic", {"params": {"digit": 3}}, "digit"),
        ("arithmetic", {"params": {"digits": 0}}, r"digits=0: must be an integer or \[low, high\]"),
        ("arithmetic", {"params": {"digits": [3, 2]}}, "digits"),
        ("arithmetic", {"params": {"operations": "+/"}}, "operations='\\+/'"),
        ("arithmetic", {"split": "test"}, "must be 'train' or 'eval'"),
        ("arithmetic", {"size": 0}, "size=0"),
        ("records", {}, "data.train is not set"),
    ],
)
def test_user_errors_name_the_field_and_the_fix(
    name: str, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        build_tasks(name, **({"split": "train", "seed": 0} | arguments))


# ---- record files ----------------------------------------------------------------------------


@pytest.mark.parametrize("write", [jsonl, parquet])
def test_records_of_both_formats_read_the_same(tmp_path: Path, write) -> None:
    path = write(tmp_path / f"d.{write.__name__}", [row("a?", "1"), row("b?", "Paris", "qa")])
    first, second = read_rl_records(path, tools=("search",))
    assert (first.answer, first.grader, first.source, first.tools) == (
        "1",
        "maths",
        "made",
        ("search",),
    )
    assert (second.answer, second.grader) == ("Paris", "qa_f1")
    assert [m["role"] for m in first.messages] == ["system", "user"]
    assert first.meta["index"] == 1
    assert first.task_id != second.task_id


def test_ground_truth_may_be_a_list(tmp_path: Path) -> None:
    path = parquet(tmp_path / "d.parquet", [row("a?", ["Paris", "City of Light", ""])])
    assert read_rl_records(path)[0].answer == ["Paris", "City of Light"]


def test_plain_question_answer_rows(tmp_path: Path) -> None:
    path = jsonl(
        tmp_path / "d.jsonl",
        [{"question": "1+1?", "answer": 2}, {"question": "x", "answer": "y", "grader": "exact"}],
    )
    first, second = read_rl_records(path)
    assert (first.messages, first.answer) == ([{"role": "user", "content": "1+1?"}], "2")
    assert second.grader == "exact"


def test_corruption_is_counted_and_repaired_on_request(tmp_path: Path) -> None:
    rows = [
        row("a?", system="put it in \x08oxed{}"),
        row("b?", system="fine \\boxed{}"),
        row("c?", "\x0crac{1}{2}"),
    ]
    path = jsonl(tmp_path / "d.jsonl", rows)
    with pytest.warns(UserWarning, match="2 rows hold"):
        kept = read_rl_records(path)
    assert "\x08oxed" in kept[0].messages[0]["content"]  # never changed behind the user's back

    tasks, report = scan_records(path, repair=True)
    assert report.corrupt == 2
    assert tasks[0].messages[0]["content"] == "put it in \\boxed{}"
    assert tasks[1].messages[0]["content"] == "fine \\boxed{}"
    assert tasks[2].answer == "\\frac{1}{2}"


def test_empty_labels_and_duplicates_are_counted(tmp_path: Path) -> None:
    rows = [row("a?"), row("b?", " "), row("c?", []), row(" a?  "), row("d?", None)]
    with pytest.warns(UserWarning) as caught:
        tasks = read_rl_records(jsonl(tmp_path / "d.jsonl", rows))
    assert len(tasks) == 2
    text = " ".join(str(w.message) for w in caught)
    assert "3 rows have an empty answer" in text
    assert "1 rows repeat" in text


def without(key: str) -> dict[str, Any]:
    return {k: v for k, v in row("a?").items() if k != key}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "0 rows, none of them usable"),
        ([row("a?", "")], "1 rows, none of them usable"),
        ([without("prompt")], "row 0: column 'prompt' is missing; the row has 'data_source'"),
        ([row("a?"), without("reward_model")], "row 1: column 'reward_model' is missing"),
        ([{"question": "x"}], "column 'answer' is missing"),
        ([{"prompt": [], "reward_model": {"ground_truth": "1"}}], "must be a list of"),
        ([row("a?") | {"reward_model": {"style": "rule"}}], "with 'ground_truth'"),
        ([[1, 2]], "must be a JSON object"),
    ],
)
def test_malformed_rows_are_located(tmp_path: Path, rows: list[Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_rl_records(jsonl(tmp_path / "d.jsonl", rows))


def test_unreadable_files(tmp_path: Path) -> None:
    (tmp_path / "d.parquet").write_bytes(b"PAR1 no")
    (tmp_path / "d.jsonl").write_text('{"a": 1}\n{oops\n')
    (tmp_path / "l.jsonl").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "d.csv").write_text("a,b")
    for name, message in [
        ("d.parquet", "not a readable parquet"),
        ("d.jsonl", "column 'question' is missing"),
        ("l.jsonl", "UTF-8"),
        ("d.csv", "suffix '.csv'"),
        ("none.jsonl", "does not exist"),
    ]:
        with pytest.raises(DataError, match=message):
            read_rl_records(tmp_path / name)
    (tmp_path / "e.jsonl").write_text(json.dumps(row("a?")) + "\n{oops\n")
    with pytest.raises(DataError, match=r"e.jsonl:2: not a JSON object"):
        read_rl_records(tmp_path / "e.jsonl")


def test_the_authors_validation_rows() -> None:
    """Real data, never copied into the repository."""
    default = Path(__file__).parents[3] / "shared" / "data" / "appo_rl_valid.parquet"
    path = Path(os.environ.get("APPO_RL_DATA", default))
    if not path.is_file():
        pytest.skip("APPO_RL_DATA does not name the authors' validation file")
    tasks, report = scan_records(path, repair=True)
    assert (report.rows, report.corrupt, len(tasks)) == (180, 180, 180)
    assert report.graders == {"maths": 100, "qa_f1": 80}
    assert not any("\x08" in m["content"] for t in tasks for m in t.messages)


# ---- splits and streams of files -------------------------------------------------------------


def test_one_file_is_divided_by_question_and_epochs_are_shuffled(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "d.jsonl", [row(f"question {i}?") for i in range(80)])
    params = {"train": str(path)}
    train = build_tasks("records", split="train", seed=0, params=params)
    eval_ = build_tasks("records", split="eval", seed=0, params=params)
    n = len(train)
    assert n + len(eval_) == 80
    epochs = [[train[e * n + i].task_id for i in range(n)] for e in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1])
    assert epochs[0] != epochs[1]
    assert not set(epochs[0]) & {t.task_id for t in eval_}
    few = build_tasks("records", split="train", seed=0, params=params, size=5)
    assert len({few[i].task_id for i in range(25)}) == len(few) == 5


def test_training_leaves_out_what_the_eval_file_asks(tmp_path: Path) -> None:
    train = jsonl(tmp_path / "train.jsonl", [row("a?"), row("b?"), row("c?")])
    eval_ = jsonl(tmp_path / "eval.jsonl", [row("b?")])
    params = {"train": str(train), "eval": str(eval_)}
    with pytest.warns(UserWarning, match="1 questions also stand in"):
        stream = build_tasks("records", split="train", seed=0, params=params)
    assert {question_text(stream[i]) for i in range(2)} == {"a?", "c?"}


def test_cursor_resumes_where_it_was(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "d.jsonl", [row(f"q{i}?") for i in range(30)])
    for name, params in [("arithmetic", {}), ("records", {"train": str(path)})]:
        whole = Cursor(build_tasks(name, split="train", seed=2, params=params))
        expected = [whole.take(7) for _ in range(9)]
        first = Cursor(build_tasks(name, split="train", seed=2, params=params))
        assert [first.take(7) for _ in range(4)] == expected[:4]
        state = json.loads(json.dumps(first.state_dict()))
        second = Cursor(build_tasks(name, split="train", seed=2, params=params))
        second.load_state_dict(state)
        assert [second.take(7) for _ in range(5)] == expected[4:]


def test_changed_data_is_refused_with_the_reason(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "d.jsonl", [row(f"q{i}?") for i in range(30)])
    cursor = Cursor(build_tasks("records", split="train", seed=2, params={"train": str(path)}))
    state = cursor.state_dict()
    jsonl(path, [row(f"q{i}?") for i in range(31)])
    changed = Cursor(build_tasks("records", split="train", seed=2, params={"train": str(path)}))
    with pytest.raises(DataError, match="sha256 of train file: was"):
        changed.load_state_dict(state)
    other = Cursor(build_tasks("arithmetic", split="train", seed=2))
    with pytest.raises(DataError, match="task: was 'records', is 'arithmetic'"):
        other.load_state_dict(state)
    with pytest.raises(DataError, match="digits: was"):
        other.load_state_dict(
            Cursor(
                build_tasks("arithmetic", split="train", seed=2, params={"digits": 3})
            ).state_dict()
        )


def test_eval_cursor_ends() -> None:
    cursor = Cursor(build_tasks("arithmetic", split="eval", seed=0, size=5))
    assert [len(cursor.take(3)) for _ in range(3)] == [3, 2, 0]


def test_a_clean_file_gives_no_warning(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "d.jsonl", [row("a?"), row("line\u2028separator?")])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(read_rl_records(path)) == 2
