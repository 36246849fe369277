"""What docs hold of the study's comparisons: cells without answers, tables, figures.

    python research/study/report.py cells OUT RESULTS…        cells of compare, without any answer
    python research/study/report.py whole OUT CELLS           those of the base and the largest pool
                                                              that were scored on most datasets
    python research/study/report.py variants CELLS OUT.md     every model against plain PHATGOOSE,
                                                              or another, whose label may follow
    python research/study/report.py together CELLS OUT.md     the same of those models alone that
                                                              were scored on most datasets; names
                                                              of some to leave out may follow
    python research/study/report.py balanced CELLS OUT.md SUITE=LIMIT…
                                                              the same with each answer's place in
                                                              the choices counted alike
    python research/study/report.py datasets CELLS OUT.md     every dataset a row, those models as
                                                              columns
    python research/study/report.py above-chance CELLS TASKS  datasets where something is above it
    python research/study/report.py figure CELLS OUT.png      every dataset, every model, as dots
    python research/study/report.py sizes CELLS OUT.png       scores against the size of the pool;
                                                              sizes to leave out may follow
    python research/study/report.py analysis JSON OUT.json    what `analyse` found over whole models

RESULTS is a results.jsonl of `phatgoose compare`, or LABEL=FILE, where LABEL is added to what its
models are called; CELLS is one of those or what `cells` wrote, TASKS the tasks.json of the data.
Answers stay where they are: they may quote data that is not ours.
"""

from __future__ import annotations

import inspect
import json
import lzma
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from curves import label_with_settings, pool_size_curves, pool_size_figure
from numpy.typing import NDArray

from phatgoose.analysis.figures import write_png
from phatgoose.evaluation.intervals import Sample, SharedMeans
from phatgoose.evaluation.results import ResultStore, Summary
from phatgoose.evaluation.rows import DERIVED, METHODS
from phatgoose.tasks.suites.registry import open_suite
from phatgoose.tasks.task import Example, Sources

Model = str
Pool = tuple[str, ...]
Scores = dict[Model, dict[str, "Cell"]]  # by model and dataset
KEPT = ("metric", "metrics", "score", "n", "low", "high", "seconds", "rows")
OF_WHOLE_MODELS = ("settings", "oracle", "divergences", "correlations")
REFERENCE = METHODS["phatgoose"]
ZERO_SHOT = [label for name, label in METHODS.items() if name not in DERIVED]


@dataclass(frozen=True)
class Cell:
    """One model on one dataset."""

    sample: Sample
    low: float
    high: float


def cells_in(path: Path) -> list[tuple[Mapping[str, Any], Mapping[str, Any]]]:
    """Keys and results in a file of cells, which may be compressed (.xz)."""
    if path.suffix != ".xz":
        return list(ResultStore(path).items())
    with tempfile.TemporaryDirectory() as folder:
        plain = Path(folder) / path.stem
        plain.write_bytes(lzma.decompress(path.read_bytes()))
        return list(ResultStore(plain).items())


def _write_lines(out: Path, lines: Sequence[str]) -> None:
    content = ("\n".join(lines) + "\n").encode()
    out.write_bytes(lzma.compress(content) if out.suffix == ".xz" else content)
    print(f"{len(lines)} cells -> {out}")


def write_cells(out: Path, *sources: Path) -> None:
    """The cells of all `sources` with everything but the answers, one a line."""
    lines = []
    for source in sources:
        label, _, results = str(source).rpartition("=")
        for key, result in cells_in(Path(results)):
            kept = {name: result[name] for name in KEPT if name in result}
            kept |= {"of": label} if label else {}
            marks = [
                [[round(x, 4) for x in metric] for metric in example] for example in result["marks"]
            ]
            lines.append(json.dumps({"key": key, "result": {**kept, "marks": marks}}))
    _write_lines(out, lines)


def write_whole(out: Path, cells: Path) -> None:
    """Those of `cells` that are of the models of `write_together`, base or of the largest pool."""
    found, models = cells_in(cells), _whole(cells)
    sizes = [len(_routed(key["method"])[1]) for key, _ in found]
    lines = [
        json.dumps({"key": key, "result": result})
        for (key, result), size in zip(found, sizes, strict=True)
        if size in (0, max(sizes)) and _label(key["method"]) in models
    ]
    _write_lines(out, lines)


def read_cells(path: Path) -> Scores:
    """The last cell of each model and dataset at `path`; experts go by the start of their hash.

    Pools smaller than the largest are numbered, those of each method and size in their order; of
    the largest the first is the one that is compared, others are those of reference models.
    """
    scores: Scores = defaultdict(dict)
    pools: dict[tuple[Model, int], list[Pool]] = defaultdict(list)
    cells = cells_in(path)
    for key, _ in cells:
        label, (_, pool) = _label(key["method"]), _routed(key["method"])
        if pool not in pools[label, len(pool)]:
            pools[label, len(pool)].append(pool)
    largest = max(size for _, size in pools)
    for key, result in cells:
        sample = Sample.of(result["metrics"], result["marks"], result.get("rows"))
        cell = Cell(sample, result["low"], result["high"])
        router, pool = _routed(key["method"])
        parts = [_label(key["method"])]
        if router not in ("", "single"):
            draw = pools[parts[0], len(pool)].index(pool) + 1
            if len(pool) < largest:
                parts.append(f"{len(pool)} experts (draw {draw})")
            elif draw > 1 and "of" not in result:
                parts.append("another pool")
        if "of" in result:
            parts.append(result["of"])
        scores[", ".join(parts)][key["task"]] = cell
    return scores


