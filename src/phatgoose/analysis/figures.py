"""Figures of an analysis: which experts served which tokens.

Colours are safe for colour-blind readers: cividis.
"""

from __future__ import annotations

import html
import io
import math
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..errors import ConfigError
from ..files import new_file
from .distribution import RoutingDistribution
from .measures import Array

try:
    import matplotlib
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage
    from matplotlib.ticker import MaxNLocator
except ImportError as error:
    raise ConfigError("Reports need matplotlib: pip install 'phatgoose[figures]'.") from error


INK = "#010203"  # black in a PNG; in a page it becomes the colour of the text
STYLE = {
    "axes.edgecolor": INK,
    "axes.facecolor": "none",
    "axes.labelcolor": INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "figure.facecolor": "none",
    "font.size": 9,
    "legend.frameon": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "phatgoose",
    "text.color": INK,
    "text.parse_math": False,  # names may hold dollars
    "xtick.color": INK,
    "ytick.color": INK,
}
MOST_EXPERTS = 40  # more rows or columns than this are hard to read in a page

styled = matplotlib.rc_context(STYLE)


@styled
def heat_maps(
    distributions: Mapping[str, RoutingDistribution],
    oracle: Mapping[str, str] = {},
    most: int = MOST_EXPERTS,
) -> Figure:
    """The paper's Figure 3: experts down, layers across, a row of panels for each dataset.

    Encoder and decoder stand beside each other, and Oracle's expert where `oracle` has it. A cell
    is the mean weight over the layer's tokens and sites. Of more than `most` experts those with the
    highest cells are shown.
    """
    grids_of = {dataset: _grids(spread) for dataset, spread in distributions.items()}
    grids = [grid for by_stack in grids_of.values() for grid in by_stack.values()]
    experts = next(iter(distributions.values())).experts
    peaks = np.nanmax([np.nanmax(grid, axis=1) for grid in grids], axis=0)
    shown = _shown(experts, peaks, most, set(oracle.values()))
    widths: list[float] = [grid.shape[1] for grid in next(iter(grids_of.values())).values()]
    if oracle:
        widths.append(1.5)
    height = 0.8 + len(shown.labels) * (0.2 if shown.is_few else 0.135)
    width = 1.3 + 0.07 * max(map(len, shown.labels)) + max(2.5, 0.16 * sum(widths))
    rows = len(grids_of)
    figure = Figure(figsize=(width, 0.3 + height * rows), layout="constrained")
    panels = figure.subplots(rows, len(widths), squeeze=False, sharey=True, width_ratios=widths)
    highest = max(float(np.nanmax(shown.of(grid))) for grid in grids)
    for row, (dataset, by_stack) in zip(panels, grids_of.items(), strict=True):
        for panel, (stack, grid) in zip(row, by_stack.items(), strict=False):
            image = _heat_map(panel, shown.of(grid), highest)
            panel.set_xlabel(f"{stack} layer".strip(), labelpad=1)
            panel.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        if oracle:
            only = np.array([[expert == oracle.get(dataset)] for expert in experts], float)
            _heat_map(row[-1], shown.of(only), 1.0)
            row[-1].set_xticks([0], ["Oracle"])
        row[0].set_yticks(range(len(shown.labels)), shown.labels, fontsize=shown.font_size)
        row[0].set_title(dataset, loc="left", fontsize=10)
        row[0].set_ylabel(shown.left_out(distributions[dataset].whole()), fontsize=8)
    figure.colorbar(image, ax=panels, label="mean weight", pad=0.01, aspect=30, shrink=0.9)
    return figure


