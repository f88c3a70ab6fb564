"""Configuration: every mistake is one paragraph that names field, value and fix."""

import pytest
import yaml

from appo.algo.resolve import resolve
from appo.config import dump, load_config, recipe_names
from appo.errors import ConfigError
from appo.run.session import check_pool


def test_dump_reads_back_to_the_same_configuration(tmp_path):
    cfg = load_config("quickstart", ["steps=3", "learner.lr=1e-5", "data.params={digits: 3}"])
    (tmp_path / "quickstart.yaml").write_text(dump(cfg))
    assert load_config(str(tmp_path / "quickstart.yaml")) == cfg
    assert cfg.learner.lr == 1e-5  # YAML 1.1 alone would read a string


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_resolves(name):
    algo = resolve(load_config(name).algo)
    assert algo.rollouts == algo.roots * (algo.branches + 1)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("learner.lrr=1", ["learner.lrr", "command line", "did you mean learner.lr"]),
        ("steps=many", ["steps='many'", "expected int"]),
        ("steps=0", ["steps is 0", "greater than 0"]),
        ("steps=2.5", ["steps=2.5", "expected int"]),
        ("algo.variant=papr", ["papr", "paper, released", "did you mean 'paper'"]),
        ("algo.rollouts=9", ["9", "algo.roots"]),
        ("rollout=3", ["rollout", "group of keys"]),
        ("rollout.temperature=0", ["rollout.temperature is 0", "greedy"]),
        ("rollout.top_p=0.9", ["rollout.top_p=0.9", "full distribution"]),
        ("staleness=-1", ["staleness is -1", "must not be negative"]),
        ("learner.importance_cap=0.5", ["learner.importance_cap is 0.5", "1 or more"]),
        ("learner.old_logprobs=engin", ["engin", "did you mean 'engine'"]),
        ("rollout.kv_tokens=0", ["rollout.kv_tokens is 0", "rollout.max_new_tokens"]),
        ("rollout.kv_tokens=many", ["rollout.kv_tokens='many'", "int"]),
        ("minibatches=3", ["prompts_per_step", "minibatches=3"]),
        ("tools.enabled=python", ["tools.enabled", "expected a list"]),
        ("=3", ["key=value"]),
    ],
)
def test_bad_overrides_name_field_value_and_fix(override, words):
    with pytest.raises(ConfigError) as e:
        load_config("quickstart", [override])
    for word in words:
        assert word in str(e.value)
    assert e.value.exit_code == 2


def test_unknown_key_in_a_file_names_its_line(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("steps: 3\nlearner:\n  lr: 1e-5\n  warmup: 3\n")
    with pytest.raises(ConfigError, match=rf"learner.warmup.*{path}:4.*warmup_steps"):
        load_config(str(path))


def test_unknown_recipe_suggests_a_name():
    with pytest.raises(ConfigError, match="did you mean 'quickstart'"):
        load_config("quikstart")
    with pytest.raises(ConfigError, match="does not exist"):
        load_config("no/such.yaml")


def test_switching_the_algorithm_keeps_the_rollouts_of_the_recipe():
    appo = resolve(load_config("quickstart").algo)
    grpo = resolve(load_config("quickstart", ["algo=grpo"]).algo)
    assert appo.rollouts == grpo.rollouts and not grpo.has_branches and grpo.roots == grpo.rollouts


@pytest.mark.parametrize(
    ("given", "roots", "branches"),
    [
        ({"rollouts": 16}, 4, 3),
        ({"rollouts": 16, "roots": 8}, 8, 1),
        ({"roots": 2, "branches": 7}, 2, 7),
    ],
)
def test_batch_arithmetic(given, roots, branches):
    overrides = [f"algo.{k}={v}" for k, v in given.items()]
    cfg = load_config("quickstart", ["algo=grpo", "algo=appo", "algo.rollouts=null", *overrides])
    algo = resolve(cfg.algo)
    assert (algo.roots, algo.branches) == (roots, branches)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["algo.name=gropo"], "did you mean 'grpo'"),
        (["algo=grpo", "algo.branches=2"], "independent rollouts"),
        (["algo.variant=released"], "no training preset"),
        (["algo.dual_clip=0.5"], "greater than 1"),
        (["algo=appo", "algo.roots=1", "algo.branches=7", "algo.rollouts=8"], "at least 2 roots"),
    ],
)
def test_bad_algorithms(given, words):
    with pytest.raises(ConfigError, match=words):
        resolve(load_config("quickstart", given).algo)


