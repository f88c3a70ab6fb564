"""Growing rollout trees.

N roots per prompt, tools in between, branches forked off the roots' KV cache.

One loop moves every rollout that has something to do; the only barrier is per prompt (its branches
start when *its* roots are done). Seeds come from the path in the tree, so what a rollout draws does
not depend on what runs beside it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from appo.algo.algorithm import Algorithm
from appo.algo.branching import BranchPlan, BranchPoint, eligible_positions, plan_branches
from appo.errors import EngineError
from appo.rollout.agent import ActiveRollout, Agent, AgentSettings, RolloutState
from appo.rollout.engine import RolloutEngine
from appo.rollout.seeds import derive_seed
from appo.rollout.tags import TagEvent, TokenText
from appo.rollout.tree_rollout import TreeRollout, tree_rollout_from_json, tree_rollout_to_json
from appo.tools.pool import ToolPool
from appo.types import Leaf, Node, RolloutTree, Task

POLL_S = 0.02  # how long the loop sleeps when only tools are running


class Rollouts:
    """Samples trees.

    One instance per run; `start`, `run` and `grow_branches` are called in turn for each step.
    """

    def __init__(
        self,
        engine: RolloutEngine,
        text: TokenText,
        pool: ToolPool,
        settings: AgentSettings,
        *,
        run_seed: int,
        deterministic: bool = False,
    ):
        self.engine = engine
        self.text = text
        self.pool = pool
        self.settings = settings
        self.agent = Agent(engine, text, settings)
        self.run_seed = run_seed
        self.deterministic = deterministic
        self.tool_wait_s = 0.0
        self._active: dict[int, ActiveRollout] = {}  # by engine handle; everything that still grows
        self._calls: dict[int, TagEvent] = {}  # by engine handle; calls in flight
        self._root_of: dict[int, TreeRollout] = {}  # by engine handle; roots that still grow

    # -- roots -------------------------------------------------------------------------------------

    def start(
        self, task: Task, prompt_ids: Sequence[int], roots: int, step: int, copy: int = 0
    ) -> TreeRollout:
        """A tree with `roots` rollouts that start sampling at the next `run`.

        copy: how often the task came before.
        """
        tree = RolloutTree(task, [Node(None, "prompt", 0, list(prompt_ids))], step=step)
        tree_rollout = TreeRollout(tree, self.engine.add_prompt(prompt_ids), copy=copy)
        for r in range(roots):
            seq = self.engine.fork(tree_rollout.prompt_seq, len(prompt_ids))
            tree.nodes.append(Node(0, "model", len(prompt_ids), logprobs=[], entropy=[], path=(r,)))
            tree.leaves.append(Leaf(node=len(tree.nodes) - 1, root=r))
            rollout = ActiveRollout(tree, len(tree.leaves) - 1, seq, self._seed(tree_rollout, (r,)))
            tree_rollout.roots.append(rollout)
            self._root_of[seq] = tree_rollout
            self._submit(rollout)
        return tree_rollout

    def _seed(self, g: TreeRollout, path: tuple[int | str, ...]) -> int:
        again = (f"copy {g.copy}",) if g.copy else ()
        return derive_seed(self.run_seed, g.tree.step, g.tree.task.task_id, *again, *path)

    def _submit(self, rollout: ActiveRollout, prefix: Sequence[int] = ()) -> None:
        self.agent.resume(rollout, prefix)
        if rollout.state is not RolloutState.DONE:
            self._active[rollout.seq] = rollout

    # -- the loop ----------------------------------------------------------------------------------

    def run(
        self,
        on_roots_done: Callable[[TreeRollout], None] | None = None,
        on_progress: Callable[[int], None] | None = None,
    ) -> None:
        """Grow until no rollout has anything left to do.

        on_roots_done(tree_rollout) is called as soon as the last root of a prompt is done, while
        others still grow; it may queue branches. on_progress(rollouts left) is called after every
        forward.
        """
        while self._active:
            done: list[TreeRollout] = []
            forward = self.engine.has_work()
            if forward:
                for event in self.engine.step():
                    rollout = self._active[event.seq]
                    done += self._dispatch(rollout, self.agent.on_stopped(rollout, event))
            elif not self._calls:
                raise EngineError(
                    f"{len(self._active)} rollouts are unfinished, but the engine has no work and no tool is running: the "
                    "engine lost a sequence"
                )
            done += self._collect_tools()
            if on_roots_done is not None:
                for tree_rollout in done:
                    on_roots_done(tree_rollout)
            if on_progress and forward:  # waiting for tools is no progress, as the watchdog sees it
                on_progress(len(self._active))

    def _dispatch(self, rollout: ActiveRollout, call: TagEvent | None) -> list[TreeRollout]:
        """Send the call off or take a finished rollout out.

        → the tree rollout whose last root this was.
        """
        if call is not None:
            self._calls[rollout.seq] = call
            self.pool.submit(rollout.seq, call.tag, call.argument)
        elif rollout.state is RolloutState.DONE:
            self._active.pop(rollout.seq, None)
            tree_rollout = self._root_of.pop(rollout.seq, None)
            if tree_rollout is not None and tree_rollout.roots_done:
                return [tree_rollout]
        return []

    def _collect_tools(self) -> list[TreeRollout]:
        """Take finished calls.

        Deterministic mode waits for all of them, in handle order, before the next forward.
        """
        if not self._calls:
            return []
        begin = time.perf_counter()
        if self.deterministic:
            done = self.pool.wait_all()
            self.tool_wait_s += time.perf_counter() - begin
        elif self.engine.has_work():
            done = self.pool.poll()
        else:
            done = self.pool.wait(POLL_S)
            self.tool_wait_s += time.perf_counter() - begin
        ready: list[TreeRollout] = []
        for key, result in done:
            rollout, call = self._active[key], self._calls.pop(key)
            ready += self._dispatch(rollout, self.agent.on_tool(rollout, call, result))
        return ready

    # -- branches ----------------------------------------------------------------------------------

    def grow_branches(
        self, tree_rollouts: Sequence[TreeRollout], algo: Algorithm
    ) -> list[BranchPlan]:
        """Score the roots with today's weights, choose points, fork, and queue the branches.

        With unmoved weights the recorded statistics are the current ones: log-ratio is 0 by
        definition and no forward is run. Otherwise one prefix-shared pass gives statistics and the
        KV cache to fork from.
        """
        moved = [g for g in tree_rollouts if any(self._stale(rollout) for rollout in g.roots)]
        current = self._rescore(moved) if moved else {}
        plans = []
        for g in tree_rollouts:
            plan = self._plan(g, algo, current)
            plans.append(plan)
            for rank, point in self._ranked(plan):
                self._fork(g, point, rank, algo)
            self.release(g)
        return plans

    def score_reference(self, tree_rollouts: Sequence[TreeRollout]) -> None:
        """Score roots with the weights that drew them, for `grow_branches` after an update.

        Ω compares policies. Decoding and scoring round differently (0.01 a token in bfloat16), and
        a sum of that over a rollout looks like a moved policy; two scoring passes over the same
        rows differ by the policy alone.
        """
        scored = self._rescore(tree_rollouts)
        for g in tree_rollouts:
            g.reference_logp = {rollout.seq: scored[rollout.seq][0] for rollout in g.roots}

    def _stale(self, rollout: ActiveRollout) -> bool:
        version = rollout.tree.trajectory(rollout.leaf).version
        return bool(np.any((version >= 0) & (version != self.engine.policy_version)))

    def _rescore(
        self, tree_rollouts: Sequence[TreeRollout]
    ) -> dict[int, tuple[np.ndarray, np.ndarray]]:
        """Current log-probs and entropies of response tokens, by engine handle."""
        rollouts = [rollout for g in tree_rollouts for rollout in g.roots]
        scored = self.engine.score([rollout.seq for rollout in rollouts], self.settings.temperature)
        return {
            rollout.seq: (
                s.logprobs[rollout.tree.prompt_len - 1 :],
                s.entropy[rollout.tree.prompt_len - 1 :],
            )
            for rollout, s in zip(rollouts, scored, strict=True)
        }

    def _plan(
        self, g: TreeRollout, algo: Algorithm, scored: dict[int, tuple[np.ndarray, np.ndarray]]
    ) -> BranchPlan:
        views = [g.tree.trajectory(rollout.leaf) for rollout in g.roots]
        entropy, ratio = [], []
        for rollout, v in zip(g.roots, views, strict=True):
            before = g.reference_logp.get(rollout.seq, v.logprobs)
            logp, h = scored.get(rollout.seq, (before, v.entropy))
            entropy.append(np.where(v.mask, h, 0.0).astype(np.float32))
            ratio.append(np.where(v.mask, logp - before, 0.0).astype(np.float32))
        budget = self.settings.max_new_tokens - (1 if algo.resample == "after" else 0)
        eligible = [
            eligible_positions(v, self._closing(g.tree, rollout), self.text.drawable, budget)
            for rollout, v in zip(g.roots, views, strict=True)
        ]
        masks = [v.mask for v in views]
        return plan_branches(entropy, ratio, masks, eligible, algo, self._seed(g, ("branch",)))

    @staticmethod
    def _closing(tree: RolloutTree, rollout: ActiveRollout) -> np.ndarray:
        """bool[T]: the token that closed a block.

        A tool was called after it, or the answer was complete.
        """
        flags: list[bool] = []
        for node, k in tree.walk(rollout.record.node):
            if node.role != "prompt":
                flags += [node.closed and i == len(node.token_ids) - 1 for i in range(k)]
        return np.asarray(flags, bool)

    @staticmethod
    def _ranked(plan: BranchPlan) -> list[tuple[int, BranchPoint]]:
        """Points with their rank inside their root: the branch's number in its path."""
        seen: dict[int, int] = {}
        out = []
        for p in plan.points:
            out.append((seen.get(p.root, 0), p))
            seen[p.root] = seen.get(p.root, 0) + 1
        return out

    def _fork(self, g: TreeRollout, point: BranchPoint, rank: int, algo: Algorithm) -> None:
        tree, parent = g.tree, g.roots[point.root]
        split = point.position + (1 if algo.resample == "after" else 0)
        node, offset, calls, sampled = _locate(tree, parent.record.node, split)
        path = (*tree.nodes[parent.record.node].path, rank)
        tree.nodes.append(Node(node, "model", offset, logprobs=[], entropy=[], path=path))
        tree.leaves.append(
            Leaf(
                node=len(tree.nodes) - 1, root=point.root, branch=rank, parent_leaf=parent.leaf, split=split,
                branch_score=point.score, branch_rule=point.rule, branch_z=(point.z_entropy, point.z_omega),
                tool_calls=list(parent.record.tool_calls[:calls]),
            )
        )  # fmt: skip
        seq = self.engine.fork(parent.seq, tree.prompt_len + split)
        rollout = ActiveRollout(
            tree, len(tree.leaves) - 1, seq, self._seed(g, path), sampled=sampled
        )
        g.branches.append(rollout)
        self._submit(rollout, tree.nodes[node].token_ids[:offset])

    # -- waiting -----------------------------------------------------------------------------------

    def save(self, tree_rollout: TreeRollout) -> dict[str, Any]:
        """A tree rollout whose roots are done, as JSON types.

        All that `restore` needs, in another process too.
        """
        return tree_rollout_to_json(tree_rollout)

    def restore(self, data: dict[str, Any]) -> TreeRollout:
        """What `save` wrote, known to the engine again.

        `grow_branches` does with it what it would have done.
        """
        return tree_rollout_from_json(data, self.engine, self._seed)

    # -- ending ------------------------------------------------------------------------------------

    def release(self, g: TreeRollout) -> None:
        """Give back the roots and the prompt; forked branches keep what they stand on."""
        for rollout in g.roots:
            self.engine.release(rollout.seq)
        self.engine.release(g.prompt_seq)

    def finish(self, tree_rollouts: Sequence[TreeRollout]) -> list[RolloutTree]:
        """Give back the branches of finished trees."""
        for g in tree_rollouts:
            for rollout in g.branches:
                self.engine.release(rollout.seq)
        return [g.tree for g in tree_rollouts]


def _locate(tree: RolloutTree, leaf_node: int, split: int) -> tuple[int, int, int, int]:
    """Where response position `split` is, and what precedes it.

    Returns (node that holds it, offset in the node, tool results before it, sampled tokens before
    it).

    `split` may be one past the end of the leaf's last node.
    """
    chain = []
    index: int | None = leaf_node
    take = len(tree.nodes[leaf_node].token_ids)
    while index is not None:
        chain.append((index, take))
        take, index = tree.nodes[index].fork_at, tree.nodes[index].parent
    at = calls = sampled = 0
    for i, k in reversed(chain):
        node = tree.nodes[i]
        if node.role == "prompt":
            continue
        if split < at + k or i == leaf_node:
            return i, split - at, calls, sampled + (split - at if node.sampled else 0)
        at += k
        calls += node.role == "tool"
        sampled += k if node.sampled else 0
    raise AssertionError(f"split {split} lies outside the leaf")
