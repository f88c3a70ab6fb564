"""Scores of reasoning-gym tasks by their own scorers.

The entry is not sent to the worker: it is made again from (dataset, params, seed, index), which is
exact, small and survives JSON (metadata of an entry may hold tuples that its scorer wants back as
tuples).
"""

from __future__ import annotations

import json
from functools import lru_cache
from typing import Any

from appo.errors import GraderError

SIZE = (
    1 << 14
)  # entries per seed; they are made on demand, but some data sets plan all of them at construction


@lru_cache(maxsize=32)
def _dataset(name: str, seed: int, params: str) -> Any:
    import reasoning_gym

    return reasoning_gym.create_dataset(
        name, **{"size": SIZE} | json.loads(params) | {"seed": seed}
    )


def reasoning_gym_entry(recipe: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """(dataset, entry) of {"dataset", "seed", "index", "params"}."""
    params = json.dumps(recipe.get("params") or {}, sort_keys=True)
    dataset = _dataset(recipe["dataset"], int(recipe["seed"]), params)
    return dataset, dataset[int(recipe["index"])]


def reasoning_gym_score(answer: str, gold: Any, meta: dict[str, Any] | None = None) -> float:
    """Score in [0, 1] by the data set's own scorer.

    `meta["reasoning_gym"]` says which entry it is.
    """
    recipe = (meta or {}).get("reasoning_gym")
    if not recipe:
        raise GraderError(
            "grader 'reasoning_gym' needs meta['reasoning_gym'] = {dataset, seed, index, params}"
        )
    dataset, entry = reasoning_gym_entry(recipe)
    try:
        return float(dataset.score_answer(answer=answer, entry=entry))
    except (ArithmeticError, AttributeError, LookupError, SyntaxError, TypeError, ValueError):
        # some scorers raise for an answer they cannot read, such as letters where digits belong
        return 0.0
