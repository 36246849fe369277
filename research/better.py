"""How often a recorded gain tells spoiled experts from good ones (docs/pools.md).

    python research/better.py research/marks [--rows 30] [--pools 200]

It reads marks (`marks.py`): how a base, each expert alone and each expert's random twin, a LoRA of
random weights as strong as the expert's, answered examples of the experts' own tasks in new
wordings. A pool is all experts of a file, four of them replaced by their random twins. So many
examples of each one's task are drawn, and the gain on these is what `phatgoose stats` would record.
Printed are, over all pools, how many of the random and of the trained ones are named as no better
than the base; then of the trained ones whose gain on all rows is at least 15 points; then each
trained expert's gain on all rows.
"""

from __future__ import annotations

import argparse
import random
from collections import Counter
from pathlib import Path

import numpy as np

from phatgoose.evaluation.gain import CONFIDENCE
from phatgoose.evaluation.metrics import Array, Estimate, Sample, SharedMeans
from phatgoose.evaluation.replay import Marks, read_marks

SPOILED = 4
CLEAR = 0.15


def main() -> None:
    """Draw pools of each base."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("marks", type=Path)
    parser.add_argument("--rows", type=int, default=30)
    parser.add_argument("--pools", type=int, default=200)
    given = parser.parse_args()
    for path in sorted(given.marks.glob("*.parquet")) or [given.marks]:
        (marks,) = read_marks(path)
        if any(f"score/random/{name}" in marks.columns for name in marks.experts):
            report(path.stem, marks, given.rows, given.pools)


def report(label: str, marks: Marks, rows: int, pools: int) -> None:
    whole = {name: gain(marks, "expert", name, own_rows(marks, name)) for name in marks.experts}
    named = Counter[str]()
    drawn = Counter[str]()
    for number in range(pools):
        rng = random.Random(number)
        spoiled = rng.sample(marks.experts, SPOILED)
        for name in marks.experts:
            kind = "random" if name in spoiled else "expert"
            own = own_rows(marks, name)
            some = np.array(rng.sample(own.tolist(), min(rows, len(own))))
            is_named = gain(marks, kind, name, some).low <= 0
            kinds = [kind]
            if kind == "expert" and whole[name].value >= CLEAR:
                kinds.append("expert of 15 points or more")
            for each in kinds:
                drawn[each] += 1
                named[each] += is_named
    for kind, count in drawn.items():
        print(f"{label}: {kind}: {named[kind]} of {count} named ({named[kind] / count:.1%})")
    for name, estimate in whole.items():
        print(f"    {name} {estimate.in_points}", flush=True)


def own_rows(marks: Marks, name: str) -> Array:
    columns = marks.columns
    return ((columns["task"] == name) & (columns["wording"] == "new")).nonzero()[0]


def gain(marks: Marks, kind: str, name: str, rows: Array) -> Estimate:
    columns = {"base": "score/base", "model": f"score/{kind}/{name}"}
    samples = {}
    for model, column in columns.items():
        values = marks.columns[column][rows].astype(float)
        samples[model] = [Sample(("accuracy",), (values[:, None],))]
    return SharedMeans.of(samples).gain("model", "base", CONFIDENCE)


if __name__ == "__main__":
    main()
