"""A comparison's tables for the terminal."""

from __future__ import annotations

from rich.table import Table
from rich.text import Text

from ...evaluation.comparison.tables import ANCHOR, Comparison, Result

__all__ = ["datasets_table", "differences_table", "means_table"]


def means_table(comparison: Comparison) -> Table:
    """A row per method, a column per suite: the mean over its datasets in per cent, interval."""
    table = Table(title="mean score in %, [95 % interval]; * not zero-shot")
    table.add_column("method", no_wrap=True)
    for column, tasks in comparison.columns.items():
        table.add_column(Text(f"{column} ({len(tasks)})"), justify="right")
    for row, summaries in comparison.summaries.items():
        _add(table, comparison, row, [summary.in_per_cent for summary in summaries.values()])
    return table


def differences_table(comparison: Comparison) -> Table | None:
    """The same rows and columns less PHATGOOSE, in points; None where there is nothing to show."""
    others = [row for row in comparison.results if row != ANCHOR]
    if ANCHOR not in comparison.results or not others:
        return None
    label = comparison.labels[ANCHOR]
    table = Table(title=f"difference to {label} in points, [95 % interval in pairs]")
    table.add_column("method", no_wrap=True)
    for column in comparison.columns:
        table.add_column(Text(column), justify="right")
    for row in others:
        summaries = comparison.summaries[row].values()
        cells = [summary.difference_in_points for summary in summaries]
        _add(table, comparison, row, cells)
    return table


def datasets_table(comparison: Comparison) -> Table:
    """A row per single expert and method, a column per dataset: per cent ± half the interval."""
    tasks = list(dict.fromkeys(task for suite in comparison.suites.values() for task in suite))
    table = Table(title="zero-shot score in %, ± half the 95 % interval; * not zero-shot")
    table.add_column("model", no_wrap=True)
    for task in tasks:
        table.add_column(Text(task.replace("_", " ")), justify="right")
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
