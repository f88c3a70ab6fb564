"""The learner's settings: one set of checks, for recipes and for programs that make a `Learner`
themselves.
"""

import pytest

from appo.config import LearnerConfig, RunContext, check_learner, load_config, run_context
from appo.errors import ConfigError


def test_what_a_recipe_says_reaches_the_learner():
    cfg = load_config("tiny", ["steps=7", "rollout.temperature=0.9"])
    context = run_context(cfg, threads=2, dump_dir="runs/x")
    assert context == RunContext("float32", 0.9, 14, 2, "runs/x")


def test_no_clipping_can_be_set():
    assert load_config("tiny", ["learner.max_grad_norm=0"]).learner.max_grad_norm == 0
    with pytest.raises(ConfigError, match=r"learner.max_grad_norm is -0.5"):
        load_config("tiny", ["learner.max_grad_norm=-0.5"])


@pytest.mark.parametrize(
    ("change", "context", "words"),
    [
        ({"mode": "qlora"}, {}, r"learner.mode='qlora' \(in LearnerConfig\): must be one of lora"),
        ({"lr": "fast"}, {}, "learner.lr='fast'.*expected float"),
        ({}, {"dtype": "float16"}, r"dtype='float16' \(in RunContext\)"),
        ({}, {"temperature": 0.0}, "temperature is 0.0, but must be greater than 0"),
        ({"schedule": "linear"}, {}, "the run has .* = 0 updates"),
        ({"zero_stage": 0}, {}, "stage 0 keeps no float32 master weights"),
    ],
)
def test_a_learner_made_by_hand_is_checked_alike(change, context, words):
    with pytest.raises(ConfigError, match=words):
        check_learner(LearnerConfig(**change), RunContext(**context))


def test_warm_up_is_shorter_than_the_run():
    with pytest.raises(ConfigError, match="warmup_steps is 60.* = 60 updates"):
        load_config("tiny", ["learner.warmup_steps=60"])
    assert load_config("tiny", ["learner.warmup_steps=59"]).learner.warmup_steps == 59
