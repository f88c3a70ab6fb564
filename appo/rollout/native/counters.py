"""What an engine has done, and what as many independent sequences would have cost."""

from __future__ import annotations

from dataclasses import dataclass, field

from appo.rollout.native.requests import Request


@dataclass
class Counters:
    """Rows are tokens that went through the model.

    prefill, decode   rows of `step`; decode are those of tokens drawn just before
    scored            rows of `score`
    independent       rows that would have been run if every sequence computed its whole path itself
                      and kept its KV; of one that was taken out while it ran its first tokens, as
                      many as its path had
    """

    prefill_tokens: int = 0
    decode_tokens: int = 0
    scored_tokens: int = 0
    forks: int = 0
    prefix_hits_tokens: int = 0
    steps: int = 0
    independent_tokens: int = 0
    _covered: dict[int, int] = field(
        default_factory=dict
    )  # sequence → positions counted as independent

    @property
    def tokens_saved(self) -> int:
        """Below 0 while a prompt is being prefilled that no sequence has drawn from yet."""
        return (
            self.independent_tokens - self.prefill_tokens - self.decode_tokens - self.scored_tokens
        )

    def forward(self, rows: int, sampling: list[Request]) -> None:
        """One forward of `rows`, at the end of which these requests draw a token.

        It is not in their `tokens` yet.
        """
        decoded = sum(1 for request in sampling if request.tokens)
        self.steps += 1
        self.decode_tokens += decoded
        self.prefill_tokens += rows - decoded
        for request in sampling:
            self.independent_tokens += request.length - self._covered.get(request.seq, 0)
            self._covered[request.seq] = request.length

    def gave_up(self, seq: int, kv: int) -> None:
        """A running sequence is cancelled; so many positions of its path have KV."""
        covered = self._covered.get(seq, 0)
        self.independent_tokens += max(0, kv - covered)
        self._covered[seq] = max(kv, covered)

    def scored(self, rows: int, lengths: dict[int, int]) -> None:
        """A scoring pass of `rows` over sequences of these lengths."""
        self.scored_tokens += rows
        self.independent_tokens += sum(length - 1 for length in lengths.values())
        self._covered |= {seq: length - 1 for seq, length in lengths.items()}

    def dropped(self, seq: int, length: int) -> None:
        """The sequence was cut to `length`; 0: it is gone."""
        if seq in self._covered:
            self._covered[seq] = min(self._covered[seq], max(length - 1, 0))
            if not length:
                del self._covered[seq]

    def new_weights(self) -> None:
        """Independent sequences would have lost their KV, too."""
        self._covered.clear()

    def as_dict(self) -> dict[str, int]:
        """The counts by name, in the order of the engine's statistics."""
        names = (
            "prefill_tokens", "decode_tokens", "scored_tokens", "forks", "prefix_hits_tokens", "steps", "tokens_saved",
        )  # fmt: skip
        return {name: getattr(self, name) for name in names}