def test_order_of_overrides_loses_nothing():
    cfg = load_config(
        "quickstart",
        [
            "algo.clip_high=0.5",
            "data.params.digits=1",
            "algo=grpo",
            "data.task=reasoning_gym:chain_sum",
        ],
    )
    assert (
        cfg.algo.name == "grpo" and cfg.algo.clip_high == 0.5 and cfg.data.params == {"digits": 1}
    )


def test_a_resumed_run_starts_from_its_own_configuration(tmp_path):
    cfg = load_config("tiny", ["learner.lr=3e-4", "algo=grpo"])
    (tmp_path / "config.yaml").write_text(dump(cfg))
    again = load_config("tiny", [f"resume={tmp_path}", "steps=30"])
    assert again.learner.lr == 3e-4 and again.algo.name == "grpo" and again.steps == 30


@pytest.mark.parametrize(
    "given",
    [["algo=grpo", "algo.credit=mean"], ["algo=grpo", "algo.branch_by=random"], ["algo=grpo", "algo.train_branches=true"],
     ["algo=grpo", "algo.half_life=8"], ["algo.branch_by=entropy", "algo.score_clip=0.1"]],
)  # fmt: skip
def test_a_key_without_effect_is_refused(given):
    with pytest.raises(ConfigError, match="has no effect"):
        resolve(load_config("quickstart", given).algo)


def test_dual_clip_can_be_switched_off():
    assert resolve(load_config("quickstart", ["algo=grpo"]).algo).dual_clip == 3.0
    assert (
        resolve(load_config("quickstart", ["algo=grpo", "algo.dual_clip=0"]).algo).dual_clip is None
    )


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("learner.betas=[0.9]", "two numbers"),
        ("tools.python.wall_s=20", "timeout_s"),
        ("learner.zero_stage=0", "stage 1"),
        ("learner.offload=all", "needs learner.zero_stage=3"),
    ],
)
def test_contradictions_are_found_early(override, words):
    with pytest.raises(ConfigError, match=words):
        load_config("quickstart", [override])


def test_roots_in_advance_need_the_native_engine():
    assert load_config("quickstart", ["learner.importance_cap=null"]).learner.importance_cap is None
    with pytest.raises(ConfigError, match="staleness is 2 and rollout.engine is vllm"):
        load_config("quickstart", ["staleness=2", "rollout.engine=vllm"])


@pytest.mark.parametrize("engine", ["native", "vllm"])
def test_kv_tokens_hold_for_both_engines(engine):
    cfg = load_config("quickstart", ["rollout.kv_tokens=20000", f"rollout.engine={engine}"])
    assert cfg.rollout.kv_tokens == 20000


def test_save_trees_is_a_number_or_all():
    assert load_config("tiny").save_trees == 2
    assert load_config("tiny", ["save_trees=0"]).save_trees == 0
    cfg = load_config("tiny", ["save_trees=all"])
    assert cfg.save_trees == "all"
    assert yaml.safe_load(dump(cfg))["save_trees"] == "all"
    with pytest.raises(ConfigError, match="save_trees='every'.*expected int, got str, or 'all'"):
        load_config("tiny", ["save_trees=every"])
    with pytest.raises(ConfigError, match="save_trees is -1"):
        load_config("tiny", ["save_trees=-1"])


def test_a_rollout_with_prompt_and_tool_results_fits_the_pool():
    """2 results of up to 256 characters and 13 tokens around each; three blocks may be half empty."""
    given = ["rollout.max_new_tokens=100", "rollout.max_tool_calls=2", "tools.python.max_chars=256"]

    def check(kv_tokens, prompt=50, context=4096, more=()):
        cfg = load_config("quickstart", [*given, f"rollout.kv_tokens={kv_tokens}", *more])
        check_pool(cfg, prompt, 13, context)

    need = 16 * (-(-(50 + 100 + 2 * (256 + 13)) // 16) + 3)
    check(need)
    check("null", prompt=10**6)
    check(288, context=240)
    check(208, more=["tools.enabled=[]"])
    with pytest.raises(ConfigError, match=f"kv_tokens is {need - 1}, but .* need {need}"):
        check(need - 1)
    with pytest.raises(ConfigError, match="kv_tokens=1.* or more, or lower tools.python.max_chars"):
        check(need, prompt=500)
