"""The segment tree: who inherits which tokens from whom. No tensors here.

A node owns the tokens and the KV it adds, from its `base` on; everything before belongs to ancestors. A fork at token
`at` starts a child at base = at - 1: the child inherits the KV of positions < at - 1 and runs token at - 1 as its own
first row, so there is no special path for "the last token of a prefix". A node only ever appends, hence forking costs
nothing, needs no copy, and a parent may go on decoding.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from torch import Tensor

from appo.errors import EngineError

MIN_SHARED = 16  # shortest common prefix worth a segment of its own


class Node:
    """One segment. Local index i is absolute position base + i.

    kv      how many own positions have KV · version: of the weights that wrote it · stale: KV was lost to new weights
    slot, off   place in the slab (own KV starts `off` positions into the slot), slot = -1 when not there
    running  admitted: its slot is taken
    block   own KV [L, 2, H, capacity, D] of a node that lives outside the slab
    """

    __slots__ = (
        "id", "parent", "base", "tokens", "kv", "version", "stale", "slot", "off", "block",
        "children", "handle", "prompt", "running", "local",
    )  # fmt: skip

    def __init__(self, id: int, parent: Node | None, base: int, tokens: list[int]):
        self.id = id
        self.parent = parent
        self.base = base
        self.tokens = tokens
        self.kv = 0
        self.version = -1
        self.stale = False
        self.slot = -1
        self.off = 0
        self.block: Tensor | None = None
        self.children: list[Node] = []
        self.handle: int | None = None
        self.prompt: np.ndarray | None = None
        self.running = False
        self.local = base  # first position found in the node's own slot (< base after localising)

    @property
    def length(self) -> int:
        return self.base + len(self.tokens)

    def chain(self) -> Iterator[tuple[Node, int]]:
        """(ancestor, how many of its own positions are inherited), nearest first."""
        node = self
        while node.parent is not None:
            yield node.parent, node.base - node.parent.base
            node = node.parent

    def path_tokens(self) -> list[int]:
        parts = [self.tokens]
        parts += [a.tokens[:n] for a, n in self.chain()]
        return [t for part in reversed(parts) for t in part]


class Tree:
    """Handles, nodes, reference counts (children + handle) and the index of live prompts."""

    def __init__(self) -> None:
        self.nodes: dict[int, Node] = {}
        self.by_handle: dict[int, Node] = {}
        self._next_node = 0
        self._next_handle = 0
        self._prompts: dict[tuple[int, ...], list[Node]] = {}

    def get(self, seq: int) -> Node:
        node = self.by_handle.get(seq)
        if node is None:
            known = 0 <= seq < self._next_handle if isinstance(seq, int) else False
            raise EngineError(
                f"sequence {seq!r} {'was released' if known else 'is unknown'}; use a live handle"
            )
        return node

    def add_prompt(self, ids: list[int], index: bool) -> tuple[Node, int]:
        """New root (or a fork off a live prompt with a common prefix) and the number of tokens it shares."""
        prompt = np.asarray(ids, dtype=np.int64)
        near, common = self._longest_common(prompt) if index else (None, 0)
        # As at any fork, the last common token is run again by the child: its row predicts the first own token.
        shared = max(common - 1, 0)
        node = self._grow(near, shared, ids[shared:])
        node.prompt = prompt
        if len(ids) >= MIN_SHARED:
            self._prompts.setdefault(tuple(ids[:MIN_SHARED]), []).append(node)
        self._name(node)
        return node, shared

    def _longest_common(self, prompt: np.ndarray) -> tuple[Node | None, int]:
        best: Node | None = None
        shared = MIN_SHARED - 1
        for node in self._prompts.get(tuple(prompt[:MIN_SHARED].tolist()), ()):
            if node.stale or any(a.stale for a, _ in node.chain()):
                continue
            assert node.prompt is not None
            n = min(len(prompt), len(node.prompt))
            differs = np.flatnonzero(prompt[:n] != node.prompt[:n])
            common = int(differs[0]) if len(differs) else n
            if common > shared:  # ties go to the oldest: fewer levels
                best, shared = node, common
        return (best, shared) if best is not None else (None, 0)

    def fork(self, parent: Node, at: int) -> Node:
        """Child that inherits tokens < at; the caller has checked 1 <= at <= length."""
        child = self._grow(parent, at - 1, [self.token(parent, at - 1)])
        self._name(child)
        return child

    @staticmethod
    def token(node: Node, position: int) -> int:
        while position < node.base:
            assert node.parent is not None
            node = node.parent
        return node.tokens[position - node.base]

    def _grow(self, parent: Node | None, base: int, tokens: list[int]) -> Node:
        while parent is not None and base <= parent.base:
            parent = parent.parent  # nothing of this one is inherited
        node = Node(self._next_node, parent, base, list(tokens))
        self._next_node += 1
        self.nodes[node.id] = node
        if parent is not None:
            parent.children.append(node)
        return node

    def _name(self, node: Node) -> None:
        node.handle = self._next_handle
        self.by_handle[self._next_handle] = node
        self._next_handle += 1

    def truncate(self, node: Node, length: int) -> Node:
        """Drop tokens from absolute position `length` on; returns the node that now carries the handle.

        If a child stands on what is dropped, the old node lives on without a handle and a fork takes its name.
        """
        if any(child.base >= length for child in node.children):
            handle = node.handle
            assert handle is not None
            fresh = self._grow(node, length - 1, [self.token(node, length - 1)])
            node.handle, fresh.handle = None, handle
            self.by_handle[handle] = fresh
            return fresh
        del node.tokens[length - node.base :]
        return node

    def release(self, node: Node) -> list[Node]:
        """Take the handle away; returns the nodes that are no longer needed, to be freed by the caller."""
        assert node.handle is not None
        del self.by_handle[node.handle]
        node.handle = None
        return self._sweep(node)

    def _sweep(self, node: Node | None) -> list[Node]:
        dead = []
        while node is not None and node.handle is None and not node.children:
            dead.append(node)
            del self.nodes[node.id]
            if node.prompt is not None and len(node.prompt) >= MIN_SHARED:
                key = tuple(node.prompt[:MIN_SHARED].tolist())
                self._prompts[key].remove(node)
                if not self._prompts[key]:
                    del self._prompts[key]
            if node.parent is not None:
                node.parent.children.remove(node)
            node = node.parent
        return dead
