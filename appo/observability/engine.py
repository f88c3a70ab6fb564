"""What the rollout engine did: its share of a step line, and its section of the report.

Read from the keys that a step's record has of it (`engine/*`, `memory/kv_*`, `time/tool_wait`); an
engine that does not count something is left out there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from appo.observability.card import md_table

RUN = ("engine/prefill_tokens", "engine/decode_tokens", "engine/scored_tokens")
ROWS = {
    "engine/prefill_tokens": "given tokens run (prompts, tool results, one per fork)",
    "engine/decode_tokens": "drawn tokens run",
    "engine/scored_tokens": "tokens run to score",
    "engine/tokens_saved": "tokens that independent sequences would have run more",
    "engine/prefix_hits_tokens": "prompt tokens taken from another prompt",
    "engine/forks": "forks",
    "engine/preemptions": "sequences sent back for want of KV memory",
    "engine/evicted_tokens": "tokens whose KV was dropped for want of memory",
}


def engine_parts(record: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(label, value) for the line of a step.

    Tokens saved, KV at its peak, time spent waiting for tools alone.
    """
    out = []
    saved, ran = record.get("engine/tokens_saved"), _ran(record)
    if saved is not None and ran:
        out.append(("saved", f"{saved:,.0f} ({(saved + ran) / ran:.1f}x)"))
    if (blocks := record.get("memory/kv_blocks_peak")) is not None:
        out.append(("kv", f"{blocks:,.0f} blocks ({record['memory/kv_mb_peak']:,.0f} MB)"))
    if (wait := record.get("time/tool_wait") or 0.0) >= 0.05:
        out.append(("tool wait", f"{wait:.1f} s"))
    return out


def engine_section(steps: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: totals over all steps, and how much sharing saved."""
    rows = []
    for key, words in ROWS.items():
        known = [float(r[key]) for r in steps if r.get(key) is not None]
        if known:
            rows.append([words, f"`{key}`", f"{sum(known):,.0f}"])
    if not rows:
        return "Nothing was counted."
    wait = sum(r.get("time/tool_wait") or 0.0 for r in steps)
    rows.append(["seconds in which only tools ran", "`time/tool_wait`", f"{wait:.1f}"])
    peaks = [r["memory/kv_mb_peak"] for r in steps if r.get("memory/kv_mb_peak") is not None]
    if peaks:
        rows.append(["KV at its peak, MB", "`memory/kv_mb_peak`", f"{max(peaks):,.1f}"])
    text = md_table(["what", "key", "all steps"], rows, 2)
    saved = sum(r.get("engine/tokens_saved") or 0.0 for r in steps)
    ran = sum(_ran(r) for r in steps)
    if saved > 0 and ran:
        text += (
            f"\n\nThe trees took {ran:,.0f} tokens; as many sequences of their own, each with its own KV, would have taken "
            f"{ran + saved:,.0f}, {(ran + saved) / ran:.2f} times as many."
        )
    return text


def _ran(record: Mapping[str, Any]) -> float:
    return sum(float(record.get(key) or 0.0) for key in RUN)