def _routed(method: Mapping[str, Any]) -> tuple[str, Pool]:
    """(the router's name, the experts' hashes), both empty where nothing is routed."""
    return method.get("router") or "", tuple(method.get("pool", ()))


def _label(method: Mapping[str, Any]) -> Model:
    """What to call a row: its method, and whatever is not as usual."""
    router, pool = _routed(method)
    if not router:
        return METHODS["base"] if method.get("model") == "base" else f"other {method}"
    if router == "single":
        return f"expert {pool[0][:6]}"
    return label_with_settings(method)


def write_variants(cells: Path, out: Path, reference: str | Path = REFERENCE) -> None:
    """Every model's mean, its difference to `reference` in pairs, and its datasets.

    Where there is no `reference`, the first model stands in its place. Only datasets that all
    models were scored on count. Of single experts there are the two rows of `oracles`.
    """
    _write_common(read_cells(cells), str(reference), out)


def write_together(cells: Path, out: Path, *without: Path) -> None:
    """As `write_variants`, of the models alone that were scored on as many datasets as any.

    The datasets in `without` don't count.
    """
    left_out = set(map(str, without))
    scores = {
        model: {task: cell for task, cell in row.items() if task not in left_out}
        for model, row in _whole(cells).items()
    }
    _write_common(scores, REFERENCE, out)


def write_datasets(cells: Path, out: Path) -> None:
    """A row for each dataset with its examples and the score of every model of `write_together`."""
    scores = _whole(cells)
    lines = [f"| dataset | n | {' | '.join(scores)} |", f"|---|---|{'---|' * len(scores)}"]
    for task in _common(scores):
        row = [cells[task].sample for cells in scores.values()]
        told = " | ".join(f"{100 * sample.score:.0f}" for sample in row)
        lines.append(f"| {task} | {row[0].n} | {told} |")
    out.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"{len(lines) - 2} datasets -> {out}")


def _whole(cells: Path) -> Scores:
    """The models that were scored on as many datasets as any."""
    scores = read_cells(cells)
    most = max(map(len, scores.values()))
    return {model: row for model, row in scores.items() if len(row) == most}


def write_balanced(cells: Path, out: Path, *suites: Path) -> None:
    """As `write_together`, over what is ranked: accuracies in which every place counts alike.

    An example counts by the share of its dataset's examples whose right answer has its place among
    the choices, so that always giving one answer is worth chance, whatever the right ones are.
    `suites` are those of the comparison that count, each with "=" and its limit after it.
    """
    scores = _whole(cells)
    weights = {}
    for suite in suites:
        place, _, limit = str(suite).rpartition("=")
        for task in open_suite(place).load(Sources(None, None)):
            weights[task.name] = _weights(task.evaluation_examples(int(limit), 0))
    tasks = [task for task in _common(scores) if weights.get(task) is not None]
    samples = {
        model: [_weighted(row[task].sample, weights[task]) for task in tasks]
        for model, row in scores.items()
    }
    _write_table(samples, tasks, REFERENCE, out)


def _weights(examples: Sequence[Example]) -> NDArray[np.float64] | None:
    """What each example counts, their mean 1; None where answers are written."""
    if not all(example.choices for example in examples):
        return None
    places = [example.choices.index(example.target) for example in examples]
    alike = Counter(places)
    return np.array([len(places) / len(alike) / alike[place] for place in places])


def _weighted(sample: Sample, weights: NDArray[np.float64]) -> Sample:
    weighted = tuple(rows * weights[:, None] for rows in sample.statistics)
    return replace(sample, statistics=weighted)


def _write_common(scores: Scores, reference: Model, out: Path) -> None:
    """The table of what all models were scored on."""
    tasks = _common(scores)
    samples = {model: [row[task].sample for task in tasks] for model, row in scores.items()}
    _write_table(samples, tasks, reference, out)


def _write_table(
    samples: dict[Model, list[Sample]], tasks: Sequence[str], reference: Model, out: Path
) -> None:
    single = [model for model in samples if model.startswith("expert ")]
    experts = [samples.pop(model) for model in single]
    samples |= oracles(experts) if experts else {}
    if reference not in samples and reference != REFERENCE:
        sys.exit(f"No model is called {reference!r}; there are {'; '.join(samples)}.")
    reference = reference if reference in samples else next(iter(samples))
    means = SharedMeans.of(samples)
    lines = [
        f"| model | mean of {len(tasks)} | less {reference} | {' | '.join(tasks)} |",
        f"|---|---|---|{'---|' * len(tasks)}",
    ]
    for model in samples:
        paired = () if model == reference else means.gain(model, reference)
        summary = Summary(means.value[model], means.interval(model), *paired)
        row = " | ".join(f"{100 * sample.score:.0f}" for sample in samples[model])
        lines.append(
            f"| {model} | {summary.in_per_cent} | {summary.difference_in_points} | {row} |"
        )
    out.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(out.read_text(encoding="utf-8"))


