"""Scores of every single expert on every task, which oracle and best-individual choose by."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...errors import PoolError
from ...files import read_json, shortened

Scores = Mapping[str, Mapping[str, float]]  # expert -> task -> score
EXPERTS = "experts"  # the key under which a comparison's JSON file holds them


def read_scores(path: str | Path) -> Scores:
    """Single experts' scores of a comparison.json. Raises PoolError."""
    try:
        return checked_scores(read_json(Path(path), dict, PoolError)[EXPERTS])
    except (PoolError, KeyError) as error:
        raise PoolError(
            f"{path} holds no scores of single experts; wanted the comparison.json of a 'phatgoose "
            f"compare' that ran every single expert."
        ) from error


def checked_scores(scores: Any) -> Scores:
    """`scores` as Scores. Raises PoolError if they are none."""
    try:
        numbers = {
            str(expert): {str(task): float(score) for task, score in tasks.items()}
            for expert, tasks in scores.items()
        }
    except (ValueError, TypeError, AttributeError):
        numbers = {}
    rows = [list(tasks.values()) for tasks in numbers.values()]
    if not rows or not all(row and all(map(math.isfinite, row)) for row in rows):
        raise PoolError(
            f"scores are {shortened(scores)}; wanted expert -> task -> score, finite numbers."
        )
    return numbers


def best_expert(scores: Scores, names: Sequence[str]) -> str:
    """The one of `names` with the best mean over all tasks; PoolError where scores are missing."""
    tasks = _common_tasks(scores, names)
    return max(names, key=lambda name: sum(scores[name][task] for task in tasks))


def best_expert_by_task(scores: Scores, names: Sequence[str]) -> dict[str, str]:
    """For each task the best one of `names`; PoolError where scores are missing."""
    tasks = _common_tasks(scores, names)
    return {task: max(names, key=lambda name: scores[name][task]) for task in tasks}


def _common_tasks(scores: Scores, names: Sequence[str]) -> list[str]:
    for name in names:
        if name not in scores:
            raise PoolError(f"Expert {name!r} has no scores; they are of {', '.join(scores)}.")
        if set(scores[name]) != set(scores[names[0]]):
            raise PoolError(f"Experts {names[0]!r} and {name!r} were scored on different tasks.")
    return list(scores[names[0]])
