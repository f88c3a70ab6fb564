"""RootPrefetcher drawn beside the learner: the same whatever is slow, in checkpoints, on any number of ranks, and never hanging."""

import json
import threading
import time
from types import SimpleNamespace

import pytest
import torch
from support.trainer_parts import (
    MINIBATCHES,
    SIZE,
    FixedLearner,
    SlowEngine,
    batch_of,
    make_trainer,
    run_steps,
)

from appo._kernels.common import native
from appo.errors import CheckpointError, DataError
from appo.observability.codec import tree_to_json
from appo.observability.metrics import strip_times
from appo.trainer.prefetch import shard_prompts, split_threads
from appo.trainer.step_metrics import MetricSums, StepMetrics, count_branches, count_trees
from appo.types import Task

STEPS = 4


def record(results):
    """All that may not depend on the clock."""
    trees = [[tree_to_json(t) for t in r.trees] for r in results]
    return trees, [strip_times(r.metrics) for r in results], [r.plans for r in results]


def threads_left():
    return [t for t in threading.enumerate() if t.name == "appo-roots"]


@pytest.mark.parametrize("staleness", [1, 2])
def test_results_do_not_depend_on_what_is_slow(staleness):
    def run(engine_sleeps, learner_sleeps):
        learner = FixedLearner(lambda: time.sleep(learner_sleeps))
        trainer = make_trainer(
            engine=SlowEngine(engine_sleeps), learner=learner, staleness=staleness
        )
        return record(run_steps(trainer, range(1, STEPS + 1), STEPS))

    quick = run(0, 0)
    assert run(0.002, 0) == quick and run(0, 0.05) == quick
    assert not threads_left()


@pytest.mark.parametrize("staleness", [0, 1, 3])
def test_roots_are_as_old_as_said_and_branches_are_new(staleness):
    """Every mini-batch updates here, so versions can be counted: root versions follow from step and mini-batch alone."""
    trainer = make_trainer(staleness=staleness)
    results = run_steps(trainer, range(1, STEPS + 1), STEPS)
    assert trainer.version == STEPS * MINIBATCHES and not trainer.roots.waiting
    for number, result in enumerate(results, 1):
        assert result.index == list(range(SIZE))
        for tree, k in zip(result.trees, result.minibatch, strict=True):
            now = (number - 1) * MINIBATCHES + k
            drawn = now - k if not staleness else max(0, now - staleness * MINIBATCHES)
            assert tree.step == number
            for i, leaf in enumerate(tree.leaves):
                view = tree.trajectory(i)
                own = view.version[leaf.split or 0 :]
                want = drawn if leaf.is_root else now
                assert set(own[own >= 0].tolist()) <= {want}, (number, k, leaf)
        flat = result.metrics["branch/omega_uninformative"]
        moved = staleness and number > 1  # else mini-batch 0 is trained by the weights that drew it
        assert flat < 0.2 if moved else flat >= 1 / MINIBATCHES
        ages = [max(0, min(staleness * MINIBATCHES, (number - 1) * MINIBATCHES + k)) if staleness else k
                for k in range(MINIBATCHES)]  # fmt: skip
        assert result.metrics["policy/staleness"] == pytest.approx(sum(ages) / MINIBATCHES)


def test_roots_are_the_same_with_and_without_staleness_while_no_weight_has_moved():
    strict = run_steps(make_trainer(), [1], 1)[0]
    ahead = run_steps(make_trainer(staleness=2), [1], 3)[0]
    roots = lambda r: [[t.trajectory(i).token_ids.tolist() for i in t.roots] for t in r.trees]  # noqa: E731
    assert roots(strict) == roots(ahead)


@pytest.mark.parametrize("staleness", [1, 2])
@pytest.mark.parametrize("rescore", [False, True])
def test_a_restored_queue_goes_on_as_if_nothing_had_happened(staleness, rescore, tmp_path):
    settings = dict(staleness=staleness, score_references=rescore)
    whole = run_steps(make_trainer(**settings), range(1, STEPS + 1), STEPS)

    first = make_trainer(**settings)
    run_steps(first, [1, 2], STEPS)
    first.save_roots(tmp_path)
    again = make_trainer(**settings)
    again.version = first.version
    again.sampler.engine.load_weights([], first.version)
    again.restore_roots(tmp_path)
    assert again.missing(3, STEPS) == [] and sorted(again.roots.waiting) == sorted(
        first.roots.waiting
    )
    tree_rollouts = [
        g for parts in again.roots.waiting.values() for p in parts for g in p.tree_rollouts
    ]
    assert all(bool(g.reference_logp) == rescore for g in tree_rollouts)
    rest = run_steps(again, [3, 4], STEPS)
    assert record(rest) == record(whole[2:])


