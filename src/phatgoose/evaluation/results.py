"""Results of a comparison: the store of finished runs, what follows from them, and their tables.

Tables are Markdown to read, and JSON to compute with.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ..errors import EvaluationError
from ..files import reading, regular, write_text, writing
from .evaluate import TaskScore
from .metrics import CONFIDENCE, Estimate, Sample, SharedMeans
from .tables import Table

BASE = "base"  # the row of the base alone
ANCHOR = "phatgoose"  # the row that all others are compared with, in pairs
ALL = "all datasets"  # the column over every suite's datasets, if there are several suites


def stored(score: TaskScore) -> dict[str, Any]:
    """A score as a line of the store."""
    line = score.to_dict()
    if score.sample.rows is not None:
        line["rows"] = score.sample.rows.tolist()
    line["metrics"] = score.sample.metrics
    line["answers"] = [prediction.answer for prediction in score.predictions]
    line["marks"] = [prediction.marks for prediction in score.predictions]
    return line


def restored(line: Mapping[str, Any]) -> TaskScore:
    """The score in a line of the store, without its answers."""
    names = ("task", "metric", "low", "high", "ties", "seconds", "cuts")
    sample = Sample.of(line["metrics"], line["marks"], line.get("rows"))
    return TaskScore(sample=sample, **{name: line[name] for name in names})


@dataclass(frozen=True)
class Summary:
    """One model's mean over a suite's datasets, unweighted.

    `difference` is this mean less PHATGOOSE's, in pairs; None for PHATGOOSE itself, or without it.
    """

    mean: Estimate
    difference: Estimate | None = None


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
    results: Mapping[str, Mapping[str, TaskScore]]
    experts: Mapping[str, Mapping[str, TaskScore]] = field(default_factory=dict)
    choices: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        return f"<Comparison of {', '.join(self.results)} (datasets: {len(self.datasets)})>"

    @property
    def columns(self) -> dict[str, tuple[str, ...]]:
        """The datasets that each column of the table is the mean of."""
        columns = dict(self.suites)
        if len(columns) > 1:
            columns[ALL] = self.datasets
        return columns

    @property
    def datasets(self) -> tuple[str, ...]:
        """The datasets of all suites, each once."""
        return tuple(dict.fromkeys(chain(*self.suites.values())))

    @property
    def every(self) -> dict[str, Mapping[str, TaskScore]]:
        """The results of rows and single experts by dataset, the base's first."""
        rows = {**self.experts, **self.results}
        if BASE not in rows:
            return rows
        return {BASE: rows[BASE], **rows}

    def title(self, row: str) -> str:
        """A row's name in tables, with a star if its experts were chosen by these very scores."""
        return self.labels.get(row, row) + (" *" if row in self.choices else "")

    @property
    def _star(self) -> str:
        return "; * not zero-shot" if self.choices else ""

    @cached_property
    def summaries(self) -> dict[str, dict[str, Summary]]:
        """Summary by row and column. Intervals resample datasets and, within them, examples."""
        rows: dict[str, dict[str, Summary]] = {name: {} for name in self.results}
        for column, tasks in self.columns.items():
            means = means_of(self.results, tasks)
            for name in self.results:
                gain = None
                if name != ANCHOR and ANCHOR in self.results:
                    gain = means.gain(name, ANCHOR)
                rows[name][column] = Summary(means.estimate(name), gain)
        return rows

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON: `comparison.json`."""
        rows = {}
        for name, results in self.results.items():
            summaries = self.summaries[name].items()
            rows[name] = {
                "label": self.labels[name],
                "summary": {column: asdict(summary) for column, summary in summaries},
                "datasets": {task: result.to_dict() for task, result in results.items()},
            }
        return {
            "settings": self.settings,
            "notes": self.notes,
            "suites": self.suites,
            "choices": self.choices,
            "confidence": CONFIDENCE,
            "rows": rows,
            "experts": self.expert_scores(),
        }

    def expert_scores(self) -> dict[str, dict[str, float]]:
        """The single experts' scores by dataset."""
        scores = {}
        for name, results in self.experts.items():
            scores[name] = {task: result.score for task, result in results.items()}
        return scores

    def to_markdown(self) -> str:
        """Tables of means, of differences to PHATGOOSE, and of datasets."""
        tables = (self.means(), self.differences(), self.scores())
        return "\n".join(table.markdown() for table in tables if table.rows)

    def means(self) -> Table:
        """A row for each method: its mean on each suite, with the interval."""
        notes = ["Intervals resample datasets and their examples; all methods share the draws."]
        notes += [f"Note: {note}" for note in self.notes]
        how = self.settings
        if how:
            text = f"Base {how['base']['id']} in {how['dtype']}; {len(how['experts'])} experts; "
            if how["k"]:
                text += f"k = {how['k']}; "
            if how["limit"]:
                text += f"at most {how['limit']} examples a dataset (seed {how['seed']}); "
            notes.append(f"{text}phatgoose {how['code']}, {how['machine']}.")
        columns = [f"{column} ({len(tasks)})" for column, tasks in self.columns.items()]
        rows = []
        for name, summaries in self.summaries.items():
            means = [summary.mean.in_per_cent for summary in summaries.values()]
            rows.append([self.title(name), *means])
        title = f"Means over datasets, in per cent, with 95 % intervals{self._star}"
        return Table(title, ["method", *columns], rows, notes, self.title(ANCHOR))

    def differences(self) -> Table:
        """Differences to PHATGOOSE in pairs; no rows without its row, or another."""
        rows = []
        for name, summaries in self.summaries.items():
            gains = [summary.difference for summary in summaries.values()]
            points = [gain.in_points for gain in gains if gain]
            if points:
                rows.append([self.title(name), *points])
        title = f"Difference to {self.labels.get(ANCHOR)}, in points, with 95 % intervals in pairs"
        return Table(title, ["method", *self.columns], rows)

    def scores(self, bold: str = ANCHOR) -> Table:
        """A row per model and single expert, a column per dataset; row `bold` stands out."""
        tasks = self.datasets
        rows = []
        for row, results in self.every.items():
            scores = [results[task] for task in tasks]
            cells = [f"{100 * s.score:.1f} ±{50 * (s.high - s.low):.0f}" for s in scores]
            mean = sum(score.score for score in scores) / len(scores)
            rows.append([self.title(row), *cells, f"{100 * mean:.1f}"])
        first = next(iter(self.every.values()))
        by_metric: dict[str, list[str]] = {}
        for task in tasks:
            by_metric.setdefault(first[task].metric, []).append(task)
        listed = (f"{metric} ({', '.join(names)})" for metric, names in by_metric.items())
        notes = [f"Scored by {'; '.join(listed)}."]
        for name, chosen in self.choices.items():
            experts = list(set(chosen.values()))
            if len(experts) > 1:
                experts = [f"{expert} for {task}" for task, expert in chosen.items()]
            notes.append(f"{self.labels[name]}: {', '.join(experts)}.")
        head = ["method", *(f"{task} (n={first[task].n})" for task in tasks), "mean"]
        title = f"Per dataset, in per cent, ± half the 95 % interval{self._star}"
        return Table(title, head, rows, notes, self.title(bold))


