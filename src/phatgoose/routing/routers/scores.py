"""Scores of every single expert on every task, which Oracle and Best Individual choose by."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from ...config import Routing
from ...errors import ConfigError, PoolError
from ...files.quoting import reason, shortened
from ...files.strict_json import read_json_object

__all__ = ["Scores", "best_expert", "best_expert_by_task", "given_scores", "read_scores"]

Scores = Mapping[str, Mapping[str, float]]  # expert -> task -> score
EXPERTS = "experts"  # the key under which a comparison's JSON file holds them


def read_scores(path: str | Path) -> Scores:
    """The single experts' scores in the JSON file that `phatgoose compare` wrote.

    Raises PoolError when the file can't be read or holds none.
    """
    path = Path(path)
    try:
        scores = read_json_object(path, PoolError)[EXPERTS]
        found = {
            str(expert): {str(task): float(score) for task, score in tasks.items()}
            for expert, tasks in scores.items()
        }
        numbers = [list(tasks.values()) for tasks in found.values()]
        if not numbers or not all(row and all(map(math.isfinite, row)) for row in numbers):
            raise ValueError("no finite scores")
        return found
    except OSError as error:
        raise PoolError(f"Scores {path} can't be read: {reason(error)}.") from error
    except (PoolError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise PoolError(
            f"{path} holds no scores of single experts; wanted the comparison.json of a 'phatgoose "
            f"compare' that ran every single expert."
        ) from error


def given_scores(scores: Scores | None, routing: Routing) -> Scores:
    """`scores`, which the router can't do without.

    Raises ConfigError when there are none, PoolError when they are none by expert and task.
    """
    if scores is None:
        raise ConfigError(
            f"Router {routing.router} needs the scores of every single expert: those of a finished "
            f"'phatgoose compare' (--scores comparison.json)."
        )
    if not isinstance(scores, Mapping) or not all(isinstance(s, Mapping) for s in scores.values()):
        raise PoolError(f"scores are {shortened(scores)}; wanted expert -> task -> score.")
    return scores


def best_expert(scores: Scores, names: Sequence[str]) -> str:
    """The one of `names` with the best mean over all tasks; the first of equals.

    Raises PoolError when an expert was not scored, or not on the same tasks as the others.
    """
    tasks = _common_tasks(scores, names)
    return max(names, key=lambda name: sum(scores[name][task] for task in tasks))


def best_expert_by_task(scores: Scores, names: Sequence[str]) -> dict[str, str]:
    """For each task the one of `names` with the best score; the first of equals.

    Raises PoolError when an expert was not scored, or not on the same tasks as the others.
    """
    tasks = _common_tasks(scores, names)
    return {task: max(names, key=lambda name: scores[name][task]) for task in tasks}


def _common_tasks(scores: Scores, names: Sequence[str]) -> list[str]:
    for name in names:
        if name not in scores:
            raise PoolError(f"Expert {name!r} has no scores; they are of {', '.join(scores)}.")
        if set(scores[name]) != set(scores[names[0]]):
            raise PoolError(f"Experts {names[0]!r} and {name!r} were scored on different tasks.")
    return list(scores[names[0]])
