"""Prompts with a common beginning share its KV.

A new one becomes a fork of the live prompt that has most of it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from appo.rollout.native.tree.native_tree import Tree

MIN_SHARED = 16  # tokens; a shorter common prefix is not worth a segment of its own


class Prompts:
    """The prompts of one tree whose sequences are live.

    Call `forget` before a sequence is released, and `truncated` when one is cut: its tokens are not
    compared again.
    """

    def __init__(self, tree: Tree):
        self.tree = tree
        self._by_start: dict[
            tuple[int, ...], dict[int, np.ndarray]
        ] = {}  # first tokens → seq → ids
        self._start_of: dict[int, tuple[int, ...]] = {}

    def add(self, ids: Sequence[int], share: bool = True) -> tuple[int, int]:
        """A sequence with these tokens, and how many of them have their KV from another prompt.

        0: none.

        share: fork the live prompt with the longest common prefix, if that has MIN_SHARED tokens or
        more and is not stale. As at any fork the last common token is run again: its row predicts
        the first own token.
        """
        prompt = np.asarray(ids, dtype=np.int64)
        near, common = self._longest_common(prompt) if share else (None, 0)
        if near is None:
            seq, shared = self.tree.add(ids), 0
        else:
            seq, shared = self.tree.fork(near, common), common - 1
            self.tree.extend(seq, ids[common:])
        if len(ids) >= MIN_SHARED:
            start = self._start_of[seq] = tuple(prompt[:MIN_SHARED].tolist())
            self._by_start.setdefault(start, {})[seq] = prompt
        return seq, shared

    def truncated(self, seq: int, length: int) -> None:
        """Only the first `length` tokens are still what they were: others may follow.

        It need not be a prompt.
        """
        start = self._start_of.get(seq)
        if start is None:
            return
        if length < MIN_SHARED:
            self.forget(seq)
        else:
            self._by_start[start][seq] = self._by_start[start][seq][:length]

    def forget(self, seq: int) -> None:
        """Nothing is to share with this sequence any more. It need not be a prompt."""
        start = self._start_of.pop(seq, None)
        if start is not None:
            del self._by_start[start][seq]
            if not self._by_start[start]:
                del self._by_start[start]

    def _longest_common(self, prompt: np.ndarray) -> tuple[int | None, int]:
        best, longest = None, MIN_SHARED - 1
        for seq, known in self._by_start.get(tuple(prompt[:MIN_SHARED].tolist()), {}).items():
            n = min(len(prompt), len(known))
            differs = np.flatnonzero(prompt[:n] != known[:n])
            common = int(differs[0]) if len(differs) else n
            if common > longest and not self.tree.stale(seq):  # ties go to the oldest: fewer levels
                best, longest = seq, common
        return best, longest if best is not None else 0
