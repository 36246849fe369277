"""What a choice keeps of experts' answers in people's manners, from what answers.py wrote.

    python research/answers_table.py research/marks/answers/smollm2-135m.parquet [OTHER ...]

First, for each manner: mean scores of tasks, of the base and of each prompt's own expert, and for
each choice how often it is the own expert, what is scored and which share of the own experts' score
that keeps. Then the points by which choices differ, in pairs, and by which each OTHER pool's scores
for the same prompts differ from the first pool's. Intervals of 95 % are over tasks and prompts.
"""

from __future__ import annotations

import sys
from itertools import chain, combinations
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from ceiling import told
from kept_by_reader import kept
from numpy.typing import NDArray

Column = NDArray[np.float64]


def main() -> None:
    first, *others = map(Path, sys.argv[1:])
    columns = read(first)
    show(first, columns)
    for place in others:
        other = read(place)
        show(place, other)
        if not np.array_equal(other["prompt"], columns["prompt"]):
            sys.exit(f"{place} has other prompts than {first}.")
        shared = ["own", *(by for by in choices_of(other) if by in choices_of(columns))]
        theirs = {f"score/{place.stem}, {by}": other[f"score/{by}"] for by in shared}
        pairs = [(f"{place.stem}, {by}", by) for by in shared]
        print(f"{differences(columns | theirs, pairs)}\n")


def read(place: Path) -> dict[str, Column]:
    table = pq.read_table(place)
    return {name: np.array(table[name].to_pylist()) for name in table.column_names}


def choices_of(columns: dict[str, Column]) -> list[str]:
    return [name.removeprefix("chosen/") for name in columns if name.startswith("chosen/")]


def show(place: Path, columns: dict[str, Column]) -> None:
    choices = choices_of(columns)
    pairs = list(combinations(choices, 2))
    print(f"{place}\n\n{scores(columns, choices)}\n\n{differences(columns, pairs)}\n")


def by_manner(columns: dict[str, Column]) -> dict[str, dict[str, Column]]:
    manners = dict.fromkeys(columns["manner"])
    return {
        manner: {name: values[columns["manner"] == manner] for name, values in columns.items()}
        for manner in manners
    }


def scores(columns: dict[str, Column], choices: list[str]) -> str:
    headings = " | ".join(f"{by}: right | score | kept" for by in choices)
    lines = [f"| manner | n | base | own | {headings} |"]
    lines.append("|---" * (4 + 3 * len(choices)) + "|")
    for manner, rows in by_manner(columns).items():
        tasks = rows["task"]
        means = [by_task(rows[f"score/{who}"], tasks) for who in ("base", "own")]
        cells = [manner, str(len(tasks)), *(f"{100 * mean:.1f}" for mean in means)]
        for by in choices:
            right = np.mean(rows[f"chosen/{by}"] == tasks)
            got = rows[f"score/{by}"]
            low, middle, high = kept(got, rows["score/own"], tasks)
            cells += [f"{100 * right:.0f}", f"{100 * by_task(got, tasks):.1f}"]
            cells.append(f"{middle:.0f} [{low:.0f}, {high:.0f}]")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def differences(columns: dict[str, Column], pairs: list[tuple[str, str]]) -> str:
    compared = dict.fromkeys(chain.from_iterable(pairs))
    lines = [f"| manner | {' | '.join(f'{one} - {other}' for one, other in pairs)} |"]
    lines.append("|---" * (1 + len(pairs)) + "|")
    for manner, rows in by_manner(columns).items():
        samples = {by: of_tasks(rows[f"score/{by}"], rows["task"]) for by in compared}
        found = told(samples, *pairs)
        cells = [
            "{:+.1f} [{:.1f}, {:.1f}]".format(*found[f"{one} - {other}"]) for one, other in pairs
        ]
        lines.append(f"| {manner} | {' | '.join(cells)} |")
    return "\n".join(lines)


def of_tasks(values: Column, tasks: Column) -> list[Column]:
    return [values[tasks == task] for task in np.unique(tasks)]


def by_task(values: Column, tasks: Column) -> float:
    """The mean of tasks' means."""
    return float(np.mean([some.mean() for some in of_tasks(values, tasks)]))


if __name__ == "__main__":
    main()
