"""One growing leaf: a state machine from sampled tokens to tool calls to an answer.

    SAMPLING → (closing tag) → TOOL → (result) → SAMPLING → … → DONE

A `ActiveRollout` owns the engine handle of its leaf and knows what it may still spend. It never
waits: the loop in `grow` moves it on when the engine or the tool pool has something for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum

from appo.data.prompts import budget_text, encode_plain, result_text
from appo.errors import PoolTooSmallError
from appo.rollout.engine import RolloutEngine, SamplingParams, SequenceStopped
from appo.rollout.tags import ANSWER, TagEvent, TagParser, TokenText
from appo.tools.base import ToolResult
from appo.types import Finish, Leaf, Node, Role, RolloutTree, ToolCall


class RolloutState(Enum):
    """What a rollout waits for: the next token, the result of a tool, or nothing more."""

    SAMPLING = "sampling"
    TOOL = "tool"
    DONE = "done"


@dataclass(frozen=True)
class AgentSettings:
    """Limits per trajectory; all are counted from the tree's own record, never from text."""

    max_new_tokens: int
    max_tool_calls: int
    temperature: float = 1.0
    tools: tuple[str, ...] = ()


@dataclass
class ActiveRollout:
    """A leaf being grown. `tree.leaves[leaf]` is its record, `seq` its handle in the engine."""

    tree: RolloutTree
    leaf: int
    seq: int
    seed: int
    sampled: int = 0  # tokens the policy drew, inherited ones included
    state: RolloutState = RolloutState.SAMPLING
    closed: list[TagEvent] = field(
        default_factory=list
    )  # blocks closed by the tokens sampled since `resume`
    queue: list[TagEvent] = field(default_factory=list)  # calls of this turn that still wait

    @property
    def record(self) -> Leaf:
        """The leaf of the tree that this rollout grows."""
        return self.tree.leaves[self.leaf]


class Agent:
    """Turn logic shared by all rollouts of a run; holds no state of any of them."""

    def __init__(self, engine: RolloutEngine, text: TokenText, settings: AgentSettings):
        self.engine = engine
        self.text = text
        self.settings = settings

    def resume(self, rollout: ActiveRollout, prefix: Sequence[int] = ()) -> None:
        """Start (or go on) sampling.

        `prefix`: ids of the current turn that a branch inherited, for the parser.
        """
        budget = self.settings.max_new_tokens - rollout.sampled
        if budget <= 0 or self.engine.length(rollout.seq) >= self.engine.max_context:
            return self._finish(rollout, Finish.LENGTH)
        parser = TagParser([*self.settings.tools, ANSWER])
        parser.feed(self.text.join(prefix))
        rollout.closed = []

        def closes_block(token: int) -> bool:
            rollout.closed += parser.feed(self.text.join([token]))
            return bool(rollout.closed)

        params = SamplingParams(
            max_new_tokens=budget,
            temperature=self.settings.temperature,
            stop_token_ids=self.text.eos_ids,
            stop=closes_block,
        )
        rollout.state = RolloutState.SAMPLING
        try:
            self.engine.submit(rollout.seq, params, rollout.seed)
        except PoolTooSmallError:
            if not rollout.sampled:
                raise  # not even the first turn fits: a wrong setting
            self._finish(
                rollout, Finish.LENGTH
            )  # tool results were longer than the pool is made for

    def on_stopped(self, rollout: ActiveRollout, event: SequenceStopped) -> TagEvent | None:
        """Record what was sampled; return the tool call to make, if any."""
        node = rollout.tree.nodes[rollout.record.node]
        if node.role != "model":
            node = self._add_node(rollout, "model")
        assert node.logprobs is not None and node.entropy is not None
        node.token_ids += event.token_ids
        node.logprobs += event.logprobs
        node.entropy += event.entropy
        node.policy_version = event.policy_version
        node.closed = bool(rollout.closed)
        rollout.sampled += len(event.token_ids)
        if event.reason == "stop_token" or any(e.tag == ANSWER for e in rollout.closed):
            # Calls before the answer in the same token would have no reader.
            self._finish(rollout, Finish.ANSWER)
            return None
        if event.reason == "length":
            self._finish(rollout, Finish.LENGTH)
            return None
        rollout.queue += rollout.closed
        return self.next_call(rollout)

    def next_call(self, rollout: ActiveRollout) -> TagEvent | None:
        """The next call in the queue, or None and sampling goes on.

        Calls beyond the budget are answered at once.
        """
        while rollout.queue:
            call = rollout.queue.pop(0)
            if len(rollout.record.tool_calls) < self.settings.max_tool_calls:
                rollout.state = RolloutState.TOOL
                return call
            if not self._append_result(rollout, budget_text(), policy_error=True):
                return None
        self.resume(rollout)
        return None

    def on_tool(
        self, rollout: ActiveRollout, call: TagEvent, result: ToolResult
    ) -> TagEvent | None:
        """Write the result into the context; return the next call of the same turn, if any."""
        record = ToolCall(
            call.tag, call.argument, result.output, result.ok, result.wall_s, result.error_kind
        )
        rollout.record.tool_calls.append(record)
        if not self._append_result(rollout, result_text(result.output), call=record):
            return None
        return self.next_call(rollout)

    def _append_result(
        self,
        rollout: ActiveRollout,
        text: str,
        call: ToolCall | None = None,
        policy_error: bool = False,
    ) -> bool:
        ids = list(encode_plain(self.text.tokenizer, text))
        if self.engine.length(rollout.seq) + len(ids) >= self.engine.max_context:
            self._finish(rollout, Finish.LENGTH)
            return False
        if call is not None:
            call.tokens = len(ids)
        if policy_error:
            rollout.tree.stats["over_budget_calls"] = (
                rollout.tree.stats.get("over_budget_calls", 0) + 1
            )
        self.engine.append(rollout.seq, ids)
        self._add_node(rollout, "tool").token_ids = ids
        return True

    def _add_node(self, rollout: ActiveRollout, role: Role) -> Node:
        """A node that continues the leaf."""
        tree, leaf = rollout.tree, rollout.record
        last = tree.nodes[leaf.node]
        node = Node(leaf.node, role, len(last.token_ids), path=last.path)
        if role == "model":
            node.logprobs, node.entropy = [], []
        tree.nodes.append(node)
        leaf.node = len(tree.nodes) - 1
        return node

    def _finish(self, rollout: ActiveRollout, why: Finish) -> None:
        rollout.state = RolloutState.DONE
        rollout.queue.clear()
        rollout.record.finish = why
