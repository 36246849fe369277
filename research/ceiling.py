"""What routing could gain where no expert is a task's own, from the marks, without a model.

    cd research && python ceiling.py marks/smollm2-135m-tails.parquet marks/gemma-3-270m.parquet \
        ceiling.json ../docs/figures/ceiling.png

As protocol-2.md says: the ceiling is of unseen tasks in the first file, and of its own tasks in new
wordings with the task's own expert away; the trap, likeliest answers, is of every file. Points have
95 % intervals over datasets and examples, in pairs: [value, low, high].
"""

from __future__ import annotations

import json
import sys
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray
from pyarrow import parquet

from phatgoose.evaluation.metrics import Sample, SharedMeans

Array = NDArray[Any]
HALVINGS = 20
GREY, BLUE, ORANGE = "#999999", "#0072B2", "#D55E00"
SHARES = {
    "discriminant, known wordings": ("trap/known/discriminant - 0", GREY),
    "discriminant, new wordings": ("trap/new/discriminant - 0", BLUE),
    "likeliest answer, known wordings": ("trap/known/likeliest answer - 0", GREY),
    "likeliest answer, new wordings": ("trap/new/likeliest answer - 0", ORANGE),
}
GAINS = {
    "unseen tasks: best expert": ("ceiling/best expert - base", ORANGE),
    "best random LoRA": ("ceiling/best twin - base", GREY),
    "PHATGOOSE": ("ceiling/phatgoose - base", BLUE),
    "discriminant": ("ceiling/discriminant - base", BLUE),
    "own expert away: best other": ("away/best other - base", ORANGE),
    "a random other": ("away/random other - base", GREY),
    "discriminant among others": ("away/discriminant - base", BLUE),
}
Datasets = dict[str, dict[str, Any]]


def main() -> None:
    """Write the findings and draw them."""
    *marks, out, figure = map(Path, sys.argv[1:])
    found = {"ceiling": ceiling(read(marks[0], "unseen"))}
    found["away"] = without_own(read(marks[0], "new"))
    found["trap"] = trap(marks[0])
    found |= {f"trap, {place.stem}": trap(place) for place in marks[1:]}
    out.write_text(json.dumps(found, indent=1) + "\n")
    draw(found).savefig(figure)


def read(place: Path, wording: str) -> Datasets:
    """The marks of each dataset: arrays of rows, experts in the second axis."""
    table = parquet.read_table(place)
    names = json.loads(table.schema.metadata[b"phatgoose"])["experts"]
    columns = {name: np.array(table[name].to_pylist(), object) for name in table.column_names}
    found = {}
    for task in dict.fromkeys(columns["task"][columns["wording"] == wording]):
        rows = np.flatnonzero((columns["wording"] == wording) & (columns["task"] == task))
        of = {name: column[rows] for name, column in columns.items()}
        found[task] = {
            "experts": np.array([of[f"score/expert/{name}"] for name in names], float).T,
            "base": of["score/base"].astype(float),
            "choices": of["choices"].astype(int),
            "label": of["label"].astype(int),
            "discriminant": np.stack(of["choice/discriminant"]).astype(float),
            "embedding": np.stack(of["embedding"]).astype(float),
            "told": [
                of[f"likelihoods/{name}"] for name in (*map("expert/{}".format, names), "base")
            ],
            "own": names.index(task) if task in names else None,
        }
        if twins := [of[name] for name in of if name.startswith("score/random/")]:
            found[task]["twins"] = np.array(twins, float).T
            found[task]["phatgoose"] = of["score/routed/phatgoose"].astype(float)
    return found


def best(scores: Array) -> Array:
    """Each row's score by the column that is best on the other half, over random halvings."""
    total = np.zeros(len(scores))
    for seed in range(HALVINGS):
        halves = np.random.default_rng(seed).permutation(len(scores)) % 2
        for half in (0, 1):
            chosen = scores[halves != half].mean(axis=0).argmax()
            total[halves == half] += scores[halves == half, chosen]
    return total / HALVINGS


