"""The workload of bench/engine/rollout.py: its shape, and that our engine runs no row more than the formula of the tree."""

from __future__ import annotations

import itertools
from importlib import import_module

import pytest

from appo.models.resolve import TINY
from appo.rollout.native import NativeEngine

MODULES = ("workload", "grow", "serve", "peer_ours")


@pytest.fixture(scope="module")
def peers():
    """The modules `workload`, `grow`, `serve` and `peer_ours` of bench/peers/rollout."""
    return [import_module(f"bench.peers.rollout.{name}") for name in MODULES]


SHAPES = [
    {"prompt": 1},
    {"prompt": 33, "roots": 1, "branches": 0},
    {"prompt": 64, "roots": 3, "branches": 2, "new": 7, "result": 5},
    {"prompt": 17, "roots": 2, "branches": 4, "new": 40, "result": 1},
]


@pytest.mark.parametrize("shape", SHAPES)
def test_rows_are_those_of_the_realised_tree(peers, shape):
    workload, grow, _, ours = peers
    work = workload.Workload(**{"new": 12, "wait_s": 0.0, "vocab": 300} | shape)
    engine = NativeEngine(TINY, dtype="float32", share_prompts=False)
    backend = ours.Ours(engine)
    drawn = grow.grow(backend, work)
    assert backend.rows == work.needed_rows()
    assert [len(d.tokens) for d in drawn] == [line.new for line in work.rollouts()]
    assert engine.stats()["kv_tokens"] == 0
    assert engine.stats()["live_sequences"] == 0


def test_branches_draw_anew_what_the_root_drew(peers):
    """Forks fall on drawn tokens, never inside a tool's result and never on the first token."""
    workload = peers[0]
    for new, result in itertools.product((2, 9, 64), (0, 1, 20)):
        work = workload.Workload(prompt=30, roots=4, branches=5, new=new, result=result)
        lines = work.rollouts()
        for line in lines[work.roots :]:
            root = lines[line.parent]
            first = work.prompt + root.cut
            results = range(first, first + len(root.result)) if root.cut else ()
            assert work.prompt < line.at < work.prompt + root.new + len(root.result)
            assert line.at not in results


def test_a_round_changes_ids_and_nothing_else(peers):
    workload = peers[0]
    a, b = workload.Workload(round=1), workload.Workload(round=2)
    assert a.prompt_ids() != b.prompt_ids()
    assert [(r.parent, r.at, r.parts) for r in a.rollouts()] == [
        (r.parent, r.at, r.parts) for r in b.rollouts()
    ]
    assert a.needed_rows() == b.needed_rows() == 511 + 16 * 256 + 8 * 20


def test_a_tool_is_waited_for(peers):
    """The wait passes although nothing else is left to run, and what came back is in the context."""
    workload, grow, _, ours = peers
    work = workload.Workload(prompt=8, roots=1, branches=0, new=6, result=3, wait_s=0.05, vocab=300)
    backend = ours.Ours(NativeEngine(TINY, dtype="float32"))
    growing = grow.Growing(backend, work)
    begin = grow.time.perf_counter()
    grow.grow_alive(growing)
    assert grow.time.perf_counter() - begin >= 0.05
    line = work.rollouts()[0]
    tokens = backend.engine.tokens(growing.seq_of[0])
    assert tokens[8 + line.cut : 8 + line.cut + 3] == list(line.result)


def test_a_fork_costs_one_row(peers):
    workload, grow, _, ours = peers
    backend = ours.Ours(NativeEngine(TINY, dtype="float32"))
    trunk = grow.Trunk(backend, workload.Workload(prompt=50, vocab=300).prompt_ids())
    for _ in range(3):
        fork = trunk.fork()
        assert fork.rows == 1
        assert 0 < fork.call_us / 1e3 <= fork.first_ms
    trunk.release()
    assert backend.engine.stats()["live_sequences"] == 0
