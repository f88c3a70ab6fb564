"""The text protocol on token ids.

`<python>…</python>` calls a tool, `<result>…</result>` answers, `<answer>…</answer>` ends.

Parsing is incremental over the *bytes* of sampled tokens, so any chunking gives the same events and
a multi-byte character split over tokens does no harm. A tag is recognised only in what the policy
sampled: tool results never pass through the parser.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

ANSWER = "answer"


@dataclass(frozen=True)
class TagEvent:
    """A block that was opened and closed: its tag name and the text between."""

    tag: str
    argument: str


class TagParser:
    """Finds closed blocks of the given tags in a stream of bytes.

    >>> p = TagParser(["python", "answer"])
    >>> p.feed(b"so <python>1+"), p.feed(b"1</python>")
    ([], [TagEvent(tag='python', argument='1+1')])

    While a block is open only its own closing tag counts.
    """

    def __init__(self, tags: Iterable[str]):
        self._open_tags = {t: f"<{t}>".encode() for t in tags}
        self._text = bytearray()
        self._scan = 0  # everything before has been looked at
        self._open: str | None = None
        self._start = 0

    def feed(self, data: bytes) -> list[TagEvent]:
        """Append `data`; return the blocks that it closes, in order of appearance."""
        self._text += data
        events: list[TagEvent] = []
        while True:
            if self._open is None and not self._find_open():
                return events
            close = f"</{self._open}>".encode()
            at = self._text.find(close, self._scan)
            if at < 0:
                # A closing tag may be half-way in: look again from where it could have begun.
                self._scan = max(self._start, len(self._text) - len(close) + 1)
                return events
            argument = self._text[self._start : at].decode("utf-8", errors="replace")
            events.append(TagEvent(self._open or "", argument))
            self._open, self._scan = None, at + len(close)

    def _find_open(self) -> bool:
        found = [
            (at, tag)
            for tag, raw in self._open_tags.items()
            if (at := self._text.find(raw, self._scan)) >= 0
        ]
        if not found:
            longest = max(map(len, self._open_tags.values()), default=1)
            self._scan = max(self._scan, len(self._text) - longest + 1)
            return False
        at, self._open = min(found)
        self._start = self._scan = at + len(self._open_tags[self._open])
        return True


class TokenText:
    """What every token id spells, once per tokenizer.

    Bytes for the parser, and which ids are blank.

    tokenizer: a Hugging Face fast tokenizer, byte-level BPE (Llama-3, Qwen, SmolLM2) or
    SentencePiece style.
    vocab: rows of the model's embedding; ids the tokenizer does not know (padding rows) can be
    sampled and spell nothing.
    """

    def __init__(self, tokenizer: Any, vocab: int = 0):
        self.tokenizer = tokenizer
        size = len(tokenizer)
        special = set(tokenizer.all_special_ids) | set(
            getattr(tokenizer, "added_tokens_decoder", {})
        )
        decode = _byte_level_table()
        self.bytes: list[bytes] = []
        for i, piece in enumerate(tokenizer.convert_ids_to_tokens(list(range(size)))):
            self.bytes.append(_piece_bytes(piece or "", i in special, decode))
        self.bytes += [b""] * (vocab - size)
        self.eos_ids = frozenset(_eos_ids(tokenizer))
        blank = np.array([not b.decode("utf-8", errors="replace").strip() for b in self.bytes])
        self.drawable = ~blank  # [V] ids at which a branch may start
        for i in self.eos_ids | set(tokenizer.all_special_ids):
            self.drawable[i] = False

    def join(self, ids: Iterable[int]) -> bytes:
        """Bytes of a run of ids."""
        return b"".join(self.bytes[i] for i in ids)

    def text(self, ids: Sequence[int]) -> str:
        """For reading only; never encode it again."""
        return self.join(ids).decode("utf-8", errors="replace")


def _eos_ids(tokenizer: Any) -> set[int]:
    """Every id that ends a turn: the tokenizer's own and the usual end-of-turn markers it has."""
    ids = {tokenizer.eos_token_id} if tokenizer.eos_token_id is not None else set()
    vocab = tokenizer.get_vocab()
    return ids | {vocab[t] for t in ("<|im_end|>", "<|eot_id|>", "<|endoftext|>") if t in vocab}


def _piece_bytes(piece: str, special: bool, table: dict[str, int]) -> bytes:
    if special:
        return piece.encode()
    if (
        len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">")
    ):  # SentencePiece byte fallback
        return bytes([int(piece[3:5], 16)])
    if all(c in table for c in piece):
        return bytes(table[c] for c in piece)
    return piece.replace("\u2581", " ").encode()


def _byte_level_table() -> dict[str, int]:
    """The byte-level alphabet of GPT-2.

    Printable bytes stand for themselves, the others for code points from 256 on.
    """
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in plain]
    return {chr(b): b for b in plain} | {chr(256 + i): b for i, b in enumerate(others)}
