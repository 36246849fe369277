"""A finished comparison and its tables: Markdown to read, CSV to compute with, JSON for all."""

from __future__ import annotations

import csv
import html
import io
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from ...errors import EvaluationError
from ...files import write_text
from ..intervals import CONFIDENCE, Interval, Sample, SharedMeans

ANCHOR = "phatgoose"  # the row that all others are compared with, in pairs
FORMULAS = tuple("=+-@\t\r\n\uff1d\uff0b\uff0d\uff20")  # how formulas of spreadsheets begin
ALL = "all datasets"  # the column over every suite's datasets, if there are several suites
HEAD = ("method", "suite", "dataset", "metric", "score", "low", "high", "n", "ties", "seconds")


def in_per_cent(score: float, low: float, high: float, form: str = ".1f", ends: str = ".0f") -> str:
    return f"{100 * score:{form}} [{100 * low:{ends}}, {100 * high:{ends}}]"


@dataclass(frozen=True)
class Result:
    """One model's score on one dataset, from 0 to 1, with its 95 % interval.

    Attributes:
        task: The dataset's name.
        metric: Its metrics, in words.
        low: The lower end of the interval.
        high: The upper end.
        ties: How many examples have best choices that scored equally; the first was taken.
        seconds: How long scoring took.
        sample: The examples' statistics.
    """

    task: str
    metric: str
    low: float
    high: float
    ties: int
    seconds: float
    sample: Sample

    @property
    def score(self) -> float:
        """The mean over the metrics."""
        return self.sample.score

    @property
    def n(self) -> int:
        """How many examples were scored."""
        return self.sample.n

    @property
    def in_per_cent(self) -> str:
        return in_per_cent(self.score, self.low, self.high)

    def to_dict(self) -> dict[str, Any]:
        return {
            "metric": self.metric,
            "score": self.score,
            "by_metric": self.sample.by_metric,
            "low": self.low,
            "high": self.high,
            "n": self.n,
            "ties": self.ties,
            "seconds": self.seconds,
        }


@dataclass(frozen=True)
class Summary:
    """One model's mean over a suite's datasets, unweighted, with its interval.

    `difference` is this mean less PHATGOOSE's, in pairs; None for PHATGOOSE itself, or without it.
    """

    mean: float
    interval: Interval
    difference: float | None = None
    difference_interval: Interval | None = None

    @property
    def in_per_cent(self) -> str:
        return in_per_cent(self.mean, self.interval.low, self.interval.high)

    @property
    def difference_in_points(self) -> str:
        if self.difference is None or self.difference_interval is None:
            return ""
        low, high = self.difference_interval.low, self.difference_interval.high
        return f"{100 * self.difference:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"


