"""Growing trees on a scripted engine: nodes, budgets, forks and seeds are exactly what the protocol
says.
"""

import numpy as np
import pytest
from support.fakes import EOS, ByteTokenizer, InstantPool, ScriptedEngine

from appo.algo.presets import ALGORITHMS
from appo.errors import PoolTooSmallError
from appo.rollout.agent import AgentSettings
from appo.rollout.grade import spans_of
from appo.rollout.sampler import Rollouts
from appo.rollout.tags import TokenText
from appo.types import Finish, Leaf, Node, RolloutTree, Task

TEXT = TokenText(ByteTokenizer())
TASK = Task("t0", [{"role": "user", "content": "q"}], "1", ("python",))
PROMPT = list(b"question? ")


def say(*turns):
    """A script that says turn k after k results; the seed picks a letter that makes lines differ."""

    def script(ids, seed):
        own = bytes(i for i in ids[len(PROMPT) :] if i < 256)
        done = own.count(b"</result>")
        turn = turns[min(done, len(turns) - 1)].replace("?", chr(97 + seed % 26))
        at = len(own.rsplit(b"</result>\n", 1)[-1])
        return EOS if at >= len(turn) else turn.encode()[at]

    return script


def grow(script, algo=None, roots=2, *, calls=2, new=200, version=None, context=4096):
    engine, pool = ScriptedEngine(script, context), InstantPool()
    settings = AgentSettings(max_new_tokens=new, max_tool_calls=calls, tools=("python",))
    r = Rollouts(engine, TEXT, pool, settings, run_seed=7)
    g = r.start(TASK, PROMPT, roots, step=3)
    r.run()
    if version is not None:
        engine.load_weights([], version)
    plan = r.grow_branches([g], algo)[0] if algo else r.release(g)
    r.run()
    (tree,) = r.finish([g])
    return tree, engine, pool, plan


def test_a_tool_call_becomes_three_nodes_and_only_sampled_tokens_are_masked_in():
    tree, engine, pool, _ = grow(say("hm ? <python>1+1</python>", "so <answer>2</answer>"))
    leaf = tree.leaves[0]
    assert [n.role for n, _ in tree.walk(leaf.node)] == ["prompt", "model", "tool", "model"]
    assert pool.calls == [("python", "1+1")] * 2 and leaf.tool_calls[0].output == "3"
    assert leaf.finish is Finish.ANSWER and not engine.seqs
    v = tree.trajectory(0)
    text = TEXT.text(v.response_ids.tolist())
    assert text.endswith("</python>\n<result>3</result>\nso <answer>2</answer>")
    tool = TEXT.text(v.response_ids[~v.mask].tolist())
    assert tool == "\n<result>3</result>\n" and leaf.tool_calls[0].tokens == len(tool)
    assert (
        (v.logprobs[v.mask] < 0).all()
        and not v.logprobs[~v.mask].any()
        and (v.version[~v.mask] == -1).all()
    )


def test_roots_differ_by_seed_only():
    tree, *_ = grow(say("? <answer>1</answer>"), roots=3)
    texts = {TEXT.text(tree.trajectory(i).response_ids.tolist()) for i in range(3)}
    assert len(texts) == 3
    again, *_ = grow(say("? <answer>1</answer>"), roots=3)
    assert [n.token_ids for n in again.nodes] == [n.token_ids for n in tree.nodes]


def test_calls_beyond_the_budget_are_refused_in_the_context_and_counted():
    tree, _, pool, _ = grow(
        say("<python>1</python>", "<python>2</python>", "<answer>3</answer>"), roots=1, calls=1
    )
    assert pool.calls == [("python", "1")] and len(tree.leaves[0].tool_calls) == 1
    text = TEXT.text(tree.trajectory(0).response_ids.tolist())
    assert "no tool calls left" in text and text.endswith("<answer>3</answer>")
    assert tree.stats["over_budget_calls"] == 1


def test_length_limits_count_sampled_tokens_only():
    tree, *_ = grow(say("<python>1</python>", "x" * 999), roots=1, new=30)
    v = tree.trajectory(0)
    assert v.mask.sum() == 30 and tree.leaves[0].finish is Finish.LENGTH and len(v) > 30


def test_a_result_that_does_not_fit_the_context_ends_the_leaf():
    tree, *_ = grow(say("<python>1</python>", "x"), roots=1, context=len(PROMPT) + 20)
    assert tree.leaves[0].finish is Finish.LENGTH and len(tree.nodes) == 2


class SmallPool(ScriptedEngine):
    """Takes no sequence that may grow beyond `limit` tokens."""

    limit = len(PROMPT) + 60

    def submit(self, seq, params, seed):
        if len(self.seqs[seq].ids) + params.max_new_tokens > self.limit:
            raise PoolTooSmallError(f"submit(seq={seq}): raise kv_tokens")
        super().submit(seq, params, seed)


def test_a_result_that_does_not_fit_the_pool_ends_the_leaf(monkeypatch):
    """Just that one; a prompt that does not fit at all is the user's mistake."""
    monkeypatch.setitem(globals(), "ScriptedEngine", SmallPool)
    tree, engine, *_ = grow(say("<python>1</python>", "x"), roots=2, new=50)
    assert [leaf.finish for leaf in tree.leaves] == [Finish.LENGTH] * 2
    assert [node.role for node in tree.nodes].count("tool") == 2 and not engine.has_work()
    with pytest.raises(PoolTooSmallError, match="raise kv_tokens"):
        grow(say("x"), new=61)