def test_a_queue_is_dealt_again_to_another_number_of_ranks(tmp_path):
    ranks = lambda r, world: SimpleNamespace(rank=r, world=world)  # noqa: E731
    one = make_trainer(staleness=1)
    run_steps(one, [1], STEPS)
    one.save_roots(tmp_path / "one")
    want = [[g.tree.task.task_id for g in part.tree_rollouts] for part in one.roots.waiting[2]]

    for r in range(2):
        half = make_trainer(staleness=1)
        half.roots.restore(tmp_path / "one", ranks(r, 2))
        got = [[g.tree.task.task_id for g in part.tree_rollouts] for part in half.roots.waiting[2]]
        assert got == [names[r::2] for names in want]
        half.roots.save(tmp_path / "two", r)
    back = make_trainer(staleness=1)
    back.roots.restore(tmp_path / "two", ranks(0, 1))
    assert [[g.tree.task.task_id for g in p.tree_rollouts] for p in back.roots.waiting[2]] == want
    assert [[p.index for p in part.prompts] for part in back.roots.waiting[2]] == [[0, 1], [2, 3]]


def test_a_damaged_queue_and_a_task_that_json_cannot_say_are_refused(tmp_path):
    (tmp_path / "roots_rank0.jsonl").write_text('{"steps": [2]}\n{"step"')
    with pytest.raises(CheckpointError, match="roots_rank0"):
        make_trainer(staleness=1).restore_roots(tmp_path)
    trainer = make_trainer(staleness=1)
    trainer.prefetch(1, [Task("odd", [], object())] * SIZE, [[10]] * SIZE)
    with pytest.raises(DataError, match="task 'odd'"):
        trainer.save_roots(tmp_path)


def broken_when_slow(engine):
    step = engine.step

    def broken():
        if engine.sleep:
            raise RuntimeError("the engine broke")
        return step()

    return broken


@pytest.mark.timeout(60)
def test_what_fails_on_the_thread_ends_the_step_with_that():
    engine = SlowEngine()
    trainer = make_trainer(engine=engine, staleness=1)
    run_steps(trainer, [1], STEPS)
    version = trainer.version
    trainer.learner.during = lambda: setattr(engine, "sleep", 0.01)
    engine.step = broken_when_slow(engine)
    with pytest.raises(RuntimeError, match="the engine broke"):
        run_steps(trainer, [2], STEPS)
    assert trainer.version == version and engine.policy_version == version  # nothing was pushed
    assert not threads_left()


@pytest.mark.timeout(60)
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_what_fails_beside_the_thread_ends_it_soon(error):
    engine, stopped = SlowEngine(), []

    def stop():
        engine.sleep = 0.3  # the drawing would take many seconds
        stopped.append(time.monotonic())
        raise error("enough")

    trainer = make_trainer(engine=engine, learner=FixedLearner(stop), staleness=1)
    with pytest.raises(error, match="enough"):
        run_steps(trainer, [1], STEPS)
    assert time.monotonic() - stopped[0] < 8 and not threads_left()


@pytest.mark.timeout(60)
def test_ctrl_c_while_waiting_for_the_thread(monkeypatch):
    engine = SlowEngine()
    trainer = make_trainer(engine=engine, staleness=1)
    trainer.learner.during = lambda: setattr(engine, "sleep", 0.3)

    def on_phase(name, done, total):
        if engine.sleep and name == "rollout":
            raise KeyboardInterrupt

    trainer.on_phase = on_phase
    with pytest.raises(KeyboardInterrupt):
        run_steps(trainer, [1], STEPS)
    assert not threads_left()


