"""Fields that were called something else until 0.1, so that files of older runs can still be read.

A reader of run files passes each record through `in_todays_words`; nothing writes the old names.
"""

from __future__ import annotations

from typing import Any

# old name → name of today
METRICS = {
    "policy/kl_anchor": "policy/kl_old_logp",
    "policy/log_ratio_behaviour": "policy/log_ratio_behavior",
    "branch/omega_flat": "branch/omega_uninformative",
    "time/anchors": "time/old_logprobs",
}
BRANCHES = {"flat": "omega_uninformative"}  # of a prompt's roots, and of a branch point
NODE = {"anchor": "old_logp"}  # of a node of a saved tree
ROOTS = {"baseline": "reference_logp"}  # of a saved root that waits for its branches

_RECORD = METRICS | BRANCHES


def in_todays_words(record: dict[str, Any], names: dict[str, str] = _RECORD) -> dict[str, Any]:
    """`record` with today's field names, its `rows` (branches.jsonl) included. Order is kept."""
    out = {names.get(key, key): value for key, value in record.items()}
    if isinstance(rows := out.get("rows"), list):
        out["rows"] = [in_todays_words(r, names) if isinstance(r, dict) else r for r in rows]
    return out