def oracles(experts: list[list[Sample]]) -> dict[Model, list[Sample]]:
    """Each dataset's best expert, and the one that every second example says, scored on the others.

    The best of many scores is too high where they differ by chance; on examples that it was not
    chosen on it is not. `experts` has a list of samples, one a dataset, for each expert.
    """
    whole, halved = [], []
    for row in zip(*experts, strict=True):
        whole.append(max(row, key=lambda sample: sample.score))
        odd, even = (max(row, key=lambda s: _every_second(s, half).score) for half in (1, 0))
        statistics = tuple(stat.copy() for stat in odd.statistics)
        for own, other in zip(statistics, even.statistics, strict=True):
            own[1::2] = other[1::2]
        halved.append(replace(odd, statistics=statistics))
    return {"Oracle *": whole, "Oracle, chosen on the other half *": halved}


def _every_second(sample: Sample, first: int) -> Sample:
    return Sample(sample.metrics, tuple(rows[first::2] for rows in sample.statistics))


def tell_above_chance(cells: Path, tasks: Path) -> None:
    """The datasets where a zero-shot method's interval lies above chance, and the means there."""
    scores = {model: row for model, row in read_cells(cells).items() if model in ZERO_SHOT}
    records = {record["name"]: record for record in json.loads(tasks.read_text(encoding="utf-8"))}
    chance = {task: records[task].get("chance_accuracy") or 0.0 for task in _common(scores)}
    above = [t for t in chance if any(row[t].low > chance[t] for row in scores.values())]
    print(f"above chance: {len(above)} of {len(chance)}: {', '.join(above)}")
    for model, row in scores.items():
        every, some = ([row[task].sample.score for task in part] for part in (chance, above))
        print(f"{model}: all {100 * _mean(every):.1f}, above chance {100 * _mean(some):.1f}")


def draw(cells: Path, out: Path) -> None:
    """A dot for every model and dataset, datasets below each other."""
    import matplotlib.pyplot as plt

    scores = {m: row for m, row in read_cells(cells).items() if not m.startswith("expert ")}
    tasks = _common(scores)
    figure, panel = plt.subplots(figsize=(8, 0.42 * len(tasks) + 1.6), layout="constrained")
    markers = "osD^vPX<>*"
    for place, (model, row) in enumerate(scores.items()):
        values = [100 * row[task].sample.score for task in tasks]
        strong = model == REFERENCE
        panel.plot(
            values,
            range(len(tasks)),
            markers[place % len(markers)],
            label=model,
            markersize=9 if strong else 6,
            color="black" if strong else f"C{place % 10}",
            alpha=1 if strong else 0.75,
            zorder=3 if strong else 2,
        )
    panel.set_yticks(range(len(tasks)), tasks)
    panel.invert_yaxis()
    panel.set_xlabel("score, per cent")
    panel.grid(alpha=0.3)
    panel.spines[["top", "right"]].set_visible(False)
    panel.legend(bbox_to_anchor=(1.01, 1), loc="upper left", frameon=False)
    figure.savefig(out, dpi=130)
    print(f"-> {out}")


def draw_sizes(cells: Path, out: Path, *without: Path) -> None:
    """Mean scores against the number of experts, a line per router, a point per pool.

    Pools of the sizes in `without` are not drawn.
    """
    left_out = {int(str(size)) for size in without}
    curves = []
    for curve in pool_size_curves(cells):
        kept = {size: scores for size, scores in curve.scores.items() if size not in left_out}
        if len(kept) > 1:
            curves.append(replace(curve, scores=kept))
    write_png(pool_size_figure(curves), out)
    print(f"-> {out}")


def write_analysis(analysis: Path, out: Path) -> None:
    """The numbers of an analysis.json that are of whole models: a hundredth of the file."""
    found = json.loads(analysis.read_text(encoding="utf-8"))
    kept = {name: found[name] for name in OF_WHOLE_MODELS}
    out.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
    print(f"-> {out}")


def _common(scores: Scores) -> list[str]:
    """The datasets that every model was scored on, in the order of the first."""
    first = next(iter(scores.values()))
    return [task for task in first if all(task in row for row in scores.values())]


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else float("nan")


def main(words: list[str]) -> int:
    """Run the command in `words`; 2 when there is none such."""
    commands: dict[str, Callable[..., None]] = {
        "cells": write_cells,
        "whole": write_whole,
        "variants": write_variants,
        "together": write_together,
        "balanced": write_balanced,
        "datasets": write_datasets,
        "above-chance": tell_above_chance,
        "figure": draw,
        "sizes": draw_sizes,
        "analysis": write_analysis,
    }
    name, *paths = words or [""]
    try:
        command = commands[name]
        inspect.signature(command).bind(*paths)
    except (KeyError, TypeError):
        print(__doc__, file=sys.stderr)
        return 2
    command(*map(Path, paths))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
