"""The numeric vectors of the algorithm's definition.

Plain data in tests/golden/, looked up by id.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

PATH = Path(__file__).parents[1] / "golden" / "algorithm_vectors.json"


@functools.cache
def _by_id() -> dict[str, dict[str, Any]]:
    vectors = json.loads(PATH.read_text())["vectors"]
    found = {v["id"]: v for v in vectors}
    assert len(found) == len(vectors), "two vectors share an id"
    return found


def vector(vector_id: str) -> dict[str, Any]:
    """{"inputs", "params", "expected", "tol", "title", "source", "notes"} of one vector.

    KeyError if there is none.
    """
    return _by_id()[vector_id]


def ids() -> list[str]:
    return list(_by_id())
