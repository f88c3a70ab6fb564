"""The tree that every engine grows.

Same prompt, same forks, same tool results, same number of drawn tokens.

Only the standard library: the peers read this file from environments of their own.
"""

from __future__ import annotations

import random
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Rollout:
    """One line of the tree.

    It inherits the tokens of `parent` before position `at`, then draws `new` tokens.

    parent: index of a rollout, None for the prompt · at: absolute position (the prompt's first
    token is 0) · cut: tokens drawn before the tool call, 0 for none · result: ids that the tool
    adds to the context
    """

    parent: int | None
    at: int
    new: int
    cut: int
    result: tuple[int, ...]

    @property
    def parts(self) -> tuple[int, ...]:
        """Tokens to draw in a row: once, or before and after the tool call."""
        return (self.cut, self.new - self.cut) if self.cut else (self.new,)


@dataclass(frozen=True)
class Workload:
    """`roots` samples of a prompt, then `branches` forks off each of them.

    Every second rollout calls a tool.

    prompt, new, result: tokens · wait_s: seconds a tool takes · round: changes the ids, never the
    shape, so that nothing cached in one round helps in the next
    """

    prompt: int = 512
    roots: int = 4
    branches: int = 3
    new: int = 256
    result: int = 20
    wait_s: float = 0.05
    vocab: int = 49152
    round: int = 0

    def prompt_ids(self) -> list[int]:
        return _ids(self.vocab, self.prompt, f"prompt {self.round}")

    def rollouts(self) -> list[Rollout]:
        """Roots first, then the branches of root 0, of root 1 and so on."""
        draw = random.Random("shape")
        total = self.roots * (1 + self.branches)
        lines = [self._rollout(None, self.prompt, i, draw) for i in range(self.roots)]
        for i in range(self.roots, total):
            parent = (i - self.roots) // self.branches
            at = _fork_position(lines[parent], self.prompt, draw)
            lines.append(self._rollout(parent, at, i, draw))
        return lines

    def _rollout(self, parent: int | None, at: int, index: int, draw: random.Random) -> Rollout:
        # Somewhere in the middle third, so that calls do not all come in the same forward.
        cut = draw.randint(self.new // 3, 2 * self.new // 3) if index % 2 == 0 else 0
        ids = _ids(self.vocab, self.result if cut else 0, f"result {self.round} {index}")
        return Rollout(parent, at, self.new, cut, tuple(ids))

    # -- what the tree needs -----------------------------------------------------------------------

    @property
    def generated(self) -> int:
        """Tokens drawn."""
        return self.roots * (1 + self.branches) * self.new

    def needed_rows(self) -> int:
        """Rows that a forward must run if nothing is run twice: the formula of the realised tree.

        The prompt but for its last token once; each rollout the token before its fork, which gives
        its first distribution, then all it adds but for the last drawn token, which nobody follows.
        """
        return self.prompt - 1 + sum(r.new + len(r.result) for r in self.rollouts())

    def separate_rows(self) -> int:
        """The same if every rollout were a request that starts from nothing."""
        return sum(r.at + r.new + len(r.result) - 1 for r in self.rollouts())

    def unique_tokens(self) -> int:
        """Tokens of the tree, each counted once."""
        return self.prompt + sum(r.new + len(r.result) for r in self.rollouts())

    def longest(self) -> int:
        """Tokens of the longest path."""
        return max(r.at + r.new + len(r.result) for r in self.rollouts())

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def _fork_position(root: Rollout, prompt: int, draw: random.Random) -> int:
    """Absolute position of a drawn token of the root but for its first: it will be drawn anew."""
    drawn = draw.randint(1, root.new - 1)
    return prompt + drawn + (len(root.result) if root.cut and drawn >= root.cut else 0)


def _ids(vocab: int, count: int, name: str) -> list[int]:
    # Below 100 are the special tokens of most vocabularies.
    draw = random.Random(name)
    return [draw.randrange(100, vocab) for _ in range(count)]
