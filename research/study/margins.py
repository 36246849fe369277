"""How sure a discriminant is of its choices, and what it costs to leave it the unsure ones.

    python research/study/margins.py SUITE=LIMIT,… ROUTER OTHER RESULTS,… POOL…

ROUTER chooses for whole inputs by scores of the base's readings (discriminant, joint-discriminant);
the margin of a choice is the first expert's score less the second's. Told of every dataset (of
suites of the experts' own tasks, of those of POOL), and of each suite's on average: the mean of the
first scores, of the margins, and the share of margins above 0.2. RESULTS are results.jsonl of
`phatgoose compare` over the same suites and POOL, as many examples by seed 0, with rows of ROUTER
(one expert an input) and of OTHER; then, for several thresholds, the mean over datasets where OTHER
answers what ROUTER is less sure of, and its difference to OTHER's in pairs. Without results, ""
stands in their place.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from curves import routing_of
from numpy.typing import NDArray

from phatgoose.base import load_base
from phatgoose.evaluation.intervals import Sample, SharedMeans
from phatgoose.evaluation.results import ResultStore
from phatgoose.experts.pool import Pool
from phatgoose.routing.open_model import open_prompt_router
from phatgoose.routing.routers.registry import ROUTERS, translated
from phatgoose.tasks.encoding import Encoder
from phatgoose.tasks.suites.registry import open_suite
from phatgoose.tasks.task import Sources

THRESHOLDS = (0.0, 0.05, 0.1, 0.15, 0.2, 0.3)
Array = NDArray[np.float64]
Cell = tuple[list[str], list[Any]]  # metrics, and marks by example
Cells = dict[str, Cell]  # by dataset


def main(suites: str, router: str, other: str, results: str, *pools: str) -> None:
    """Tell the margins of every dataset, and what thresholds are worth."""
    pool, base = Pool.open(pools), load_base("smollm2")
    if "readings" not in ROUTERS[router].needs or not ROUTERS[router].per_input:
        sys.exit(f"Router {router} doesn't score whole inputs by what the base reads.")
    chooser = open_prompt_router(pool, base.tokenizer, router=router)
    margins, encoder = dict[str, Array](), Encoder.of(base)
    print("| dataset | first score | margin | above 0.2 |\n|---|---|---|---|")
    for asked in suites.split(","):
        suite, _, limit = asked.partition("=")
        opened = open_suite(suite)
        own = [entry for entry in opened.entries if entry.name in pool.names]
        told = []
        for entry in own or opened.entries:
            drawn = entry.read(Sources(None, None)).evaluation_examples(int(limit), 0)
            prompts = [pair.prompt for pair in encoder.pairs(drawn)]
            first, second = chooser.score(prompts, base.model).topk(2).values.T
            margin = margins[entry.name] = (first - second).double().numpy()
            told.append((float(first.mean()), margin.mean(), np.mean(margin > 0.2)))
            print(f"| {entry.name} | {line_of(told[-1])} |", flush=True)
        print(f"| mean of {len(told)}: {opened.name} | {line_of(np.mean(told, axis=0))} |")
    if results:
        rows = [cells(results.split(","), name, len(pool)) for name in (router, other)]
        tell(margins, *rows)


def line_of(told: Iterable[float]) -> str:
    """A first score, a margin and a share as cells of a table."""
    first, margin, share = told
    return f"{first:.2f} | {margin:.2f} | {share:.0%}"


def cells(paths: list[str], router: str, size: int) -> Cells:
    """The metrics and marks of each dataset that `router` was scored on with so many experts.

    Of one that chooses for whole inputs, those of one expert an input.
    """
    spec, found = ROUTERS[router], {}
    usual = translated({"router": router, "input_k": None})["router"]  # as it was by default then
    for path in paths:
        for key, result in ResultStore(Path(path)).items():
            method = key["method"]
            if not method.get("pool") or len(method["pool"]) != size:
                continue
            routing = routing_of(method)
            if routing["router"] == usual and (not spec.per_input or routing["k"] == 1):
                found[key["task"]] = result["metrics"], result["marks"]
    return found


def tell(margins: dict[str, Array], own: Cells, others: Cells) -> None:
    """Print, for each threshold, the mean score where `others` answer what is below it."""
    tasks = [task for task in margins if task in own and task in others]
    plain = [Sample.of(*others[task]) for task in tasks]
    print(f"\n| above | share | mean of {len(tasks)} | difference |\n|---|---|---|---|")
    for threshold in THRESHOLDS:
        sure = {task: margins[task] > threshold for task in tasks}
        mixed = [both(own[task], others[task], sure[task]) for task in tasks]
        means = SharedMeans.of({"mixed": mixed, "plain": plain})
        more, less = means.gain("mixed", "plain")
        told = f"{100 * more:+.1f} [{100 * less.low:+.1f}, {100 * less.high:+.1f}]"
        score = 100 * means.value["mixed"]
        print(f"| {threshold:g} | {mean(sure.values()):.0%} | {score:.1f} | {told} |")


def both(own: Cell, others: Cell, sure: NDArray[np.bool_]) -> Sample:
    """One dataset's marks: the own ones where it is `sure`, else the others'."""
    pairs = zip(own[1], others[1], sure, strict=True)
    return Sample.of(own[0], [mine if is_sure else theirs for mine, theirs, is_sure in pairs])


def mean(rows: Iterable[NDArray[Any]]) -> float:
    """The mean over datasets of the means within them."""
    return float(np.mean([np.mean(row) for row in rows]))


if __name__ == "__main__":
    main(*sys.argv[1:])
