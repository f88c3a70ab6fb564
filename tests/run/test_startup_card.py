"""The start-up card says how work is dealt over ranks, and warns where it cannot be dealt evenly."""

import dataclasses

import pytest

from appo.config import load_config
from appo.dist.ranks import Ranks
from appo.observability.progress import Console
from appo.run.plan import plan, usable_cores
from appo.run.startup_card import card_rows, card_warnings


@pytest.fixture
def planned(tmp_path):
    def make(*overrides, ranks=1, **kwargs):
        cfg = load_config("tiny", [f"output={tmp_path}/run", *overrides])
        p = plan(cfg, Console(quiet=True), **kwargs)
        return dataclasses.replace(p, ranks=ranks, machine_ranks=ranks)

    return make


def text(p):
    return {title: " ".join(value.split()) for title, value in card_rows(p)}


def test_one_rank_has_no_row_of_its_own(planned):
    p = planned()
    assert "ranks" not in text(p) and not any("ranks" in w for w in card_warnings(p))


def test_prompts_that_divide_are_dealt_without_a_warning(planned):
    p = planned("prompts_per_step=8", "minibatches=2", ranks=2)
    assert text(p)["ranks"].startswith("2, 2 on this machine; 2 of the 4 prompts of a mini-batch")
    assert text(p)["threads"].endswith("per rank") and not any("ranks" in w for w in card_warnings(p))  # fmt: skip


def test_prompts_that_do_not_divide_are_a_warning_with_the_next_number_that_does(planned):
    p = planned("prompts_per_step=10", "minibatches=2", ranks=4)
    assert "1 or 2 of the 5 prompts" in text(p)["ranks"]
    (warning,) = [w for w in card_warnings(p) if "ranks" in w]
    assert "5 prompts per mini-batch" in warning and "prompts_per_step=16" in warning


def test_ranks_of_a_machine_share_its_cores(planned):
    ranks = Ranks()
    assert planned(ranks=1).threads == usable_cores()
    ranks.local_world = 2 * usable_cores()  # more ranks than cores
    cfg = planned().cfg
    assert plan(cfg, Console(quiet=True), ranks=ranks).threads == 1
    cfg.threads = 3
    assert plan(cfg, Console(quiet=True), ranks=ranks).threads == 3