def test_threads_are_shared_and_given_back():
    seen = []
    before = torch.get_num_threads()
    trainer = make_trainer(staleness=1, threads=4)
    trainer.learner.during = lambda: seen.append(torch.get_num_threads())
    step = trainer.sampler.engine.step

    def look():
        if threading.current_thread().name == "appo-roots":
            seen.append(torch.get_num_threads())
        return step()

    trainer.sampler.engine.step = look
    run_steps(trainer, [1], 2)
    assert set(seen) == {2} and torch.get_num_threads() == before
    assert split_threads(1, True) == (1, 1) and split_threads(5, True) == (3, 2)
    assert split_threads(8, False) == (8, 8)


def test_native_calls_let_other_threads_run():
    """Learner and engine spend their time in native code: with Python's lock held they would take turns."""
    if native.load()[0] is None:
        pytest.skip("no native library")
    assert all(native.function(name).release_gil for name in ("policy_loss", "segment_attention"))


# -- dealing and metrics over ranks ----------------------------------------------------------------


@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_dealing_covers_every_prompt_once_and_counts_copies_over_all_ranks(world):
    tasks, prompts = batch_of(1)
    tasks[3] = tasks[0]
    shares = [shard_prompts(tasks, prompts, MINIBATCHES, SimpleNamespace(rank=r, world=world)) for r in range(world)]  # fmt: skip
    for k in range(MINIBATCHES):
        dealt = sorted((p.index, p.copy) for share in shares for p in share[k])
        assert dealt == [(0, 0), (1, 0)] if k == 0 else dealt == [(2, 0), (3, 1)]


class TwoRanks:
    """Reduces up with what the other rank says."""

    def __init__(self, other):
        self.other = other

    def sum(self, values):
        return {k: values.get(k, 0) + self.other[0].get(k, 0) for k in {**values, **self.other[0]}}

    def reduce(self, values, how):
        assert how == "max"
        both = [values, self.other[1]]
        return {k: max(v[k] for v in both if k in v) for k in {**both[0], **both[1]}}


class Heard:
    def __init__(self):
        self.said = []

    def sum(self, values):
        self.said.append(dict(values))
        return dict(values)

    def reduce(self, values, how):
        return self.sum(values)


def tally_of(trees, plans, seconds):
    sums = MetricSums()
    count_trees(sums, trees)
    count_branches(sums, plans, by_score=True)
    sums.most("time/x", seconds)
    return sums


def test_metrics_of_two_ranks_are_those_of_one():
    result = run_steps(make_trainer(), [1], 1)[0]
    alone = tally_of(result.trees, result.plans, 2.0).over(Heard())
    for cut in (0, 1, 3):  # a rank may have had nothing at all
        heard = Heard()
        tally_of(result.trees[cut:], result.plans[cut:], 2.0).over(heard)
        both = tally_of(result.trees[:cut], result.plans[:cut], 1.0).over(TwoRanks(heard.said))
        assert both == pytest.approx(alone, rel=1e-12)
    trees = [leaf.reward for t in result.trees for leaf in t.leaves]
    mean = sum(trees) / len(trees)
    assert alone["reward/std"] == pytest.approx((mean - mean**2) ** 0.5)  # rewards are 0 and 1
    assert {"reward/mean", "tool/use", "tokens/unique", "branch/omega_uninformative"} <= set(alone)


def test_what_the_learner_says_is_over_all_ranks_already():
    log = StepMetrics()
    log.learned = [{"learner/loss": 1.0, "learner/empty": 1.0, "learner/lr": 0.5},
                   {"learner/loss": 3.0, "learner/empty": 1.0, "learner/lr": 0.25}]  # fmt: skip
    log.pushed = [{"push/crc32": 7.0, "push/probe_max": 1.0}, {"push/crc32": 8.0, "push/probe_max": 2.0}]  # fmt: skip
    other = ({}, {"push/crc32": 8.0, "push/probe_max": 3.0, "time/learn": 9.0})
    out = log.finish(TwoRanks(other))
    assert out["learner/loss"] == 2.0 and out["learner/empty"] == 2.0 and out["learner/lr"] == 0.25
    assert out["push/crc32"] == 8.0 and out["push/probe_max"] == 3.0 and out["time/learn"] == 9.0
    assert json.dumps(out)
