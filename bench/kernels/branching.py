"""Branch scores and selection for a whole batch of rollouts.

Compared with the published algorithm in its own form.

    OMP_NUM_THREADS=1 python bench/kernels/branching.py [--quick] [--json FILE]

The size is that of the authors' 7B runs: 768 rollouts of 6,144 response tokens, 8 roots to a
prompt, 8 branches pooled over them. Both sides start from entropies, log-ratios, masks and token
ids, and end with positions; the selections of the rows that both computed must be equal
(`variant="released"`), or the script stops.

"published" is written here from the paper and the description of the released code: for each row an
L × L matrix of γ^(k-i), sum, clamp, exp, clip; z-scores over the valid tokens; one decode() a token
to find blank text; stable sorts in Python per prompt. At full size it takes minutes, so some rows
are timed and the median row is multiplied: the unit says which. "one matrix, table of blanks" is
the same with two repairs that change no result: the matrix is built once for rows of equal length,
and every id is decoded once, before the clock starts. Ours also gets its table of ids that way.
"""

from __future__ import annotations

import statistics
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import AutoTokenizer

import appo
from appo.kernels import branch_scores, half_life_to_gamma, select_branch_points

sys.path.append(str(Path(__file__).resolve().parents[2]))  # the checkout, for `bench`

from bench.common import Case, Timing, arguments, in_fresh_process, report, resident_bytes, timings

TOKENIZER = Path(appo.__file__).parent / "models" / "tiny_qwen3"
GAMMA, CLIP = half_life_to_gamma(32), 0.2
ROOTS, BRANCHES = 8, 8  # per prompt


class Batch(NamedTuple):
    """entropy, log_ratio float32, mask bool, ids int64: each [R, L].

    Row r belongs to prompt r // ROOTS.
    """

    entropy: Tensor
    log_ratio: Tensor
    mask: Tensor
    ids: Tensor

    def rows(self, count: int) -> Batch:
        return Batch(*(x[:count] for x in self))


