"""One attempt to predict, on SmolLM2's marks, which expert helps on an unseen dataset.

    python research/transfer.py MARKS.parquet OUT.json

The rule was written into protocol-2.md before it was fitted. It was read once on the 24 datasets.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from ceiling import Array, Datasets, best, read, told

EXAMPLES, DRAWS, FITTING = 20, 20, 23
WEIGHTS = (1, 10, 100, 1000)  # of the ridge
WITHOUT_TARGETS = [0, 1, 2, 3, 6, 7]  # features


def attempt(data: Datasets) -> dict[str, Any]:
    """The rule of protocol-2.md, fitted on the first datasets by digest and read on the others."""
    order = sorted(data, key=lambda name: hashlib.blake2b(name.encode(), digest_size=8).digest())
    fitting, others = order[:FITTING], order[FITTING:]
    draws = {name: list(drawn(each)) for name, each in data.items()}
    mean = np.mean([each["embedding"].mean(axis=0) for each in data.values()], axis=0)
    for each in data.values():
        at = each["embedding"].mean(axis=0) - mean
        each["at"], each["form"] = at / np.linalg.norm(at), np.median(each["choices"])
        each["gain"] = (each["experts"] - each["base"][:, None]).mean(axis=0)
        near = each["discriminant"].mean(axis=0)
        each["near"] = (near - near.mean()) / near.std()

    def features(name: str, known: list[str]) -> Array:
        """[draws, experts, 8]."""
        known, mine = [other for other in known if other != name], data[name]
        gains = np.array([data[other]["gain"] for other in known])
        alike = [form(data[other]["form"]) == form(mine["form"]) for other in known]
        close = np.exp([10 * data[other]["at"] @ mine["at"] for other in known])
        same = gains[alike].mean(axis=0) if any(alike) else gains.mean(axis=0)
        first = [gains.mean(axis=0), same, close @ gains / close.sum(), mine["near"]]
        return np.array([np.column_stack([*first, *few]) for few, _, _ in draws[name]])

    def predictor(known: list[str], weight: float, used: list[int]) -> Callable[[Array], Array]:
        x = np.concatenate([features(name, known).reshape(-1, 8) for name in known])[:, used]
        y = np.concatenate([np.concatenate([gain for _, gain, _ in draws[n]]) for n in known])
        middle, spread = x.mean(axis=0), x.std(axis=0)
        z = (x - middle) / spread
        slopes = np.linalg.solve(z.T @ z + weight * np.eye(len(used)), z.T @ (y - y.mean()))
        return lambda new: y.mean() + (new[..., used] - middle) / spread @ slopes

    def error(weight: float, used: list[int]) -> float:
        squares = []
        for name in fitting:
            known = [other for other in fitting if other != name]
            guessed = predictor(known, weight, used)(features(name, known))
            squares.append(np.square(guessed - [gain for _, gain, _ in draws[name]]).mean())
        return float(np.mean(squares))

    rules: dict[str, Callable[[Array], Array]] = {"best on average": lambda x: x[..., 0]}
    rules["solves most"] = lambda x: x[..., 4] + 1e-3 * x[..., 5]
    found: dict[str, Any] = {"fitted on": fitting, "weight": {}}
    for rule, used in {"all features": list(range(8)), "without targets": WITHOUT_TARGETS}.items():
        weight = min(WEIGHTS, key=lambda weight: error(weight, used))
        found["weight"][rule], rules[rule] = weight, predictor(fitting, weight, used)
    columns = {"base": [data[n]["base"] for n in others]}
    columns["ceiling"] = [best(data[name]["experts"]) for name in others]
    for rule, predict in rules.items():
        columns[rule] = [taken(data[n], predict(features(n, fitting)), draws[n]) for n in others]
    found |= told(columns)
    return found | {"datasets": len(others), "n": sum(map(len, columns["base"]))}


def form(choices: float) -> int:
    return int(np.searchsorted([2, 5], choices))


def drawn(each: dict[str, Any]) -> Iterator[tuple[list[Array], Array, Array]]:
    """(features 5 to 8, gains on the other rows, these rows) of each draw of examples."""
    count, experts = len(each["base"]), each["experts"].shape[1]
    right, top, taken = (np.zeros((count, experts + 1)) for _ in range(3))
    for model, rows in enumerate(each["told"]):
        for row, values in enumerate(rows):
            values = np.asarray(values, float)
            total = np.logaddexp.reduce(values)
            right[row, model] = values[each["label"][row]] - total
            top[row, model], taken[row, model] = values.max(), values.argmax()
    gain = each["experts"] - each["base"][:, None]
    for seed in range(DRAWS):
        rows = np.random.default_rng(seed).permutation(count)
        few, rest = rows[:EXAMPLES], rows[EXAMPLES:]
        spread = np.array([entropy(column) for column in taken[few].T])
        yield (
            [
                gain[few].mean(axis=0),
                *((x[few, :-1] - x[few, -1:]).mean(axis=0) for x in (right, top)),
                spread[:-1] - spread[-1],
            ],
            gain[rest].mean(axis=0),
            rest,
        )


def entropy(values: Array) -> float:
    shares = np.unique(values, return_counts=True)[1] / len(values)
    return float(-(shares * np.log(shares)).sum())


def taken(each: dict[str, Any], guessed: Array, draws: list[Any]) -> Array:
    """Each row's mean score over the draws that it isn't an example of."""
    total, count = np.zeros(len(each["base"])), np.zeros(len(each["base"]))
    for values, (_, _, rest) in zip(guessed, draws, strict=True):
        rows = each["experts"][:, values.argmax()] if values.max() > 0 else each["base"]
        total[rest] += rows[rest]
        count[rest] += 1
    return total / count


if __name__ == "__main__":
    marks, out = map(Path, sys.argv[1:])
    out.write_text(json.dumps(attempt(read(marks, "unseen")), indent=1) + "\n")
