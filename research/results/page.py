"""Write research/results/README.md, router × suite × base, from comparisons.json beside it.

    python research/results/page.py

Rows of routers by embeddings are left out: see WITHDRAWN.
"""

from __future__ import annotations

import json
import posixpath
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

FOLDER = Path(__file__).parent
# These chose with the answer choices in the embedded text, which no served prompt has. Scores by
# the prompt alone are in research/decoders.md.
WITHDRAWN = ("retrieval", "centroid", "glider", "joint-discriminant", "joint-discriminant-one")
ANCHOR = "phatgoose"
FIRST = (
    "base",
    "random",
    "average-activation",
    "arrow",
    "spectr",
    "merged",
    ANCHOR,
    "discriminant",
)
HEAD = """# Every published comparison

<!-- Written by research/results/page.py from comparisons.json; edit those. -->

[docs/results.md](../../docs/results.md) is the summary. Here routers are rows, and suites and \
pools are columns, with a part for each base. Numbers are means over a suite's datasets in per \
cent, with 95 % intervals over datasets and examples. The linked pages say how the experts were \
trained. Routers have the default settings of their commits. Intervals aren't corrected for \
multiple comparisons. Don't compare columns of different pools or wordings.

Rows of routers by embeddings (Retrieval, Centroid, GLIDER, Joint Discriminant) were withdrawn, \
since they chose with the answer choices embedded. \
[Decoders](../decoders.md#scores-in-new-wordings) has such rows by the prompt alone.

Two earlier comparisons are not included: many of their experts had lost their question, or had \
hardly been trained (at commit 6aa0f67a, `research/first-study` and `research/earlier`).
"""
CHOSEN = "\n\\* chosen by the results themselves, so not zero-shot.\n"


class Column(NamedTuple):
    """One suite of one comparison."""

    of: Mapping[str, Any]
    suite: str

    @property
    def title(self) -> str:
        """The suite and the pool, and where more is said of them."""
        return f"{self.suite} ({self.of['suites'][self.suite]['datasets']}), {link(self.of)}"

    def mean(self, row: str) -> str:
        """A row's mean, empty where it was not run."""
        return self.told(row, "mean", "interval", "{:.1f} [{:.0f}, {:.0f}]")

    def difference(self, row: str) -> str:
        """A row's points above PHATGOOSE in pairs, empty for itself."""
        return self.told(row, "difference", "difference_interval", "{:+.1f} [{:+.1f}, {:+.1f}]")

    def told(self, row: str, value: str, within: str, form: str) -> str:
        summary = self.of["rows"].get(row, {"summary": {}})["summary"].get(self.suite, {})
        if summary.get(value) is None:
            return ""
        ends = summary[within]["low"], summary[within]["high"]
        return form.format(*(100 * each for each in (summary[value], *ends)))


def main() -> None:
    """Write the page."""
    comparisons = json.loads((FOLDER / "comparisons.json").read_text(encoding="utf-8")).values()
    bases: dict[str, list[Mapping[str, Any]]] = {}
    for each in comparisons:
        settings = each["settings"]
        bases.setdefault(f"{settings['base']['id']}, {settings['dtype']}", []).append(each)
    parts = [HEAD, *(of_base(name, each) for name, each in sorted(bases.items()))]
    (FOLDER / "README.md").write_text("\n".join([*parts, sources(comparisons)]), encoding="utf-8")


def of_base(name: str, comparisons: Sequence[Mapping[str, Any]]) -> str:
    """A base's tables of means and of differences."""
    columns = [Column(each, suite) for each in comparisons for suite in each["suites"]]
    found = {row: its["label"] for each in comparisons for row, its in each["rows"].items()}
    labels = {row: label for row, label in found.items() if row not in WITHDRAWN}
    chosen = {row for each in comparisons for row in each["chosen"]}
    order = {row: place for place, row in enumerate(FIRST)}
    rows = sorted(labels, key=lambda row: (row in chosen, order.get(row, len(order))))
    named = {row: label + (" \\*" if row in chosen else "") for row, label in labels.items()}
    named[ANCHOR] = f"**{labels[ANCHOR]}**"

    def table(cell: Callable[[Column, str], str]) -> Iterator[str]:
        cells = {row: [cell(column, row) for column in columns] for row in rows}
        told = [[named[row], *each] for row, each in cells.items() if any(each)]
        return markdown(["router", *(column.title for column in columns)], told)

    parts = [f"## {name}\n", *table(Column.mean), CHOSEN if chosen else ""]
    parts += [f"Difference to {labels[ANCHOR]} in points, in pairs:\n", *table(Column.difference)]
    return "\n".join([*parts, ""])


def link(comparison: Mapping[str, Any]) -> str:
    """Its title, linked to its page, whose place the file gives from docs."""
    place = posixpath.relpath(posixpath.join("docs", comparison["page"]), "research/results")
    return f"[{comparison['title']}]({place})"


def sources(comparisons: Iterable[Mapping[str, Any]]) -> str:
    """The table of pools with commits and machines."""
    head = ["pool", "suites", "experts", "k", "examples", "date", "commit", "phatgoose", "machine"]
    rows = []
    for each in comparisons:
        settings, suites = each["settings"], each["suites"]
        k = "each router's own" if settings["k"] is None else str(settings["k"])
        examples = ", ".join(str(its["examples"]) for its in suites.values())
        row = [link(each), ", ".join(suites), str(settings["experts"]), k, examples]
        row += [settings["date"][:10], settings["commit"] or "installed"]
        rows.append([*row, settings["code"], settings["machine"]])
    return "\n".join(["## Where they come from\n", *markdown(head, rows), ""])


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    """The lines of a table."""
    yield from (f"| {' | '.join(head)} |", "|" + "---|" * len(head))
    yield from (f"| {' | '.join(cells)} |" for cells in rows)


if __name__ == "__main__":
    main()
