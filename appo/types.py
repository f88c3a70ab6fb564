"""The data types that flow through one training step. Plain dataclasses, no torch.

`Task` (what to solve) → `RolloutTree` of `Node`s (what was sampled) → rewards on leaves →
`Credit` (advantage and loss mask per token) → the learner's packed batch.

Two rules hold everywhere:

- **Token in, token out.** Text is decoded only for tool parsing and display; ids are never
  re-tokenised.
- **A node stores only what it adds.** A trajectory is a root→leaf walk; tool tokens have no
  logprobs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Literal

import numpy as np

Role = Literal["prompt", "model", "tool"]

# Words of an algorithm's settings: keys of the configuration and fields of
# `appo.algo.algorithm.Algorithm`.
BranchBy = Literal["score", "entropy", "random"]  # what ranks positions
Resample = Literal["at", "after"]  # the chosen token is drawn again, or kept
CreditRule = Literal["sum", "mean", "literal"]  # reading of A_base
Aggregate = Literal["token-mean", "seq-mean-token-mean", "rollout-mean"]  # denominators of the loss


@dataclass(frozen=True)
class Task:
    """One question: what the policy sees, how it is graded, which tools it may call.

    >>> Task("arith-7", [{"role": "user", "content": "What is 6*7?"}], answer="42", tools=("python",))
    """

    task_id: str
    messages: list[dict[str, str]]
    answer: Any
    tools: tuple[str, ...] = ()
    grader: str = "maths"  # name in appo.reward.GRADERS
    source: str = ""  # data_source of the record it came from
    meta: dict[str, Any] = field(default_factory=dict, hash=False)


class Finish(str, Enum):
    """Why a leaf stopped growing."""

    ANSWER = "answer"  # closed an answer block or sampled an end-of-sequence token
    LENGTH = "length"  # no room left (max_new_tokens or context)
    CANCELLED = "cancelled"
    ERROR = "error"


@dataclass
class Node:
    """A run of tokens added by one author, hanging off a parent.

    parent     index of the parent in `RolloutTree.nodes`, None for the prompt
    fork_at    how many of the parent's own tokens are inherited (= len(parent.token_ids) when it
               just continues)
    token_ids  ids this node adds
    logprobs   behavior log-probabilities at the sampling temperature, one per token; None unless
               role == "model"
    entropy    entropy in nats of the distribution each token was drawn from; None unless role ==
               "model"
    old_logp   log-probabilities that the loss takes ratios against, one per token, where the
               learner computed them itself (`appo.trainer.old_logprobs`); None: those recorded by
               the engine, `logprobs`
    path       position in the tree, the source of all randomness below it: (root index, branch
               index, …)
    closed     its last token closed a tool call or the answer

    >>> prompt = Node(None, "prompt", 0, [5, 6, 7])
    >>> root = Node(0, "model", 3, [8, 9], logprobs=[-0.1, -2.0], entropy=[0.3, 1.9], policy_version=4, path=(0,))
    """

    parent: int | None
    role: Role
    fork_at: int
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] | None = None
    entropy: list[float] | None = None
    policy_version: int = -1
    path: tuple[int, ...] = ()
    closed: bool = False  # its last token closed a block: never a branch point
    old_logp: list[float] | None = None

    @property
    def sampled(self) -> bool:
        """Whether the policy drew the tokens."""
        return self.role == "model"


@dataclass
class ToolCall:
    """One call as it happened; `tokens` counts the ids its result added to the context."""

    tool: str
    argument: str
    output: str
    ok: bool
    wall_s: float
    error_kind: str | None = None
    tokens: int = 0


@dataclass
class Leaf:
    """The end of one trajectory.

    node         last node of the walk
    root         index of the root rollout this leaf is or descends from (0 … N-1)
    branch       None for a root, else the number of the branch (0 …)
    split        response position (0-based, prompt excluded) of the first token the branch drew
                 itself; None for a root
    branch_score score that chose the split (z-product or entropy z), None for a root
    branch_rule  "strict" | "entropy" | "random": which rule filled this slot
    """

    node: int
    root: int
    branch: int | None = None
    parent_leaf: int | None = None
    split: int | None = None
    branch_score: float | None = None
    branch_rule: str | None = None
    branch_z: tuple[float, float] | None = None  # (z_entropy, z_omega) at the split
    finish: Finish | None = None
    tool_calls: list[ToolCall] = field(
        default_factory=list
    )  # including those inherited from the prefix
    reward: float | None = None
    reward_parts: dict[str, float] = field(default_factory=dict)
    grade_error: str | None = None

    @property
    def is_root(self) -> bool:
        """Whether the rollout was started from the prompt, not forked from another one."""
        return self.branch is None


@dataclass(frozen=True)
class Trajectory:
    """A flat view of one leaf: prompt + response. Arrays over response positions t = 0 … T-1.

    token_ids[P+T] int64 · mask[T] bool (True where the policy sampled the token) · logprobs[T],
    entropy[T], old_logp[T] float32 (0 where mask is False: never read there) · version[T] int64
    (policy version that drew the token, -1 elsewhere)
    """

    prompt_len: int
    token_ids: np.ndarray
    mask: np.ndarray
    logprobs: np.ndarray
    entropy: np.ndarray
    version: np.ndarray
    old_logp: np.ndarray

    @property
    def response_ids(self) -> np.ndarray:
        """Tokens after the prompt, tool tokens included."""
        return self.token_ids[self.prompt_len :]

    def __len__(self) -> int:
        return len(self.mask)


@dataclass
class RolloutTree:
    """All rollouts of one prompt in one step.

    >>> tree = RolloutTree(task, nodes=[prompt, root], leaves=[Leaf(node=1, root=0)])
    >>> tree.trajectory(0).response_ids     # ids of the first leaf without the prompt
    """

    task: Task
    nodes: list[Node]
    leaves: list[Leaf] = field(default_factory=list)
    step: int = 0
    stats: dict[str, float] = field(default_factory=dict)

    def walk(self, node: int) -> Iterator[tuple[Node, int]]:
        """Yield (node, number of its own tokens that count) from the prompt to `node`."""
        chain: list[tuple[Node, int]] = []
        index: int | None = node
        take = len(self.nodes[node].token_ids)
        while index is not None:
            n = self.nodes[index]
            chain.append((n, take))
            index, take = n.parent, n.fork_at
        return iter(reversed(chain))

    def path_ids(self, node: int) -> list[int]:
        """Token ids from the prompt to the end of `node`."""
        return [t for n, k in self.walk(node) for t in n.token_ids[:k]]

    @property
    def prompt_len(self) -> int:
        """Tokens of the prompt."""
        return len(self.nodes[0].token_ids)

    def trajectory(self, leaf: int) -> Trajectory:
        """The flat view of leaf number `leaf`, aligned by construction."""
        ids: list[int] = []
        mask: list[bool] = []
        logp: list[float] = []
        entropy: list[float] = []
        version: list[int] = []
        old_logp: list[float] = []
        for n, k in self.walk(self.leaves[leaf].node):
            ids += n.token_ids[:k]
            if n.role == "prompt":
                continue
            mask += [n.sampled] * k
            recorded = n.logprobs[:k] if n.logprobs is not None else [0.0] * k
            logp += recorded
            old_logp += recorded if n.old_logp is None else n.old_logp[:k]
            entropy += n.entropy[:k] if n.entropy is not None else [0.0] * k
            version += [n.policy_version if n.sampled else -1] * k
        return Trajectory(
            self.prompt_len,
            np.asarray(ids, np.int64),
            np.asarray(mask, bool),
            np.asarray(logp, np.float32),
            np.asarray(entropy, np.float32),
            np.asarray(version, np.int64),
            np.asarray(old_logp, np.float32),
        )

    @property
    def roots(self) -> list[int]:
        """Numbers of the leaves that were started from the prompt."""
        return [i for i, leaf in enumerate(self.leaves) if leaf.is_root]

    @property
    def branches(self) -> list[int]:
        """Numbers of the leaves that were forked from another one."""
        return [i for i, leaf in enumerate(self.leaves) if not leaf.is_root]

    def unique_tokens(self) -> int:
        """Tokens stored once each (a fork shares its prefix)."""
        return sum(len(n.token_ids) for n in self.nodes)

    def total_tokens(self) -> int:
        """Tokens of all leaves laid out as independent sequences."""
        return sum(k for leaf in self.leaves for _, k in self.walk(leaf.node))


@dataclass
class Credit:
    """What the learner needs to know of one trained trajectory: per response token.

    leaf        leaf number in its tree
    advantage[T] float64 base advantage (before future-aware scaling) · loss_mask[T] bool
    weight      weight of this row in the loss (1 unless an algorithm says otherwise)
    """

    leaf: int
    advantage: np.ndarray
    loss_mask: np.ndarray
    weight: float = 1.0


@dataclass(frozen=True)
class Counts:
    """Denominators of a whole mini-batch by the algorithm's definition.

    Rows without loss are counted too.

    tokens: trained tokens · rows: trained trajectories · rollouts: all leaves, M per prompt
    """

    tokens: float
    rows: float
    rollouts: float
