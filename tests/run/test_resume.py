"""A resumed run may change what cannot change its results, and hears about everything else."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from appo.config import Config, load_config
from appo.config.marks import Resume, resume_marks
from appo.errors import CheckpointError
from appo.run.resume import changed, check_config, flatten


def saved(*overrides: str) -> dict[str, Any]:
    """The configuration as a checkpoint gives it back."""
    state: dict[str, Any] = json.loads(json.dumps(flatten(load_config("quickstart", overrides))))
    return state


def test_the_same_configuration_is_no_change() -> None:
    cfg = load_config("tiny", ["output=runs/a"])
    assert check_config(saved_of(cfg), cfg, "runs/a") == []


def saved_of(cfg: Config) -> dict[str, Any]:
    state: dict[str, Any] = json.loads(json.dumps(flatten(cfg)))
    return state


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("learner.lr=0.5", "learner.lr: "),
        ("seed=4", "seed: 0 -> 4"),
        ("algo.half_life=7", "algo.half_life: None -> 7.0"),
        ("learner.betas=[0.9,0.9]", "learner.betas: "),
        ("model.dtype=float32", "model.dtype: 'bfloat16' -> 'float32'"),
        ("tools.python.wall_s=1", "tools.python.wall_s: 5.0 -> 1.0"),
        ("prompts_per_step=2", "prompts_per_step: "),
    ],
)
def test_what_matters_is_refused_with_both_values(override: str, line: str) -> None:
    old = saved()
    with pytest.raises(CheckpointError) as caught:
        check_config(old, load_config("quickstart", [override]), "runs/x")
    said = str(caught.value)
    assert line in said and "resume=runs/x" in said
    assert "What may change: steps, threads, save_every" in said and caught.value.exit_code == 2


def test_all_differences_are_listed_at_once() -> None:
    with pytest.raises(CheckpointError, match=r"seed: 0 -> 4; .*learner\.lr: .* -> 0\.5"):
        check_config(saved(), load_config("quickstart", ["seed=4", "learner.lr=0.5"]), "r")


def test_free_keys_are_noted() -> None:
    cfg = load_config("quickstart", ["steps=99", "eval.questions=4", "watchdog_s=60", "output=z"])
    notes = check_config(saved(), cfg, "r")
    assert len(notes) == 3 and any("-> 99" in n for n in notes)
    assert all(n.startswith("changed on resume: ") for n in notes)


def test_rounding_is_said() -> None:
    (note,) = check_config(saved(), load_config("quickstart", ["learner.token_budget=777"]), "r")
    assert "up to rounding only" in note and "-> 777" in note


def test_the_number_of_steps_matters_to_a_schedule() -> None:
    old = saved("learner.schedule=cosine")
    cfg = load_config("quickstart", ["learner.schedule=cosine", "steps=77"])
    with pytest.raises(CheckpointError, match=r"steps: \d+ -> 77 \(learner.schedule is 'cosine'\)"):
        check_config(old, cfg, "r")


def test_parameters_of_a_task_are_compared_one_by_one() -> None:
    old = saved_of(load_config("tiny"))
    cfg = load_config("tiny", ["data.params={digits: [1, 3], terms: [2, 3]}"])
    with pytest.raises(CheckpointError, match=r"data\.params\.digits: \[1, 2\] -> \[1, 3\]\)"):
        check_config(old, cfg, "r")


@pytest.mark.parametrize(
    ("edit", "accepted"),
    [
        (lambda s: s.pop("learner.lora.r"), True),  # of an older version; the default is in force
        (lambda s: s.update({"learner.magic": 1}), False),  # of a newer one, which used it
        (lambda s: s.update({"learner.magic": None}), True),
    ],
)
def test_checkpoints_of_other_versions(edit: Callable[[dict], object], accepted: bool) -> None:
    cfg = load_config("tiny")
    state = saved_of(cfg)
    edit(state)
    if accepted:
        assert check_config(state, cfg, "r") == []
    else:
        with pytest.raises(CheckpointError, match=r"learner\.magic: 1 -> None"):
            check_config(state, cfg, "r")


FREE = [
    "steps",
    "threads",
    "save_every",
    "keep_last",
    "save_trees",
    "watchdog_s",
    "model.offline",
    "data.train",
    "data.eval",
    "rollout.kv_tokens",
    "tools.workers",
    "tools.timeout_s",
    "reward.workers",
    "reward.timeout_s",
    "learner.max_nonfinite",
    "eval.questions",
    "eval.every",
    "eval.temperature",
]
ROUNDING = [
    "rollout.max_batch",
    "rollout.prefill_chunk",
    "learner.token_budget",
    "learner.zero_stage",
    "learner.offload",
    "learner.gradient_checkpointing",
    "learner.head_backend",
]
HIDDEN = ["output", "resume", "recipe"]


def test_the_marks_of_the_keys() -> None:
    """Which keys a resumed run may change, by name: a mark that moves or a key that gets one shows here."""
    marks = resume_marks(Config)
    found = {mark: [k for k, m in marks.items() if m is mark] for mark in Resume}
    assert found[Resume.FREE] == FREE and found[Resume.ROUNDING] == ROUNDING
    assert found[Resume.HIDDEN] == HIDDEN
    assert [k for k in flatten(Config()) if not k.startswith("data.params.")] == [
        k for k in marks if k != "data.params"
    ]


def test_values_and_order() -> None:
    now = {"a": 1, "b": [1, 2]}
    assert [str(c) for c in changed({"a": 2, "b": [1, 2], "z": 3}, now)] == [
        "a: 2 -> 1",
        "z: 3 -> None",
    ]