@pytest.mark.parametrize("resample", ["at", "after"])
@pytest.mark.parametrize("version", [None, 5])
def test_branches_inherit_exactly_the_prefix(resample, version):
    from dataclasses import replace

    algo = replace(ALGORITHMS["appo"], roots=2, branches=4, resample=resample)
    script = say("ab ? cd <python>1+1</python>", "ef ? gh <answer>2</answer>")
    tree, engine, _pool, plan = grow(script, algo, roots=2, version=version)
    assert len(tree.branches) == len(plan.points) > 0 and not engine.seqs
    for point, i in zip(plan.points, tree.branches, strict=True):
        leaf, view = tree.leaves[i], tree.trajectory(i)
        root = tree.trajectory(leaf.parent_leaf)
        split = point.position + (resample == "after")
        assert leaf.split == split and leaf.root == point.root
        assert (
            view.token_ids[: view.prompt_len + split].tolist()
            == root.token_ids[: root.prompt_len + split].tolist()
        )
        assert np.array_equal(view.logprobs[:split], root.logprobs[:split])
        assert root.mask[point.position] and TEXT.drawable[root.response_ids[point.position]]
        calls_before = TEXT.text(root.response_ids[:split].tolist()).count("</result>")
        inherited = leaf.tool_calls[:calls_before]
        assert inherited == tree.leaves[leaf.parent_leaf].tool_calls[:calls_before]
        # The branch's own call is its own: the budget carries on from what the prefix has used.
        assert len(leaf.tool_calls) == 1 and leaf.finish is Finish.ANSWER
        drawn = view.version[split:][view.mask[split:]]
        assert (drawn == (version or 0)).all()
    assert all(plan.omega_uninformative) == (version is None)
    assert (engine.scored > 0) == (version is not None)


def test_a_branch_inside_a_tag_still_closes_it():
    algo = ALGORITHMS["appo"]
    engine, pool = ScriptedEngine(say("<python>1+1</python>", "<answer>2</answer>")), InstantPool()
    r = Rollouts(engine, TEXT, pool, AgentSettings(200, 2, tools=("python",)), run_seed=7)
    g = r.start(TASK, PROMPT, 1, step=0)
    r.run()
    from appo.algo.branching import BranchPoint

    for rank, position in enumerate([3, 9, 13]):
        r._fork(g, BranchPoint(0, position, 0.0, "strict", 0.0, 0.0), rank, algo)
    r.release(g)
    r.run()
    (tree,) = r.finish([g])
    assert pool.calls == [("python", "1+1")] * 4
    assert all(leaf.finish is Finish.ANSWER for leaf in tree.leaves)


def test_closing_tokens_and_blanks_are_never_branch_points():
    algo = ALGORITHMS["appo"]
    for seed in range(5):
        tree, *_ = grow(say("a b? c <python>1+1</python>", f"d e <answer>{seed}</answer>"), algo)
        for i in tree.branches:
            leaf = tree.leaves[i]
            ids = tree.trajectory(leaf.parent_leaf).response_ids
            before = TEXT.text(ids[: leaf.split + 1].tolist())
            assert not before.endswith(("</python>", "</answer>")) and ids[leaf.split] not in (
                *b" \n",
                EOS,
            )


def test_leaves_count_shared_tokens_once():
    tree, *_ = grow(say("ab ? cd <answer>2</answer>"), ALGORITHMS["appo"])
    assert tree.unique_tokens() < tree.total_tokens()
    assert tree.total_tokens() == sum(
        len(tree.trajectory(i).token_ids) for i in range(len(tree.leaves))
    )


def test_the_same_task_twice_in_a_step_draws_other_noise():
    engine = ScriptedEngine(say("? <answer>1</answer>"))
    r = Rollouts(engine, TEXT, InstantPool(), AgentSettings(99, 1, tools=("python",)), run_seed=7)
    tree_rollouts = [r.start(TASK, PROMPT, 1, step=3, copy=k) for k in (0, 1)]
    assert tree_rollouts[0].roots[0].seed != tree_rollouts[1].roots[0].seed


def test_omega_compares_two_scoring_passes_when_roots_were_remembered():
    """An engine whose decoding rounds: recorded log-probs differ from scored ones, the weights do
    not.
    """
    algo = ALGORITHMS["appo"]

    class Rounding(ScriptedEngine):
        def step(self):
            from dataclasses import replace

            return [
                replace(e, logprobs=[x + 0.02 * (-1) ** i for i, x in enumerate(e.logprobs)])
                for e in super().step()
            ]

        def load_weights(self, named_tensors, version):
            self.moved_to, self.policy_version = version, version

        def stat(self, prefix):  # the policy itself never moves
            version, self.policy_version = self.policy_version, 0
            try:
                return super().stat(prefix)
            finally:
                self.policy_version = version

    def plan(remember):
        engine = Rounding(say("ab ? cd <python>1+1</python>", "ef ? gh <answer>2</answer>"))
        r = Rollouts(
            engine, TEXT, InstantPool(), AgentSettings(200, 2, tools=("python",)), run_seed=7
        )
        g = r.start(TASK, PROMPT, 2, step=0)
        r.run()
        if remember:
            r.score_reference([g])
        engine.load_weights([], 1)
        return r.grow_branches([g], algo)[0]

    assert not any(plan(remember=False).omega_uninformative)  # rounding passes for information
    assert all(plan(remember=True).omega_uninformative)


def test_a_character_split_by_a_fork_is_read_whole():
    minus = list("\u2212".encode())
    tree = RolloutTree(
        TASK,
        [
            Node(None, "prompt", 0, PROMPT),
            Node(0, "model", len(PROMPT), minus, [0.0] * 3, [0.0] * 3),
        ],
    )
    tree.nodes.append(Node(1, "model", 2, [minus[2], *b"5"], [0.0] * 2, [0.0] * 2))
    tree.leaves = [Leaf(2, 0)]
    assert spans_of(tree, 0, TEXT.text) == [("\u22125", True)]
