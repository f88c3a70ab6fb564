"""A user's own task: its tasks, its errors, and what a resumed run compares."""

import pytest

from appo.data.own import EXPECTED, OwnTasks, problem
from appo.data.tasks import Cursor, TaskStream
from appo.errors import DataError
from appo.types import Task


def numbers(*, split, seed, tools, count=6):
    low = 0 if split == "train" else 1000
    return [
        Task(f"{split}-{i}", [{"role": "user", "content": f"{low + i + seed}?"}], str(i), tools)
        for i in range(count)
    ]


def stream(function, split="train", **params):
    source = OwnTasks(function, "my:task", seed=0, tools=("python",), **params)
    return TaskStream("my:task", source, split, 0, None)


def test_its_tasks_are_drawn_in_both_splits():
    train, held_out = stream(numbers), stream(numbers, "eval")
    assert len(train) == 6 and sorted(train[i].task_id for i in range(6)) == [
        f"train-{i}" for i in range(6)
    ]
    assert [t.task_id for t in held_out] == [f"eval-{i}" for i in range(6)]
    assert train[0].tools == ("python",) and len(stream(numbers, count=2)) == 2


def test_a_resumed_run_refuses_other_tasks():
    def other(**about):
        return [
            *numbers(**about)[:-1],
            Task("x", [{"role": "user", "content": about["split"]}], "1"),
        ]

    saved = Cursor(stream(numbers)).state_dict()
    Cursor(stream(numbers)).load_state_dict(saved)
    for changed in (stream(other), stream(numbers, count=5)):
        with pytest.raises(DataError, match="is not the data this run was started with"):
            Cursor(changed).load_state_dict(saved)


def test_what_does_not_fit():
    assert problem(numbers, {}) == "" and problem(numbers, {"count": 3}) == ""
    assert "'cuont'" in problem(numbers, {"cuont": 3})
    assert "tools" in problem(lambda *, split, seed: [], {})
    assert "returns a sequence of appo.types.Task" in EXPECTED


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (lambda **_: 7, "split='train': returned int; expected: a sequence"),
        (lambda **_: [{"question": "?"}], "element 0 is of type dict; expected: appo.types.Task"),
        (lambda **_: [Task("t", "why?", "1")], "element 0 .'t'. has the messages 'why"),
        (lambda **_: [Task("t", [], "1")], "has the messages '.]'; expected: "),
        (lambda **_: 1 / 0, "raised for split='train': ZeroDivisionError"),
        (lambda **_: [], "the train split is empty"),
    ],
)
def test_what_it_returns_is_checked(function, said):
    with pytest.raises(DataError, match=said):
        stream(function)


def test_questions_of_both_splits_are_told():
    with pytest.warns(UserWarning, match="6 training questions also stand in the eval split"):
        stream(lambda **about: numbers(**(about | {"split": "train"})))