def batch(rows: int, length: int, vocab: int) -> Batch:
    """Tool results (a fifth of the tokens) come in runs of 64.

    One token in twenty is the policy's own whitespace.
    """
    g = torch.Generator().manual_seed(0)
    entropy = torch.rand(rows, length, generator=g).square_().mul_(3)
    log_ratio = torch.randn(rows, length, generator=g).mul_(0.02)
    mask = (torch.rand(rows, length // 64 + 1, generator=g) > 0.2).repeat_interleave(64, 1)
    ids = torch.randint(vocab, (rows, length), generator=g)
    return Batch(entropy, log_ratio, mask[:, :length].contiguous(), ids)


def not_blank(tokenizer: Any) -> Tensor:
    """bool[V]: the text of an id is more than whitespace."""
    return torch.tensor([bool(tokenizer.decode([i]).strip()) for i in range(len(tokenizer))])


# Ours


def ours(b: Batch, table: Tensor, variant: str) -> Tensor:
    """[prompts, BRANCHES] positions in the flattened batch."""
    rows, length = b.mask.shape
    offsets = torch.arange(0, rows * length + 1, length)
    mask = b.mask.flatten()
    scores = branch_scores(
        b.entropy.flatten(), b.log_ratio.flatten(), mask, offsets,
        gamma=GAMMA, clip=CLIP, variant=variant,
    )  # fmt: skip
    eligible = mask & table[b.ids.flatten()]
    prompts = torch.arange(rows) // ROOTS
    return select_branch_points(scores, eligible, offsets, prompts, BRANCHES, variant).index


# The published form


def decay_matrix(length: int, dtype: torch.dtype) -> Tensor:
    at = torch.arange(length)
    distance = at[None, :] - at[:, None]  # [L, L] int64
    return torch.where(distance >= 0, torch.tensor(GAMMA, dtype=dtype) ** distance.clamp(min=0), 0)


def z_scores(x: Tensor, valid: Tensor) -> Tensor:
    values = x[valid]
    return (x - values.mean()) / (values.std(correction=0) + 1e-6)


def score_row(entropy: Tensor, future: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """(z of entropy, z of the clipped ratio), each [L]."""
    omega = future.clamp(-20, 20).exp().clamp(1 - CLIP, 1 + CLIP)
    return z_scores(entropy, mask), z_scores(omega, mask)


class Candidate(NamedTuple):
    score: float
    position: int
    strict: bool


def candidates(z_h: Tensor, z_o: Tensor, usable: list[bool], start: int) -> list[Candidate]:
    """Of one row, in order of position; `start` is the row's place in the flattened batch."""
    h, o, product = z_h.tolist(), z_o.tolist(), (z_h * z_o).tolist()
    return [
        Candidate(product[t], start + t, h[t] > 0 and o[t] > 0)
        for t, use in enumerate(usable)
        if use
    ]


def choose(found: list[Candidate]) -> list[int]:
    """Strict ones by score, then the others by score, then the chosen ones over again."""
    ranked = sorted(found, key=lambda c: -c.score)  # stable: ties keep the order of position
    chosen = [c.position for c in ranked if c.strict] + [c.position for c in ranked if not c.strict]
    chosen = chosen[:BRANCHES]
    return [chosen[i % len(chosen)] for i in range(BRANCHES)] if chosen else [-1] * BRANCHES


def published_row(b: Batch, row: int, tokenizer: Any, dtype: torch.dtype) -> list[Candidate]:
    mask, length = b.mask[row], b.mask.shape[1]
    future = decay_matrix(length, dtype) @ (b.log_ratio[row].to(dtype) * mask)
    z_h, z_o = score_row(b.entropy[row].to(dtype), future, mask)
    ids, valid = b.ids[row].tolist(), mask.tolist()
    usable = [v and bool(tokenizer.decode([i]).strip()) for i, v in zip(ids, valid)]
    return candidates(z_h, z_o, usable, row * length)


def published(
    b: Batch, tokenizer: Any, dtype: torch.dtype = torch.float32
) -> tuple[list[list[int]], Timing]:
    """(positions per prompt, median seconds of a row, its share of the choice included)."""
    walls, cpus, chosen = [], [], []
    for first in range(0, b.mask.shape[0], ROOTS):
        found: list[Candidate] = []
        for row in range(first, first + ROOTS):
            wall, cpu = time.perf_counter(), time.process_time()
            found += published_row(b, row, tokenizer, dtype)
            walls.append(time.perf_counter() - wall)
            cpus.append(time.process_time() - cpu)
        wall, cpu = time.perf_counter(), time.process_time()
        chosen.append(choose(found))
        wall, cpu = (time.perf_counter() - wall) / ROOTS, (time.process_time() - cpu) / ROOTS
        walls[-ROOTS:] = [w + wall for w in walls[-ROOTS:]]
        cpus[-ROOTS:] = [c + cpu for c in cpus[-ROOTS:]]
    return chosen, Timing(statistics.median(walls), statistics.median(cpus))


def repaired(b: Batch, table: Tensor) -> list[list[int]]:
    """The published form with one matrix for all rows and a table of blank ids."""
    rows, length = b.mask.shape
    future = (b.log_ratio * b.mask) @ decay_matrix(length, torch.float32).T
    usable = b.mask & table[b.ids]
    chosen = []
    for first in range(0, rows, ROOTS):
        found: list[Candidate] = []
        for row in range(first, first + ROOTS):
            z_h, z_o = score_row(b.entropy[row], future[row], b.mask[row])
            found += candidates(z_h, z_o, usable[row].tolist(), row * length)
        chosen.append(choose(found))
    return chosen


def memory(which: str, rows: int, length: int) -> int | None:
    """Peak resident bytes beyond the inputs, in a fresh process.

    The published form needs one row for its peak.
    """
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    table = not_blank(tokenizer)
    b = batch(rows, length, table.numel())
    runs = {
        "ours": partial(ours, b, table, "released"),
        "published": partial(published_row, b, 0, tokenizer, torch.float32),
        "one matrix, table of blanks": partial(repaired, b, table),
    }
    found = resident_bytes(runs[which])
    return None if found is None else found.peak


def main() -> None:
    args = arguments(__doc__ or "")
    torch.set_num_threads(1)
    rows, length, timed = (32, 512, 8) if args.quick else (768, 6144, 2 * ROOTS)
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    table = not_blank(tokenizer)
    b = batch(rows, length, table.numel())

    chosen, per_row = published(b.rows(timed), tokenizer)
    ours_chosen = ours(b, table, "released")
    assert ours_chosen[: timed // ROOTS].tolist() == chosen, "the selections differ"
    assert ours_chosen.tolist() == repaired(b, table), "the selections differ"

    runs = {
        "ours": partial(ours, b, table, "released"),
        "paper": partial(ours, b, table, "paper"),
    }
    seconds = timings(runs, 3 if args.quick else 5)
    strong = timings({"run": partial(repaired, b, table)}, 1, warm=False)["run"]
    scaled = f"published ({timed} rows timed, median × {rows})"
    cases = []
    for unit in Timing._fields:
        mine, paper, whole = (
            getattr(t, unit) for t in (seconds["ours"], seconds["paper"], per_row)
        )
        cases.append(Case(unit, "s", mine, {scaled: whole * rows}))
        cases.append(Case(f"{unit}, variant paper", "s", paper, {scaled: whole * rows}))
        repaired_peer = {"one matrix, table of blanks": getattr(strong, unit)}
        cases.append(Case(f"{unit}, repaired peer", "s", mine, repaired_peer))
    peaks = {
        name: in_fresh_process(memory, name, ROOTS if name == "published" else rows, length)
        for name in ("ours", "published", "one matrix, table of blanks")
    }
    if peaks["ours"] is not None:
        mib = {name: peak / 2**20 for name, peak in peaks.items()}
        mib[scaled] = mib.pop("published")  # one row at a time: the peak does not grow with rows
        cases.append(Case("peak memory", "MiB", mib.pop("ours"), mib))
    report(f"Branch scores and selection, {rows} rollouts × {length:,} tokens", cases, args)
    print(f"same selection: published on {timed // ROOTS} prompts, repaired on {rows // ROOTS}")


if __name__ == "__main__":
    main()
