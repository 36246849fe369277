"""A comparison's tables for the terminal."""

from __future__ import annotations

from rich.table import Table
from rich.text import Text

from ..tables import ANCHOR, Comparison, Result

__all__ = ["datasets_table", "means_table"]


def means_table(comparison: Comparison) -> Table:
    """A row per method, a column per suite: the mean over its datasets in per cent, interval."""
    table = Table(title="mean score in %, [95 % interval]; * not zero-shot")
    table.add_column("method", no_wrap=True)
    for column, tasks in comparison.columns.items():
        table.add_column(f"{column} ({len(tasks)})", justify="right")
    for row, summaries in comparison.summaries.items():
        cells = [
            f"{100 * s.mean:.1f} [{100 * s.interval.low:.0f}, {100 * s.interval.high:.0f}]"
            for s in summaries.values()
        ]
        _add(table, comparison, row, cells)
    return table


def datasets_table(comparison: Comparison) -> Table:
    """A row per single expert and method, a column per dataset: per cent ± half the interval."""
    tasks = list(dict.fromkeys(task for suite in comparison.suites.values() for task in suite))
    table = Table(title="zero-shot score in %, ± half the 95 % interval; * not zero-shot")
    table.add_column("model", no_wrap=True)
    for task in tasks:
        table.add_column(task.replace("_", " "), justify="right")
    table.add_column("mean", justify="right")
    for row, results in {**comparison.experts, **comparison.results}.items():
        scores = [results[task].score for task in tasks]
        cells = [*(_cell(results[task]) for task in tasks), f"{100 * sum(scores) / len(tasks):.1f}"]
        _add(table, comparison, row, cells)
    return table


def _cell(result: Result) -> str:
    return f"{100 * result.score:.0f} ±{50 * (result.high - result.low):.0f}"


def _add(table: Table, comparison: Comparison, row: str, cells: list[str]) -> None:
    label = comparison.labels.get(row, row) + (" *" if row in comparison.choices else "")
    style = "bold" if row == ANCHOR else ""
    table.add_row(Text(label), *map(Text, cells), style=style)
