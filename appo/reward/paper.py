"""Reward rules of published code, for comparison only.

`paper_score` is the rule of the APPO/ARPO authors. It looks at the whole text, so it cannot tell a
tag in a tool result from one the policy wrote, and it strips signs from numbers: the default
scoring does neither.
"""

from __future__ import annotations

from typing import Any

from appo.reward.format import last_boxed
from appo.reward.qa import token_f1


def paper_score(text: str, gold: Any, meta: dict[str, Any] | None = None) -> float:
    """-1 for a bad format, else token F1, +0.1 when F1 > 0 and both tools were called.

    `text`: the whole response.
    """
    if not _well_formed(text):
        return -1.0
    start = text.index("<answer>")
    boxed = last_boxed(text[start : text.index("</answer>", start)])
    if boxed is None:
        return -1.0
    f1 = token_f1(boxed, gold)
    both = "</search>" in text and "</python>" in text
    return f1 + 0.1 if f1 > 0 and both else f1


def _well_formed(text: str) -> bool:
    opened, closed = text.count("<think>"), text.count("</think>")
    if opened != closed or not opened:
        return False
    if text.count("<answer>") != 1 or text.count("</answer>") != 1:
        return False
    if text.index("<answer>") > text.index("</answer>"):
        return False
    return all(_calls_answered(text, tool) for tool in ("search", "python"))


def _calls_answered(text: str, tool: str) -> bool:
    """Each `<tool>` is closed, and behind it stands a closed `<result>`."""
    at = text.find(f"<{tool}>")
    while at >= 0:
        closed, result = text.find(f"</{tool}>", at), text.find("<result>", at)
        end = text.find("</result>", max(result, at))
        if not 0 <= closed < result < end:
            return False
        at = text.find(f"<{tool}>", end)
    return True


def tree_grpo_score(em: bool, well_formed: bool, has_answer: bool) -> float:
    """The Search-R1 rule that Tree-GRPO uses: exact match, less or plus a share for the format."""
    if em:
        return 1.0 if well_formed else 0.8
    if well_formed:
        return 0.2
    return 0.1 if has_answer else 0.0
