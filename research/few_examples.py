"""What router few-shot scores, by marks: an expert for a whole task, chosen by a few examples.

    python research/few_examples.py research/marks/smollm2-135m-tails.parquet [N ...] [--after ROWS]

Of each task with choices N examples are drawn, 20 times, and the other ones are scored; `--after`
leaves out the first rows of every task. The expert is the one with the highest mean score of
`discriminant` (`without targets`), or, as few-shot does with targets, whichever of the five with
the highest scores and the base solves most of the N examples, of equals the likeliest. `likeliest`
goes by the targets' likelihoods alone, and `of all` asks all experts. Intervals are over tasks,
95 %.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pyarrow import parquet

from phatgoose.evaluation.metrics import Estimate

Array = NDArray[Any]
DRAWS, SHORTLIST, REPLICATES = 20, 5, 10_000
ROWS = ("base", "random expert", "own expert", "without targets", "with targets")
ROWS += ("likeliest", "of all")


def main(arguments: list[str] | None = None) -> None:
    """Print tables for own tasks in new wordings, and for unseen tasks."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("marks", type=Path)
    parser.add_argument("counts", type=int, nargs="*", default=[5, 20, 50], metavar="N")
    parser.add_argument("--after", type=int, default=0, metavar="ROWS")
    given = parser.parse_args(arguments)
    table = parquet.read_table(given.marks)
    names = json.loads(table.schema.metadata[b"phatgoose"])["experts"]
    columns = {name: np.array(table[name].to_pylist(), object) for name in table.column_names}
    for wording in ("new", "unseen"):
        for n in given.counts:
            if found := list(tasks_of(columns, names, wording, n, given.after)):
                tell(wording, n, found)


def tasks_of(
    columns: dict[str, Array], names: list[str], wording: str, n: int, after: int
) -> Iterator[Array]:
    """The scores of ROWS on each task, means over draws; NaN where a row doesn't apply."""
    chosen = (columns["wording"] == wording) & (columns["label"].astype(int) >= 0)
    models = [*(f"expert/{name}" for name in names), "base"]
    for task in dict.fromkeys(columns["task"][chosen]):
        rows = np.flatnonzero(chosen & (columns["task"] == task))[after:]
        if len(rows) < 2 * n:  # too few to score
            continue
        labels = columns["label"][rows].astype(int)
        scores = np.array([columns[f"score/{m}"][rows] for m in models], float)
        told = [
            [x[i] for x, i in zip(columns[f"likelihoods/{model}"][rows], labels, strict=True)]
            for model in models
        ]
        near = np.stack(columns["choice/discriminant"][rows]).astype(float)
        own = names.index(task) if task in names else None
        draws = np.random.default_rng(0).permuted(np.tile(np.arange(len(rows)), (DRAWS, 1)), axis=1)
        found = [_of_draw(d[:n], d[n:], scores, np.array(told), near, own) for d in draws]
        yield np.mean(found, axis=0)


def _of_draw(
    few: Array, rest: Array, scores: Array, told: Array, near: Array, own: int | None
) -> list[float]:
    order, likely = near[few].mean(axis=0).argsort()[::-1], told[:, few].mean(axis=1)
    listed = np.array([*order[:SHORTLIST], len(scores) - 1])  # the last is the base
    ranked = np.lexsort([likely, scores[:, few].mean(axis=1)])  # the best comes last
    mean = scores[:, rest].mean(axis=1)
    in_domain = float("nan") if own is None else mean[own]
    with_targets = ranked[np.isin(ranked, listed)][-1]
    chosen = [order[0], with_targets, listed[likely[listed].argmax()], ranked[-1]]
    return [mean[-1], mean[:-1].mean(), in_domain, *mean[chosen]]


def tell(wording: str, n: int, scores: list[Array]) -> None:
    """Print means over tasks, and differences to the base in pairs."""
    values = 100 * np.array(scores)
    drawn = np.random.default_rng(0).integers(len(values), size=(REPLICATES, len(values)))
    print(f"\n{wording}, {n} examples: {len(values)} tasks\n")
    print("| | mean | less the base |\n|---|---|---|")
    for name, column in zip(ROWS, values.T, strict=True):
        if not np.isnan(column).any():
            apart = column - values[:, 0]
            more = Estimate.of(apart.mean(), apart[drawn].mean(axis=1))
            between = f"[{more.low:.1f}, {more.high:.1f}]"
            print(f"| {name} | {column.mean():.1f} | {more.value:+.1f} {between} |")


if __name__ == "__main__":
    main()
