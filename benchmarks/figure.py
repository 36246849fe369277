"""The figure of time and memory against the number of experts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib.axes import Axes
from matplotlib.figure import Figure

__all__ = ["draw_growth"]

TIMES = {
    "routed": ("routed layer", "#0b3c5d", "o"),
    "base": ("base layer alone", "#7a7a7a", "s"),
    "gates": ("gate product", "#d1700f", "^"),
    "lora": ("LoRA part", "#2e8b57", "D"),
}
BYTES = {
    "experts": ("experts and gates", "#0b3c5d", "o"),
    "pass": ("peak of a pass", "#d1700f", "^"),
}


def draw_growth(details: Mapping[str, Any], caption: str, path: Path) -> None:
    """Write a PNG of what `growth.measure_growth` found: time on the left, memory on the right."""
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    experts: Sequence[int] = details["E"]
    for part, style in TIMES.items():
        _line(left, experts, [1e3 * value for value in details["seconds"][part]], style)
    for part, style in BYTES.items():
        _line(right, experts, [value / 1e6 for value in details["bytes"][part]], style)
    left.set_ylabel("milliseconds")
    right.set_ylabel("megabytes")
    right.set_yscale("log", base=10)
    for axes, title in ((left, "Time of one pass"), (right, "Memory")):
        axes.set_title(title, loc="left", fontsize=11)
        axes.set_xscale("log", base=2)
        axes.set_xticks(experts, [str(count) for count in experts])
        axes.set_xlabel("experts E")
        axes.grid(visible=True, alpha=0.3)
        axes.legend(frameon=False, fontsize=9)
    left.set_ylim(bottom=0)
    figure.suptitle(caption, fontsize=9, x=0.01, ha="left")
    figure.savefig(path, dpi=130)


def _line(axes: Axes, x: Sequence[int], y: Sequence[float], style: tuple[str, str, str]) -> None:
    label, colour, marker = style
    axes.plot(x, y, label=label, color=colour, marker=marker, markersize=5, linewidth=1.6)
