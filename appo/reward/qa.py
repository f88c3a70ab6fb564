"""Question answering.

Exact match and token F1 after SQuAD normalisation (Rajpurkar et al., 2016), best gold wins.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from typing import Any

from appo.errors import GraderError

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_CLOSED = {"yes", "no", "noanswer"}  # answers that earn nothing for partial overlap


def golds(gold: Any) -> list[str]:
    """The accepted answers as strings.

    Raises GraderError when there is none: nothing could ever be right.
    """
    values = list(gold) if isinstance(gold, (list, tuple)) else [gold]
    out = [str(v) for v in values if v is not None and str(v).strip()]
    if not out:
        raise GraderError("the gold answer is empty; drop this task (appo data fix)")
    return out


def normalise(text: str) -> str:
    """Lower case, no punctuation, no articles, single spaces."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact(answer: str, gold: Any, meta: dict[str, Any] | None = None) -> float:
    """1.0 when the answer is one of the golds, blanks at the ends aside."""
    return float(answer.strip() in [g.strip() for g in golds(gold)])


def exact_match(answer: str, gold: Any, meta: dict[str, Any] | None = None) -> float:
    """1.0 when the normalised answer is one of the normalised golds."""
    return float(normalise(answer) in [normalise(g) for g in golds(gold)])


def token_f1(answer: str, gold: Any, meta: dict[str, Any] | None = None) -> float:
    """Largest token F1 over the golds, in [0, 1]. yes / no / noanswer must match exactly."""
    return max(_f1(normalise(answer), normalise(g)) for g in golds(gold))


def _f1(answer: str, gold: str) -> float:
    if answer != gold and (answer in _CLOSED or gold in _CLOSED):
        return 0.0
    ours, theirs = answer.split(), gold.split()
    same = sum((Counter(ours) & Counter(theirs)).values())
    if same == 0:
        return 0.0
    precision, recall = same / len(ours), same / len(theirs)
    return 2 * precision * recall / (precision + recall)