@dataclass(frozen=True)
class Comparison:
    """What `compare` returns.

    Attributes:
        suites: The datasets of each suite.
        labels: Each row's name in tables.
        results: Each row's results by dataset.
        experts: The single experts' results by dataset.
        choices: The experts that Oracle and Best Individual chose, by dataset.
        notes: What was left out.
        settings: How everything was scored.
    """

    suites: Mapping[str, tuple[str, ...]]
    labels: Mapping[str, str]
    results: Mapping[str, Mapping[str, Result]]
    experts: Mapping[str, Mapping[str, Result]] = field(default_factory=dict)
    choices: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        return f"<Comparison of {', '.join(self.results)} (datasets: {len(self.datasets)})>"

    @property
    def columns(self) -> dict[str, tuple[str, ...]]:
        """The datasets that each column of the table is the mean of."""
        several = {ALL: self.datasets} if len(self.suites) > 1 else {}
        return {**self.suites, **several}

    @property
    def datasets(self) -> tuple[str, ...]:
        """The datasets of all suites, each once."""
        return tuple(dict.fromkeys(task for tasks in self.suites.values() for task in tasks))

    def title(self, row: str) -> str:
        """A row's name in tables, with a star if its experts were chosen by these very scores."""
        return self.labels.get(row, row) + (" *" if row in self.choices else "")

    @cached_property
    def summaries(self) -> dict[str, dict[str, Summary]]:
        """Summary by row and column. Intervals resample datasets and, within them, examples."""
        rows: dict[str, dict[str, Summary]] = {name: {} for name in self.results}
        for column, tasks in self.columns.items():
            samples = {
                name: [results[task].sample for task in tasks]
                for name, results in self.results.items()
            }
            means = SharedMeans.of(samples)
            for name, mean in means.value.items():
                paired = name != ANCHOR and ANCHOR in samples
                gain = means.gain(name, ANCHOR) if paired else ()
                rows[name][column] = Summary(mean, means.interval(name), *gain)
        return rows

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON: `comparison.json`."""
        return {
            "settings": dict(self.settings),
            "notes": list(self.notes),
            "confidence": CONFIDENCE,
            "suites": {name: list(tasks) for name, tasks in self.suites.items()},
            "rows": {
                name: {
                    "label": self.labels[name],
                    "summary": {
                        column: asdict(summary) for column, summary in self.summaries[name].items()
                    },
                    "datasets": {task: result.to_dict() for task, result in results.items()},
                }
                for name, results in self.results.items()
            },
            "experts": {
                name: {task: result.score for task, result in results.items()}
                for name, results in self.experts.items()
            },
            "choices": {name: dict(chosen) for name, chosen in self.choices.items()},
        }

    def to_csv(self) -> str:
        """One line per row and dataset, the single experts' included."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(HEAD)
        for name, results in [*self.results.items(), *self.experts.items()]:
            for suite, tasks in self.suites.items():
                for task in tasks:
                    r = results[task]
                    texts = (name, suite, task, r.metric)
                    # Against formulas, as OWASP advises: datasets are named after untrusted files.
                    names = [f"'{each}" if each.startswith(FORMULAS) else each for each in texts]
                    numbers = [f"{value:.6f}" for value in (r.score, r.low, r.high)]
                    writer.writerow([*names, *numbers, r.n, r.ties, r.seconds])
        return text.getvalue()

    def to_markdown(self) -> str:
        """Tables of means, of differences to PHATGOOSE, of datasets, and of costs."""
        parts = (self._means(), self._differences(), self._datasets(), self._costs())
        text = "\n".join("\n".join(part) + "\n" for part in map(list, parts) if part)
        return html.escape(text, quote=False)  # names are of untrusted files

    def _means(self) -> Iterator[str]:
        yield "## Means over datasets, in per cent, with 95 % intervals\n"
        counts = [f"{column} ({len(tasks)})" for column, tasks in self.columns.items()]
        yield from markdown_table(
            ["method", *counts],
            (
                [self._named(name), *(summary.in_per_cent for summary in summaries.values())]
                for name, summaries in self.summaries.items()
            ),
        )
        yield (
            "\nIntervals resample the datasets and, within each, its examples; all methods share "
            "the draws."
        )
        if self.choices:
            yield (
                "\\* chosen by the results themselves, so not zero-shot; the interval leaves that "
                "choice out."
            )
        yield from (f"Note: {note}" for note in self.notes)
        if self.settings:
            yield _how(self.settings)

    def _differences(self) -> Iterator[str]:
        if ANCHOR not in self.results:
            return
        yield f"## Difference to {self.labels[ANCHOR]}, in points, with 95 % intervals in pairs\n"
        yield from markdown_table(
            ["method", *self.columns],
            (
                [self._named(name), *(each.difference_in_points for each in summaries.values())]
                for name, summaries in self.summaries.items()
                if name != ANCHOR
            ),
        )

    def _datasets(self) -> Iterator[str]:
        yield "## Per dataset, in per cent\n"
        tasks, rows = self.datasets, {**self.results, **self.experts}
        first = next(iter(rows.values()))
        yield from markdown_table(
            ["method", *(f"{task} (n={first[task].n})" for task in tasks)],
            (
                [self._named(name), *(results[task].in_per_cent for task in tasks)]
                for name, results in rows.items()
            ),
        )
        by_metric: dict[str, list[str]] = {}
        for task in tasks:
            by_metric.setdefault(first[task].metric, []).append(task)
        listed = (f"{metric} ({', '.join(names)})" for metric, names in by_metric.items())
        yield f"\nScored by {'; '.join(listed)}."
        for name, chosen in self.choices.items():
            said = ", ".join(f"{expert} for {task}" for task, expert in chosen.items())
            everywhere = set(chosen.values())
            yield f"\n{self.labels[name]}: {everywhere.pop() if len(everywhere) == 1 else said}."

    def _costs(self) -> Iterator[str]:
        yield "## Runs and seconds of scoring\n"
        rows = {**self.results, **self.experts}
        yield from markdown_table(
            ["model", "runs", "seconds"],
            (
                [
                    self._named(name),
                    str(len(results)),
                    f"{sum(each.seconds for each in results.values()):.0f}",
                ]
                for name, results in rows.items()
                if name not in self.choices
            ),
        )

    def _named(self, row: str) -> str:
        return f"**{self.title(row)}**" if row == ANCHOR else self.title(row)


def write_tables(comparison: Comparison, folder: Path) -> None:
    """Write comparison.md, .csv and .json into `folder`. Raises EvaluationError."""
    content = json.dumps(comparison.to_dict(), indent=2, ensure_ascii=False) + "\n"
    write_text(folder / "comparison.md", comparison.to_markdown(), EvaluationError)
    write_text(folder / "comparison.csv", comparison.to_csv(), EvaluationError)
    write_text(folder / "comparison.json", content, EvaluationError)


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    """The lines of a table in Markdown."""

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    yield line(head)
    yield "|" + "---|" * len(head)
    yield from map(line, rows)


def _how(settings: Mapping[str, Any]) -> str:
    drawn = "all examples"
    if settings["limit"] is not None:
        drawn = f"at most {settings['limit']} examples a dataset, drawn by seed {settings['seed']}"
    routed = [] if settings["k"] is None else [f"k = {settings['k']}"]
    routed += [] if settings["kernel"] == "auto" else [f"kernel = {settings['kernel']}"]
    where = [settings[name] for name in ("commit", "date", "machine") if settings.get(name)]
    return (
        f"Base {settings['base']['id']} in {settings['dtype']}; experts: "
        f"{'; '.join([str(len(settings['experts'])), *routed, drawn])}; "
        f"phatgoose {', '.join([settings['code'], *where])}."
    )
