"""docs/figures/demo.png: the demo's scores, and the experts that its routed model used.

    python research/demo_picture.py demo     # the folder that `make demo` leaves behind

Scores are those of comparison.json, texts those of the report's token explorer.
"""

from __future__ import annotations

import json
import re
import sys
import textwrap
from pathlib import Path
from typing import Any

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from phatgoose.apps.console import COLOURS
from phatgoose.apps.demo import SKILLS

OUT = Path(__file__).parents[1] / "docs" / "figures" / "demo.png"
TRACE = re.compile(r'<script type="application/json" class="trace">(.*?)</script>', re.S)
SHADES = colormaps["Blues"]
WIDTH = 58  # characters of a line of text


def main(folder: str) -> None:
    """Draw it."""
    comparison = json.loads((Path(folder) / "comparison.json").read_text(encoding="utf-8"))
    report = (Path(folder) / "analysis" / "report.html").read_text(encoding="utf-8")
    traces = [json.loads(found) for found in TRACE.findall(report)]
    figure = Figure(figsize=(12, 4.6), dpi=150)
    left, right = figure.subplots(1, 2, width_ratios=[1.15, 1])
    draw_scores(left, comparison, router=traces[0]["router"])
    draw_texts(right, traces, list(comparison["suites"]["unseen"]))
    figure.tight_layout(w_pad=1)
    figure.savefig(OUT)


def draw_scores(axes: Axes, comparison: dict[str, Any], router: str) -> None:
    """A table of per cent: the base, each expert, and ways of using all; `router` in bold."""
    tasks = comparison["suites"]["unseen"]
    rows = comparison["rows"]
    several = [name for name in rows if name not in {"base", router, "oracle"}]
    order = ["base", *comparison["experts"], *several, router, "oracle"]
    scores = {name: [rows[name]["datasets"][task]["score"] for task in tasks] for name in rows}
    scores |= {
        name: [found[task] for task in tasks] for name, found in comparison["experts"].items()
    }
    axes.set(xlim=(-2.6, len(tasks) + 1), ylim=(len(order), -1.2))
    axes.axis("off")
    for column, task in enumerate([*tasks, "mean"]):
        axes.text(column + 0.5, -0.1, task.replace("_", "\n"), ha="center", va="bottom", fontsize=8)
    for line, name in enumerate(order):
        label = rows[name]["label"] if name in rows else f"expert {name}"
        weight = "bold" if name == router else "normal"
        label += (
            " (auto)" if name == router else " (best expert per task)" if name == "oracle" else ""
        )
        axes.text(-0.1, line + 0.5, label, ha="right", va="center", fontsize=8.5, weight=weight)
        values = [*scores[name], sum(scores[name]) / len(tasks)]
        for column, value in enumerate(values):
            cell = (column, line + 0.04)
            axes.add_patch(_box(*cell, 0.96, 0.92, SHADES(0.9 * value)))
            ink = "white" if value > 0.55 else "black"
            digits = 1 if column == len(tasks) else 0  # of the mean, which the text quotes
            axes.text(
                column + 0.48, line + 0.5, f"{100 * value:.{digits}f}",
                ha="center", va="center", fontsize=9, color=ink, weight=weight,
            )  # fmt: skip


def draw_texts(axes: Axes, traces: list[dict[str, Any]], tasks: list[str]) -> None:
    """A text of each unseen task, in the colour of the expert that served it most."""
    right_one = {unseen: expert for expert, unseen in SKILLS.items()}
    axes.set(xlim=(0, 1), ylim=(1, 0))
    axes.axis("off")
    axes.text(0, 0.015, "Expert used for five texts", fontsize=9.5, weight="bold", va="top")
    top = 0.09
    for trace, task in zip(traces, tasks, strict=True):
        expert, share = max(trace["whole"], key=lambda pair: pair[1])
        text = "".join(trace["streams"][0]["tokens"]).strip()
        lines = textwrap.wrap(text, WIDTH)
        height = 0.042 * len(lines) + 0.025
        colour = COLOURS[list(SKILLS).index(expert)]
        axes.add_patch(_box(0, top, 0.76, height, colour, alpha=0.3))
        axes.text(0.01, top + 0.015, "\n".join(lines), fontsize=8, va="top", linespacing=1.35)
        told = f"{expert}  {share:.0%}"
        if right_one[task] != expert:
            told += f"\n({right_one[task]} would\nhave been right)"
        axes.text(0.78, top + height / 2, told, fontsize=8.5, va="center", color="black")
        top += height + 0.035


def _box(
    x: float, y: float, width: float, height: float, colour: Any, alpha: float = 1
) -> Rectangle:
    return Rectangle((x, y), width, height, facecolor=colour, edgecolor="none", alpha=alpha)


if __name__ == "__main__":
    main(*sys.argv[1:])
