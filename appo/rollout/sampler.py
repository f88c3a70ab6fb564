"""Growing rollout trees: N roots per prompt, tools in between, branches forked off the roots' KV cache.

One loop moves every line that has something to do; the only barrier is per prompt (its branches start when *its* roots
are done). Seeds come from the path in the tree, so what a line draws does not depend on what runs beside it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from appo.algo.branching import BranchPlan, BranchPoint, eligible_positions, plan_branches
from appo.algo.presets import Algorithm
from appo.errors import EngineError
from appo.rollout.active_tree import Growth, growth_from_json, growth_to_json
from appo.rollout.agent import Agent, AgentSettings, Line, State
from appo.rollout.engine import RolloutEngine
from appo.rollout.seeds import derive_seed
from appo.rollout.tags import TagEvent, TokenText
from appo.tools.pool import ToolPool
from appo.types import Leaf, Node, RolloutTree, Task

POLL_S = 0.02  # how long the loop sleeps when only tools are running


class Rollouts:
    """Samples trees. One instance per run; `plant`, `run` and `grow_branches` are called in turn for each step."""

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
        self._lines: dict[int, Line] = {}  # by engine handle; everything that still grows
        self._calls: dict[int, TagEvent] = {}  # by engine handle; calls in flight
        self._root_of: dict[int, Growth] = {}  # by engine handle; roots that still grow

    # -- roots ---------------------------------------------------------------------------------------------------

    def plant(
        self, task: Task, prompt_ids: Sequence[int], roots: int, step: int, copy: int = 0
    ) -> Growth:
        """A tree with `roots` lines that start sampling at the next `run`. copy: how often the task came before."""
        tree = RolloutTree(task, [Node(None, "prompt", 0, list(prompt_ids))], step=step)
        growth = Growth(tree, self.engine.add_prompt(prompt_ids), copy=copy)
        for r in range(roots):
            seq = self.engine.fork(growth.prompt_seq, len(prompt_ids))
            tree.nodes.append(Node(0, "model", len(prompt_ids), logprobs=[], entropy=[], path=(r,)))
            tree.leaves.append(Leaf(node=len(tree.nodes) - 1, root=r))
            line = Line(tree, len(tree.leaves) - 1, seq, self._seed(growth, (r,)))
            growth.roots.append(line)
            self._root_of[seq] = growth
            self._start(line)
        return growth

    def _seed(self, g: Growth, path: tuple[int | str, ...]) -> int:
        again = (f"copy {g.copy}",) if g.copy else ()
        return derive_seed(self.run_seed, g.tree.step, g.tree.task.task_id, *again, *path)

    def _start(self, line: Line, prefix: Sequence[int] = ()) -> None:
        self.agent.resume(line, prefix)
        if line.state is not State.DONE:
            self._lines[line.seq] = line

    # -- the loop ------------------------------------------------------------------------------------------------

    def run(
        self,
        on_roots_done: Callable[[Growth], None] | None = None,
        on_progress: Callable[[int], None] | None = None,
    ) -> None:
        """Grow until no line has anything left to do.

        on_roots_done(growth) is called as soon as the last root of a prompt is done, while others still grow; it may
        queue branches. on_progress(lines left) is called after every forward.
        """
        while self._lines:
            done: list[Growth] = []
            forward = self.engine.has_work()
            if forward:
                for event in self.engine.step():
                    line = self._lines[event.seq]
                    done += self._dispatch(line, self.agent.on_stopped(line, event))
            elif not self._calls:
                raise EngineError(
                    f"{len(self._lines)} rollouts are unfinished, but the engine has no work and no tool is running: the "
                    "engine lost a sequence"
                )
            done += self._collect_tools()
            for growth in done if on_roots_done else ():
                on_roots_done(growth)
            if on_progress and forward:  # waiting for tools is no progress, as the watchdog sees it
                on_progress(len(self._lines))

    def _dispatch(self, line: Line, call: TagEvent | None) -> list[Growth]:
        """Send the call off or take a finished line out; → the growth whose last root this was."""
        if call is not None:
            self._calls[line.seq] = call
            self.pool.submit(line.seq, call.tag, call.argument)
        elif line.state is State.DONE:
            self._lines.pop(line.seq, None)
            growth = self._root_of.pop(line.seq, None)
            if growth is not None and growth.roots_done:
                return [growth]
        return []

    def _collect_tools(self) -> list[Growth]:
        """Take finished calls. Deterministic mode waits for all of them, in handle order, before the next forward."""
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
        ready: list[Growth] = []
        for key, result in done:
            line, call = self._lines[key], self._calls.pop(key)
            ready += self._dispatch(line, self.agent.on_tool(line, call, result))
        return ready

    # -- branches ------------------------------------------------------------------------------------------------

    def grow_branches(self, growths: Sequence[Growth], algo: Algorithm) -> list[BranchPlan]:
        """Score the roots with the weights as they are now, choose points, fork, and queue the branches.

        With unmoved weights the recorded statistics are the current ones: log-ratio is 0 by definition and no forward
        is run. Otherwise one prefix-shared pass gives statistics and the KV cache to fork from.
        """
        moved = [g for g in growths if any(self._stale(line) for line in g.roots)]
        current = self._rescore(moved) if moved else {}
        plans = []
        for g in growths:
            plan = self._plan(g, algo, current)
            plans.append(plan)
            for rank, point in self._ranked(plan):
                self._fork(g, point, rank, algo)
            self.release(g)
        return plans

    def remember(self, growths: Sequence[Growth]) -> None:
        """Score roots with the weights that drew them, for `grow_branches` after an update.

        Ω compares policies. Decoding and scoring round differently (0.01 a token in bfloat16), and a sum of that over a
        rollout looks like a moved policy; two scoring passes over the same rows differ by the policy alone.
        """
        scored = self._rescore(growths)
        for g in growths:
            g.baseline = {line.seq: scored[line.seq][0] for line in g.roots}

    def _stale(self, line: Line) -> bool:
        version = line.tree.trajectory(line.leaf).version
        return bool(np.any((version >= 0) & (version != self.engine.policy_version)))

    def _rescore(self, growths: Sequence[Growth]) -> dict[int, tuple[np.ndarray, np.ndarray]]:
        """Current log-probs and entropies of response tokens, by engine handle."""
        lines = [line for g in growths for line in g.roots]
        scored = self.engine.score([line.seq for line in lines], self.settings.temperature)
        return {
            line.seq: (
                s.logprobs[line.tree.prompt_len - 1 :],
                s.entropy[line.tree.prompt_len - 1 :],
            )
            for line, s in zip(lines, scored, strict=True)
        }

    def _plan(
        self, g: Growth, algo: Algorithm, scored: dict[int, tuple[np.ndarray, np.ndarray]]
    ) -> BranchPlan:
        views = [g.tree.trajectory(line.leaf) for line in g.roots]
        entropy, ratio = [], []
        for line, v in zip(g.roots, views, strict=True):
            before = g.baseline.get(line.seq, v.logprobs)
            logp, h = scored.get(line.seq, (before, v.entropy))
            entropy.append(np.where(v.mask, h, 0.0).astype(np.float32))
            ratio.append(np.where(v.mask, logp - before, 0.0).astype(np.float32))
        room = self.settings.max_new_tokens - (1 if algo.resample == "after" else 0)
        eligible = [
            eligible_positions(v, self._closing(g.tree, line), self.text.drawable, room)
            for line, v in zip(g.roots, views, strict=True)
        ]
        masks = [v.mask for v in views]
        return plan_branches(entropy, ratio, masks, eligible, algo, self._seed(g, ("branch",)))

    @staticmethod
    def _closing(tree: RolloutTree, line: Line) -> np.ndarray:
        """bool[T]: the token that closed a block (a tool was called after it, or the answer was complete)."""
        flags: list[bool] = []
        for node, k in tree.walk(line.record.node):
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

    def _fork(self, g: Growth, point: BranchPoint, rank: int, algo: Algorithm) -> None:
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
        line = Line(tree, len(tree.leaves) - 1, seq, self._seed(g, path), sampled=sampled)
        g.branches.append(line)
        self._start(line, tree.nodes[node].token_ids[:offset])

    # -- waiting -------------------------------------------------------------------------------------------------

    def save(self, growth: Growth) -> dict[str, Any]:
        """A growth whose roots are done, as JSON types: all that `restore` needs, in another process too."""
        return growth_to_json(growth)

    def restore(self, data: dict[str, Any]) -> Growth:
        """What `save` wrote, known to the engine again. `grow_branches` does with it what it would have done."""
        return growth_from_json(data, self.engine, self._seed)

    # -- ending --------------------------------------------------------------------------------------------------

    def release(self, g: Growth) -> None:
        """Give back the roots and the prompt; forked branches keep what they stand on."""
        for line in g.roots:
            self.engine.release(line.seq)
        self.engine.release(g.prompt_seq)

    def finish(self, growths: Sequence[Growth]) -> list[RolloutTree]:
        """Give back the branches of finished trees."""
        for g in growths:
            for line in g.branches:
                self.engine.release(line.seq)
        return [g.tree for g in growths]


def _locate(tree: RolloutTree, leaf_node: int, split: int) -> tuple[int, int, int, int]:
    """(node that holds response position `split`, offset in it, tool results before it, sampled tokens before it).

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