def told(columns: dict[str, list[Array]], *pairs: tuple[str, str]) -> dict[str, Any]:
    """Points of every column above the first one, and of `pairs`: value, low, high."""
    kind, (base, *others) = ("accuracy",), columns
    samples = {n: [Sample(kind, (rows[:, None],)) for rows in c] for n, c in columns.items()}
    means, found = SharedMeans.of(samples), {}
    for name, other in (*((name, base) for name in others), *pairs):
        more = means.gain(name, other)
        found[f"{name} - {other}"] = [round(100 * x, 2) for x in (more.value, more.low, more.high)]
    return found


def ceiling(data: Datasets) -> dict[str, Any]:
    """What the best expert would gain, and what was gained; by dataset too."""
    columns = {
        "base": [each["base"] for each in data.values()],
        "best expert": [best(each["experts"]) for each in data.values()],
        "best twin": [best(each["twins"]) for each in data.values()],
        "phatgoose": [each["phatgoose"] for each in data.values()],
        "discriminant": [chosen(each["experts"], each["discriminant"]) for each in data.values()],
    }
    found = told(columns, ("best expert", "best twin"))
    apart = zip(data, columns["best expert"], columns["base"], strict=True)
    gains = {name: round(100 * (a.mean() - b.mean()), 1) for name, a, b in apart}
    found["by dataset"] = dict(sorted(gains.items(), key=lambda item: -item[1]))
    return found | {"datasets": len(data), "n": sum(map(len, columns["base"]))}


def chosen(scores: Array, by: Array) -> Array:
    return scores[np.arange(len(scores)), by.argmax(axis=1)]


def without_own(data: Datasets) -> dict[str, Any]:
    """The same of own tasks whose expert is away."""
    others = [np.delete(each["experts"], each["own"], axis=1) for each in data.values()]
    near = [np.delete(each["discriminant"], each["own"], axis=1) for each in data.values()]
    columns = {
        "base": [each["base"] for each in data.values()],
        "best other": list(map(best, others)),
        "discriminant": list(map(chosen, others, near)),
        "random other": [each.mean(axis=1) for each in others],
    }
    return told(columns, ("discriminant", "random other"), ("best other", "random other"))


def trap(place: Path) -> dict[str, Any]:
    """How many per cent of prompts with choices are given to their own expert, by two rules."""
    found = {}
    for wording in ("known", "new"):
        asked = [each for each in read(place, wording).values() if (each["choices"] > 0).all()]
        columns: dict[str, list[Array]] = {"0": [], "likeliest answer": [], "discriminant": []}
        for each in asked:
            top = np.array([[max(x) for x in rows] for rows in each["told"][:-1]])
            found_by = top.argmax(axis=0), each["discriminant"].argmax(axis=1)
            right = [(rule == each["own"]).astype(float) for rule in found_by]
            for held, rows in zip(columns.values(), (0 * right[0], *right), strict=True):
                held.append(rows)
        found[wording] = told(columns)
        found[wording] |= {"tasks": len(asked), "n": sum(map(len, columns["0"]))}
    return found


def draw(found: dict[str, Any]) -> Figure:
    """Left who finds the own expert, right what is gained where there is none."""
    figure = Figure(figsize=(9, 3.1), dpi=150, layout="constrained")
    titles = "recognition is solved", "predicting transfer is not"
    units = "% of prompts given to their own expert", "points above the base"
    for panel, lines, *words in zip(
        figure.subplots(1, 2), (SHARES, GAINS), titles, units, strict=True
    ):
        for row, (place, colour) in enumerate(lines.values()):
            value, low, high = reduce(getitem, place.split("/"), found)
            panel.plot([low, high], [row, row], color=colour)
            panel.plot(value, row, "o", color=colour)
        panel.axvline(0, color="0.5", linewidth=0.8)
        panel.set_yticks(range(len(lines)), list(lines))
        panel.set(title=words[0], xlabel=words[1])
        panel.invert_yaxis()
    return figure


if __name__ == "__main__":
    main()