def means_of(results: Mapping[str, Mapping[str, TaskScore]], tasks: Sequence[str]) -> SharedMeans:
    """The means of models over `tasks`, by their results there."""
    samples = {}
    for name, by_task in results.items():
        samples[name] = [by_task[task].sample for task in tasks]
    return SharedMeans.of(samples)


def write_tables(comparison: Comparison, folder: Path) -> None:
    """Write comparison.md and .json into `folder`. Raises EvaluationError."""
    content = json.dumps(comparison.to_dict(), indent=2, ensure_ascii=False) + "\n"
    write_text(folder / "comparison.md", comparison.to_markdown(), EvaluationError)
    write_text(folder / "comparison.json", content, EvaluationError)


LOCK = ".lock"


class ResultStore:
    """Results by key (any JSON object) in the JSON Lines file `path`, made by the first result.

    Every result is on the disk when `add` returns. Raises EvaluationError when the file can't be
    read or written, or has a line that is no result.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._records: dict[str, Mapping[str, Any]] = {}
        self._cut_off_at: int | None = None
        with reading(self.path, EvaluationError):
            content = regular(self.path).read_bytes() if self.path.exists() else b""
            complete = content.rfind(b"\n") + 1
            # str.splitlines would also split at U+2028 and U+0085, which answers may hold.
            for line in content[:complete].decode("utf-8").split("\n")[:-1]:
                record = json.loads(line)
                self._records[_digest(record["key"])] = record["result"]
        if complete < len(content):
            warnings.warn(f"{self.path}: the last result was cut off; dropped.", stacklevel=3)
            self._cut_off_at = complete

    @classmethod
    @contextmanager
    def alone(cls, path: str | Path) -> Iterator[ResultStore]:
        """The store at `path`, locked against other processes, or EvaluationError if one has it."""
        folder = Path(path).parent
        with writing(folder, EvaluationError):
            folder.mkdir(parents=True, exist_ok=True)
            try:
                lock = FileLock(folder / LOCK).acquire(timeout=0)
            except Timeout as error:
                raise EvaluationError(
                    f"Another process is adding results to {path}; choose another --out."
                ) from error
        with lock:
            yield cls(path)

    def get(self, key: Mapping[str, object]) -> Mapping[str, Any] | None:
        return self._records.get(_digest(key))

    def add(self, key: Mapping[str, object], result: Mapping[str, Any]) -> None:
        line = json.dumps({"key": key, "result": result}, ensure_ascii=False) + "\n"
        with (
            writing(self.path, EvaluationError),
            open(self.path, "a", encoding="utf-8", opener=_no_link) as file,
        ):
            # Reading changed nothing: a last line that was cut off goes only now.
            if self._cut_off_at is not None:
                file.truncate(self._cut_off_at)
                self._cut_off_at = None
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
        self._records[_digest(key)] = result


def _no_link(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0), 0o666)


def _digest(key: Mapping[str, object]) -> str:
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