@styled
def dataset_matrix(
    shares: Mapping[str, Array],
    experts: Sequence[str],
    oracle: Mapping[str, str] = {},
    most: int = MOST_EXPERTS,
) -> Figure:
    """Each expert's share of the weight on each dataset; a ring marks Oracle's expert."""
    values = np.array(list(shares.values()))
    shown = _shown(experts, values.max(axis=0), most, set(oracle.values()))
    grid = shown.of(values.T).T
    width = 2.2 + grid.shape[1] * (0.55 if shown.is_few else 0.17)
    figure = Figure(figsize=(width, 1.6 + 0.3 * len(grid)), layout="constrained")
    panel = figure.subplots()
    image = _heat_map(panel, grid, float(grid.max()))
    panel.set_xticks(range(grid.shape[1]), shown.labels, fontsize=shown.font_size, rotation=90)
    ring_size = 8
    if shown.is_few:
        for label in panel.get_xticklabels():
            label.set(rotation=45, ha="right", rotation_mode="anchor")
        ring_size = 17
        _write_shares(panel, grid)
    panel.set_yticks(range(len(grid)), list(shares))
    for row, dataset in enumerate(shares):
        if dataset in oracle:
            column = shown.labels.index(oracle[dataset])
            for colour, width in (("white", 4.0), ("black", 2.0)):  # seen on any cell
                panel.plot(column, row, "o", ms=ring_size, mfc="none", mec=colour, mew=width)
    panel.set_xlabel(shown.left_out(values.mean(axis=0)), fontsize=8)
    figure.colorbar(image, ax=panel, label="share of the weight", pad=0.01, aspect=15)
    return figure


def _write_shares(panel: Axes, grid: Array) -> None:
    for (row, column), share in np.ndenumerate(grid):
        colour = "black" if share > 0.45 * grid.max() else "white"
        text = f"{100 * share:.0f}"
        panel.text(column, row, text, ha="center", va="center", fontsize=8, color=colour)


def write_png(figure: Figure, path: str | Path) -> None:
    with new_file(Path(path)) as unfinished:
        figure.savefig(unfinished, format="png", dpi=150, facecolor="white")


@styled
def svg_of(figure: Figure, name: str, label: str) -> str:
    """`figure` as an `<svg>` element for a page: transparent, in the page's text colour and font.

    `name` begins its ids, which no other figure may use; `label` is for screen readers.
    """
    drawn = io.StringIO()
    figure.savefig(drawn, format="svg", dpi=150, transparent=True, metadata={"Date": None})
    svg = drawn.getvalue()
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor")
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.S)
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r"url\(#", f"url(#{name}-", svg)
    svg = re.sub(r'href="#', f'href="#{name}-', svg)
    return svg.replace("<svg", f'<svg role="img" aria-label="{html.escape(label)}"', 1)


class _Shown(NamedTuple):
    labels: list[str]
    rows: list[int]

    @property
    def is_few(self) -> bool:
        return len(self.rows) <= 12

    @property
    def font_size(self) -> int:
        return 9 if self.is_few else 7

    def of(self, values: Array) -> Array:
        return values[self.rows]

    def left_out(self, shares: Array) -> str:
        count = len(shares) - len(self.rows)
        if count == 0:
            return ""
        left = 1 - shares[self.rows].sum() / (shares.sum() or 1)
        return f"not shown: {count} experts with {left:.0%} of the weight"


def _shown(experts: Sequence[str], peaks: Array, most: int, first: set[str]) -> _Shown:
    """The experts in `first`, and up to `most` in all those of the highest `peaks`."""
    most = max(most, sum(name in first for name in experts))
    ranked = sorted(range(len(experts)), key=lambda z: (experts[z] not in first, -peaks[z]))
    rows = sorted(ranked[:most])
    return _Shown([experts[z] for z in rows], rows)


def _grids(distribution: RoutingDistribution) -> dict[str, Array]:
    """The mean weights by layer, [E, layers] of each stack."""
    stacks = defaultdict[str, dict[int, Array]](dict)
    labels = {label.layer_name: label for label in distribution.labels.values()}
    for name, mean in distribution.by_layer().items():
        label = labels[name]
        stacks[label.stack][label.layer] = mean
    empty = np.full(len(distribution.experts), math.nan)
    grids = {}
    for stack, means in stacks.items():
        columns = [means.get(layer, empty) for layer in range(max(means) + 1)]
        grids[stack] = np.array(columns).T
    return grids


def _heat_map(panel: Axes, grid: Array, highest: float) -> AxesImage:
    panel.spines[:].set_visible(False)
    return panel.imshow(
        grid, aspect="auto", cmap="cividis", vmin=0, vmax=highest or 1, interpolation="nearest"
    )
