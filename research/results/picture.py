"""research/results/results.png: how far routers are from PHATGOOSE, in the kept comparisons.

    python research/results/picture.py

A panel for each suite and pool of README.md beside it, but for the one in wordings that experts
have seen; a line for each router that most of these have, with its 95 % interval.
"""

from __future__ import annotations

import json
import textwrap

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from page import FOLDER, WITHDRAWN, Column

from phatgoose.evaluation.results import ANCHOR
from phatgoose.evaluation.rows import DERIVED, METHODS

OUT = FOLDER / "results.png"
OURS, OTHERS, CHOSEN = "tab:blue", "0.35", "0.75"
SEEN = "ORIGINAL"
DISCRIMINANTS = ("discriminant", "joint-discriminant", "discriminant-phatgoose")


def main() -> None:
    """Draw it."""
    files = sorted(FOLDER.glob("*.json"), key=lambda path: path.stem)
    kept = [json.loads(path.read_text(encoding="utf-8")) for path in files]
    columns = [Column(each, suite) for each in kept for suite in each["suites"] if suite != SEEN]
    rows = [name for name in METHODS if name not in {ANCHOR, *WITHDRAWN} and in_most(columns, name)]
    figure = Figure(figsize=(1.4 * len(columns) + 2, 0.3 * len(rows) + 1.5), dpi=150)
    panels = figure.subplots(1, len(columns), sharex=True, sharey=True, squeeze=False)[0]
    for panel, column in zip(panels, columns, strict=True):
        draw(panel, column, rows)
    panels[0].set_yticks(range(len(rows)), [METHODS[name] for name in rows])
    panels[0].invert_yaxis()
    figure.supxlabel(
        "points above (right) or below PHATGOOSE, 95 % intervals; light grey: chosen by the "
        "results themselves",
        fontsize=9,
    )
    figure.tight_layout(w_pad=0.4)
    figure.savefig(OUT)


def in_most(columns: list[Column], name: str) -> bool:
    """True for a router that more than half of the columns have."""
    return 2 * sum(column.summary(name) is not None for column in columns) > len(columns)


def draw(panel: Axes, column: Column, rows: list[str]) -> None:
    """One suite of one pool: a dot and an interval for each of `rows` that it has."""
    for place, name in enumerate(rows):
        summary = column.summary(name)
        if summary is None or summary.difference is None or summary.difference_interval is None:
            continue
        low, high = summary.difference_interval.low, summary.difference_interval.high
        colour = CHOSEN if name in DERIVED else OURS if name in DISCRIMINANTS else OTHERS
        panel.plot([100 * low, 100 * high], [place, place], color=colour, lw=1.6)
        panel.plot(100 * summary.difference, place, "o", color=colour, ms=4.5)
    panel.axvline(0, color="black", lw=0.8, zorder=0)
    title = ",".join(column.of["title"].split(",")[:2])
    panel.set_title("\n".join([column.suite, *textwrap.wrap(title, 16)]), fontsize=9)
    panel.tick_params(labelsize=9)
    panel.grid(axis="x", alpha=0.3)
    panel.spines[["top", "right"]].set_visible(False)


if __name__ == "__main__":
    main()
