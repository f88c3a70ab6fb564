"""Presets: what a name resolves to, the mirror of their fields in the configuration, and algorithms
of one's own.
"""

import dataclasses
import sys
import typing

import pytest

from appo.algo.algorithm import Algorithm
from appo.algo.presets import ALGORITHMS
from appo.algo.resolve import KEYS, find, resolve
from appo.config import AlgoConfig, load_config
from appo.errors import ConfigError

NOT_FOR_USERS = {"advantage", "advantage_keys", "fewest_roots", "future_clip"}


def test_every_field_of_an_algorithm_is_a_key_of_the_same_type_or_null():
    """`AlgoConfig` is written out for type checkers; here it is held equal to `Algorithm`."""
    fields = {f.name for f in dataclasses.fields(Algorithm)}
    keys = {f.name for f in dataclasses.fields(AlgoConfig)}
    assert fields - keys == NOT_FOR_USERS and keys - fields == {"variant", "rollouts"}
    theirs, ours = typing.get_type_hints(AlgoConfig), typing.get_type_hints(Algorithm)
    for key in KEYS - {"name"}:
        assert theirs[key] == ours[key] | None, key
    defaults = AlgoConfig()
    assert all(getattr(defaults, key) is None for key in KEYS - {"name"})


@pytest.mark.parametrize("name", ALGORITHMS)
def test_a_preset_is_what_its_name_resolves_to(name):
    assert resolve(AlgoConfig(name=name)) == ALGORITHMS[name]
    assert ALGORITHMS[name].name == name


OWN = """
from appo.algo.algorithm import Algorithm
from appo.algo.credit import reward_of, token_credit

def rule(tree, graded, algo):
    return [token_credit(i, tree.trajectory(i), reward_of(tree, i)) for i in graded]

MINE = Algorithm("mine", rule, roots=6, aggregate="seq-mean-token-mean", train_branches=False)
BAD_NAME = Algorithm("a/b", rule)
BAD_MEAN = Algorithm("mine", rule, aggregate="mean")
BAD_CLIP = Algorithm("mine", rule, clip_low=2.0)
BAD_RULE = Algorithm("mine", lambda tree: [])
NUMBER = 3

def make():
    return Algorithm("made", rule, branches=1, advantage_keys=("train_branches",), train_branches=True)

def wrong():
    return "grpo"

def breaks():
    raise RuntimeError("no luck")

def breaks_later():
    return Algorithm("made", None)
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    (tmp_path / "own_algo_for_tests.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield "own_algo_for_tests:"
    sys.modules.pop("own_algo_for_tests", None)


def test_an_algorithm_of_ones_own_takes_the_keys_of_a_built_in_one(own):
    cfg = load_config("tiny", [f"algo={own}MINE", "algo.clip_high=0.5"])
    algo = resolve(cfg.algo)
    assert (algo.name, algo.rollouts, algo.clip_high) == ("mine", 16, 0.5)  # 16 of the recipe
    assert algo.advantage is find(own + "MINE").advantage
    with pytest.raises(ConfigError, match=r"algo.credit has no effect on mine"):
        resolve(AlgoConfig(own + "MINE", credit="mean"))
    with pytest.raises(ConfigError, match=r"algo.branches=2: mine samples independent rollouts"):
        resolve(AlgoConfig(own + "MINE", branches=2))


def test_a_function_that_makes_one_will_do(own):
    algo = resolve(AlgoConfig(own + "make"))
    assert algo.name == "made" and algo.train_branches and algo.rollouts == 32
    assert not resolve(AlgoConfig(own + "make", train_branches=False)).train_branches


@pytest.mark.parametrize(
    ("attribute", "words"),
    [
        ("MINF", r"has no attribute 'MINF', did you mean 'MINE'.*expected: an appo.algo.algorithm.Algorithm"),
        ("NUMBER", "is of type int.*expected: an appo.algo.algorithm.Algorithm, or a function"),
        ("rule", r"has the signature \(tree, graded, algo\).*expected: an appo.algo"),
        ("wrong", "returned a str; expected"),
        ("breaks", "RuntimeError: no luck"),
        ("breaks_later", "what it returned is an Algorithm whose advantage"),
        ("BAD_RULE", r"advantage\(tree, graded, algo\) has the signature \(tree\)"),
        ("BAD_NAME", "name is 'a/b'"),
        ("BAD_MEAN", r"algo.aggregate='mean' \(of mine\): must be one of token-mean"),
        ("BAD_CLIP", "algo.clip_low=2.0: must be between"),
    ],
)  # fmt: skip
def test_what_is_no_algorithm_is_refused(own, attribute, words):
    with pytest.raises(ConfigError, match=words):
        resolve(AlgoConfig(own + attribute))
