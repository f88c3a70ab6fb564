"""The tiny policy's world.

A BPE-512 tokenizer, a 0.66M-parameter Qwen3, and traces of clumsy tool use to start from.

The traces mix good tool calls, calls with a wrong expression and guesses without a call, dressed in
filler words (high entropy without meaning), so that a cold-started model solves about a third of
the questions: enough signal to learn from, much left to learn. It is a real end-to-end learning
problem that fits into a test.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from appo.data.prompts import result_text

TAGS = [
    f"<{slash}{t}>"
    for t in ("think", "python", "search", "result", "answer")
    for slash in ("", "/")
]
CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
VOCAB = 512
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
FILLER = [
    "ok now", "let us see", "well then", "right so", "hmm", "one moment", "here we go", "so let me look",
    "fine", "now then", "this one is next", "good question", "let me think", "all right", "sure thing", "so it goes",
]  # fmt: skip
SHAPE = dict(
    hidden_size=128, intermediate_size=384, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
    head_dim=32, max_position_embeddings=512, tie_word_embeddings=True, rope_theta=10_000.0,
)  # fmt: skip


@dataclass(frozen=True)
class TraceMix:
    """How often a trace calls the tool with the right expression, with a wrong one.

    The rest guesses.
    """

    right: float = 0.32
    wrong: float = 0.28


def trace(
    expression: str, answer: int, rng: np.random.Generator, mix: TraceMix
) -> list[tuple[str, bool]]:
    """The assistant's turn as (text, learned) spans; tool results are context, never learned."""
    say = lambda: " ".join(rng.choice(FILLER, rng.integers(1, 3)))  # noqa: E731
    kind = rng.random()
    if kind >= mix.right + mix.wrong:
        guess = answer + int(rng.integers(1, 30)) * int(rng.choice([-1, 1]))
        return [(f"{say()} <answer>{guess}</answer>", True)]
    called = expression if kind < mix.right else _spoil(expression, rng)
    result = str(eval(called, {"__builtins__": {}}))  # digits and + - * of our own making
    return [
        (f"{say()} <python>{called}</python>", True),
        (result_text(result), False),
        (f"{say()} <answer>{result}</answer>", True),
    ]


def _spoil(expression: str, rng: np.random.Generator) -> str:
    """Another operator or another digit in one place."""
    places = [i for i, c in enumerate(expression) if c in "+-*" or (c.isdigit() and c != "0")]
    i = int(rng.choice(places))
    old = expression[i]
    pool = "+-*" if old in "+-*" else "123456789"
    return expression[:i] + str(rng.choice([c for c in pool if c != old])) + expression[i + 1 :]


def train_tokenizer(texts: Iterator[str]) -> Any:
    """A byte-level BPE of 512 entries.

    Protocol tags are single tokens, and digits stand one by one.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=CONTROL + TAGS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    raw.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def encode_trace(
    tokenizer: Any, prompt_ids: Sequence[int], spans: Sequence[tuple[str, bool]]
) -> tuple[list[int], list[bool]]:
    """Ids of prompt + turn and, per id, whether it is learned.

    Spans are encoded apart, as the agent inserts them.
    """
    ids, learned = list(prompt_ids), [False] * len(prompt_ids)
    for text, learn in [*spans, ("<|im_end|>", True)]:
        piece = tokenizer(text, add_special_tokens=False)["input_ids"]
        ids += piece
        learned += [learn] * len(piece)
    return ids, learned


def new_model(seed: int, vocab: int) -> Any:
    """The untrained tiny Qwen3 with `vocab` embedding rows, float32."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(seed)
    eos, pad = CONTROL.index("<|im_end|>"), CONTROL.index("<|endoftext|>")
    shape: dict[str, Any] = dict(SHAPE)
    config = Qwen3Config(
        **shape, vocab_size=vocab, eos_token_id=eos, pad_token_id=pad, bos_token_id=None
    )
    return Qwen3ForCausalLM(config).float()


def save(model: Any, tokenizer: Any, folder: Path) -> None:
    """A Hugging Face folder."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
