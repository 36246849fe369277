"""Scores against the size of the pool, from cells of comparisons (paper section 4.3)."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import EvaluationError
from ..evaluation.comparison.methods import METHODS, label_with_settings, routing_of
from ..evaluation.comparison.result_store import ResultStore
from ..evaluation.intervals import Sample
from ..files import one_line, shortened

# What reading a result that compare didn't write may raise.
FOREIGN = (LookupError, TypeError, ValueError, AttributeError, ArithmeticError)

Dataset = tuple[str, str]  # its task and the digest of its examples
Pools = dict[tuple[str, ...], dict[Dataset, float]]  # scores by the pool's members and dataset


@dataclass(frozen=True)
class PoolSizeCurve:
    """A router's mean scores over `datasets`, one for each pool, by the pools' size."""

    label: str
    datasets: tuple[str, ...]
    scores: Mapping[int, tuple[float, ...]]


def pool_size_curves(path: str | Path) -> list[PoolSizeCurve]:
    """A curve for each router that the results at `path` have with at least two sizes of pool.

    It is over the datasets on which all its pools were scored, with the same examples. Raises
    EvaluationError when the file is missing, damaged or not a comparison's, or holds no two sizes.
    """
    if not Path(path).is_file():
        raise EvaluationError(f"Results {path} don't exist; wanted a results.jsonl of compare.")
    lines: dict[str, Pools] = defaultdict(lambda: defaultdict(dict))
    for key, result in ResultStore(path).items():
        try:
            _add(key, result, lines)
        except (*FOREIGN, EvaluationError) as error:
            raise EvaluationError(
                f"{path} is no results.jsonl of compare: the result of {shortened(key)} can't be "
                f"read ({type(error).__name__}: {one_line(error)})."
            ) from error
    curves = [_curve(json.loads(same)[2], pools) for same, pools in lines.items()]
    found = [curve for curve in curves if curve is not None]
    if not found:
        raise EvaluationError(
            f"{path} has no router with pools of two sizes on the same datasets; run 'phatgoose "
            f"compare' with fewer experts into the same --out."
        )
    order = {label: place for place, label in enumerate(METHODS.values())}
    return sorted(found, key=lambda curve: order.get(curve.label.split(",")[0], len(order)))


def _add(key: Any, result: Any, lines: dict[str, Pools]) -> None:
    method = dict(key["method"])
    members = tuple(sorted(map(str, method.get("pool", ()))))
    if not members or method.get("router") in (None, "single"):
        return
    method = routing_of(method)  # those of earlier versions join those of this one
    same = json.dumps([key["base"], key["dtype"], method], sort_keys=True)
    label_with_settings(method)  # refuses what is no router's
    if not result["marks"]:
        raise ValueError("it has no marks")
    score = Sample.of(result["metrics"], result["marks"]).score
    if not math.isfinite(score):
        raise ValueError(f"its score is {score}")
    lines[same][members][str(key["task"]), str(key["examples"])] = score


def _curve(method: Mapping[str, Any], pools: Pools) -> PoolSizeCurve | None:
    common = set.intersection(*(set(cells) for cells in pools.values()))
    scores: dict[int, list[float]] = defaultdict(list)
    for members, cells in pools.items() if common else ():
        scores[len(members)].append(sum(cells[cell] for cell in common) / len(common))
    if len(scores) < 2:
        return None
    return PoolSizeCurve(
        label_with_settings(method),
        tuple(sorted({task for task, _ in common})),
        {size: tuple(scores[size]) for size in sorted(scores)},
    )
