"""Scores against the size of the pool, from the runs of comparisons (paper section 4.3)."""

from __future__ import annotations

import json
import math
import textwrap
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator

from phatgoose.analysis.figures import counted, look_of, styled
from phatgoose.errors import EvaluationError
from phatgoose.evaluation.intervals import Sample
from phatgoose.evaluation.results import ResultStore
from phatgoose.evaluation.rows import METHODS, label_of
from phatgoose.files import one_line, shortened
from phatgoose.routing.routers.registry import ROUTERS

LONGEST_LABEL = 28  # characters of a line in a legend
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


def label_with_settings(identity: Mapping[str, Any]) -> str:
    """The router of a row's `identity` with its settings, such as "Arrow, form = peft, k = 3"."""
    now = routing_of(identity)
    spec = ROUTERS.get(now["router"].partition(":")[0])
    own = spec.k if spec else now.get("k")
    k = [] if now.get("k") in (None, own) else [f"k = {now['k']}"]
    kernel = [] if now.get("kernel", "auto") == "auto" else [f"kernel = {now['kernel']}"]
    return ", ".join([label_of(now["router"]), *k, *kernel])


def routing_of(identity: Mapping[str, Any]) -> dict[str, Any]:
    """What a row's `identity` says of router, k and kernel."""
    now = {name: value for name, value in identity.items() if name not in ("pool", "given")}
    spec = ROUTERS.get(now["router"].partition(":")[0])
    if spec and now.get("k", spec.k) is None:
        now["k"] = spec.k
    return now


@styled
def pool_size_figure(curves: Sequence[PoolSizeCurve]) -> Figure:
    """Mean score by number of experts, a line per curve; faint points are single pools."""
    figure = Figure(figsize=(7.6, 3.8), layout="constrained")
    panel = figure.subplots()
    counts = {len(curve.datasets) for curve in curves}
    for index, curve in enumerate(curves):
        look = look_of(index)
        sizes = list(curve.scores)
        means = [100 * float(np.mean(curve.scores[size])) for size in sizes]
        label = curve.label if len(counts) == 1 else f"{curve.label} ({len(curve.datasets)})"
        label = textwrap.fill(label, LONGEST_LABEL)
        panel.plot(sizes, means, **look, label=label)
        for size in sizes:
            pools = [100 * score for score in curve.scores[size]]
            panel.plot([size] * len(pools), pools, **look, linestyle="", alpha=0.35, markersize=4)
    every_size = sorted({size for curve in curves for size in curve.scores})
    panel.xaxis.set_major_locator(FixedLocator(every_size, nbins=10))
    panel.set_xlabel("experts in the pool")
    of = "(n) datasets" if len(counts) > 1 else counted(counts.pop(), "dataset")
    panel.set_ylabel(f"mean score over {of}, in %")
    figure.legend(loc="outside right upper", fontsize=8)
    return figure
