"""The report of an analysis: a page that needs no network, its numbers and figures beside it."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from ..errors import EvaluationError
from ..evaluation.compare import label_of
from ..evaluation.metrics import Estimate
from ..evaluation.tables import Table
from ..files import write_text, writing
from . import figures as draw
from .analyse import Analysis, RouterAnalysis
from .measures import ORACLE, SMOOTHING, Array, concentration, effective_experts, heaviest, margins
from .page import EXPLORER_CSS, EXPLORER_JS, asset, inline_json, render

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TERMS = {  # what a column's name means, shown where one points at it; before any " ("
    "effective experts": "exp of the entropy of the mean weights: as many experts as, if they had "
    "equal shares, would be spread as much",
    "concentration": "the sum of the squared shares: 1 where one expert has all",
    "most often first": "the experts that most often have the greatest weight",
    "decidedness of a token": "1 less a token's mean entropy over ln E: 1 where one expert has all",
    "median margin": "the first expert's weight less the second's, of the prompt in the middle",
}


class PageFigure(NamedTuple):
    svg: str
    caption: str

    @classmethod
    def of(cls, figure: Figure, name: str, caption: str) -> PageFigure:
        return cls(draw.svg_of(figure, name, caption), caption)


class Section(NamedTuple):
    id: str
    name: str
    texts: Sequence[str] = ()
    tables: Sequence[Table] = ()
    figures: Sequence[PageFigure] = ()
    groups: Mapping[str, Sequence[PageFigure]] = {}

    @property
    def has_numbers(self) -> bool:
        return bool(self.tables or self.figures or self.groups)


def _scores(analysis: Analysis) -> Section:
    rows = []
    header = ["router"]
    for name, router in analysis.routers.items():
        scores = list(router.scores.values())
        header = ["router", *(f"{score.task} (n = {score.n})" for score in scores), "mean"]
        cells = [Estimate(score.score, score.low, score.high).in_per_cent for score in scores]
        mean = sum(score.score for score in scores) / max(1, len(scores))
        rows.append([label_of(name), *cells, f"{100 * mean:.1f}"])
    tables = []
    has_scores = len(header) > 2  # beside the router and the mean
    if has_scores:
        if analysis.oracle:
            rows.append(["Oracle's expert", *analysis.oracle.values(), ""])
        tables.append(Table("Zero-shot score in %, with 95 % intervals", header, rows))
    return Section("scores", "Scores", tables=tables)


def _prompts(analysis: Analysis) -> Section:
    """Which prompts went where, of the routers that choose for whole prompts."""
    tables = []
    names = (*analysis.experts, "the base")
    for name, router in analysis.routers.items():
        rows = []
        for dataset, weights in router.choices.items():
            firsts = np.where(weights.any(1), weights.argmax(1), len(analysis.experts))
            shares = np.bincount(firsts, minlength=len(names)) / len(weights)
            margin = f"{np.median(margins(weights)):.2f}"
            rows.append([dataset, str(len(weights)), _most(names, shares, 3), margin])
        if rows:
            header = ["dataset", "prompts", "most often first", "median margin"]
            tables.append(Table(f"{label_of(name)}: where prompts went", header, rows))
    return Section("prompts", "Which prompts went where", tables=tables)


def _most(names: Sequence[str], shares: Array, count: int) -> str:
    best = heaviest(shares, count)
    return ", ".join(f"{names[z]} {100 * shares[z]:.0f} %" for z in best)


def _varied(analysis: Analysis) -> dict[str, RouterAnalysis]:
    """The routers that differ from token to token or from layer to layer."""
    return {name: router for name, router in analysis.routers.items() if not _is_flat(router)}


def _is_flat(router: RouterAnalysis) -> bool:
    if not router.choices:
        return False
    for spread in router.distributions.values():
        layers = list(spread.by_layer().values())
        if not np.allclose(layers, layers[0]):
            return False
    return True


def _usage(analysis: Analysis) -> Section:
    rows = []
    highest = math.log(max(2, len(analysis.experts)))  # one expert alone has no entropy anyway
    for name, router in analysis.routers.items():
        weights = router.mean()
        entropies = [spread.token_entropy() for spread in router.distributions.values()]
        rows.append(
            [
                label_of(name),
                f"{effective_experts(weights):.1f}",
                f"{effective_experts(router.mean('probability')):.1f}",
                f"{concentration(weights):.3f}",
                _most(analysis.experts, weights, 5),
                _most(analysis.experts, router.mean("first"), 1),
                f"{100 * (1 - float(np.mean(entropies)) / highest):.1f} %",
            ]
        )
    header = [
        "router",
        "effective experts (weights)",
        "effective experts (before top-k)",
        "concentration",
        "most weight",
        "most often first",
        "decidedness of a token",
    ]
    sizes = f"{len(analysis.datasets)} datasets, {len(analysis.experts)} experts"
    return Section("usage", "Who is used", tables=[Table(sizes, header, rows)])


def _layers(analysis: Analysis) -> Section:
    groups: dict[str, list[PageFigure]] = {}
    for name, router in _varied(analysis).items():
        for index, dataset in enumerate(analysis.datasets):
            figures = groups.setdefault(dataset, [])
            figure = draw.heat_maps({dataset: router.distributions[dataset]}, analysis.oracle)
            caption = f"{label_of(name)} on {dataset}: mean weight of each expert at each layer."
            figures.append(PageFigure.of(figure, f"layers-{index}-{len(figures)}", caption))
    return Section("layers", "Experts by layer", groups=groups)


def _divergences(analysis: Analysis) -> Section:
    rows = []
    for name in analysis.routers:
        if name == ORACLE or not analysis.oracle:
            continue
        row = [label_of(name)]
        for dataset in analysis.datasets:
            divergence = analysis.divergence(name, ORACLE, dataset)
            row.append(f"{divergence.to:.2f} / {divergence.back:.2f}")
        correlation = analysis.correlation(name)
        r = correlation.pearson if correlation else None
        rows.append([*row, f"{r.value:.2f} [{r.low:.2f}, {r.high:.2f}]" if r else ""])
    text = (
        "Divergence of a router's whole-model distribution before top-k from Oracle's, which has "
        f"all weight on one expert; both are mixed with {SMOOTHING:g} of the uniform one. r is "
        "Pearson's between KL(router ‖ Oracle) and the score over datasets, with Fisher's interval "
        "(the paper finds −0.2)."
    )
    title = "KL(router ‖ Oracle) / KL(Oracle ‖ router) in nats"
    tables = [Table(title, ["router", *analysis.datasets, "r with the score"], rows)]
    return Section("divergence", "How far from Oracle", [text], tables if rows else [])


def _datasets(analysis: Analysis) -> Section:
    figures: list[PageFigure] = []
    # The others' table of prompts has these shares already.
    for name, router in _varied(analysis).items():
        shares = router.by_dataset()
        figure = draw.dataset_matrix(shares, analysis.experts, analysis.oracle)
        ring = " A ring marks Oracle's expert." if analysis.oracle else ""
        caption = f"{label_of(name)}: share of each expert on each dataset.{ring}"
        figures.append(PageFigure.of(figure, f"datasets-{len(figures)}", caption))
    return Section("datasets", "Datasets beside each other", figures=figures)


REPORT = "report.html"
NUMBERS = "analysis.json"
FIGURES = "figures"


def write_report(analysis: Analysis, folder: str | Path) -> Path:
    """The page that was written to `folder`, with analysis.json and figures/*.png beside it.

    Only the page holds texts of the data, where `analyse` traced some. Figures show all experts,
    the page's the most used ones. Raises EvaluationError when a file can't be written.
    """
    folder = Path(folder)
    content = json.dumps(analysis.to_dict(), ensure_ascii=False) + "\n"
    write_text(folder / NUMBERS, content, EvaluationError)
    write_text(folder / REPORT, report_page(analysis), EvaluationError)
    figures = folder / FIGURES
    most = len(analysis.experts)
    varied = _varied(analysis)
    with writing(folder, EvaluationError):
        figures.mkdir(exist_ok=True)
        for kind in ("layers", "datasets"):
            for old in figures.glob(f"{kind}-*.png"):
                old.unlink()
        for number, (name, router) in enumerate(analysis.routers.items()):
            # Whose settings may hold paths and colons.
            plain = re.sub(r"[^\w.=,-]+", "-", name)
            file = plain if plain == name else f"{plain}-{number}"
            shares = router.by_dataset()
            matrix = draw.dataset_matrix(shares, analysis.experts, analysis.oracle, most)
            draw.write_png(matrix, figures / f"datasets-{file}.png")
            if name in varied:
                maps = draw.heat_maps(router.distributions, analysis.oracle, most)
                draw.write_png(maps, figures / f"layers-{file}.png")
    return folder / REPORT


def report_page(analysis: Analysis) -> str:
    """The report of `analysis` as one HTML page that loads nothing else."""
    findings = list[tuple[str, str]]()
    traces = []
    for name, router in analysis.routers.items():
        findings += ((label_of(name), finding.message) for finding in router.findings)
    for dataset, (name, router) in product(analysis.datasets, analysis.routers.items()):
        for number, trace in enumerate(router.traces.get(dataset, ()), 1):
            title = f"{dataset} {number}, {label_of(name)}"
            traces.append({"name": title, "json": inline_json(trace.to_dict())})
    sections = []
    if findings:
        sections.append(("findings", "What looks wrong"))
    if traces:
        sections.append(("tokens", "Token by token"))
    parts = []  # below the token explorer
    for make in (_scores, _prompts, _usage, _layers, _divergences, _datasets):
        part = make(analysis)
        if part.has_numbers:
            parts.append(part)
            sections.append((part.id, part.name))
    summary = ", ".join(map(label_of, analysis.routers)) + f" on {', '.join(analysis.datasets)}"
    limit = analysis.settings.get("limit")
    if limit:
        summary += f", {limit} examples each at most"
    return render(
        "report.html.jinja",
        title=f"Routing of {len(analysis.experts)} experts",
        summary=f"{summary}.",
        css=asset("report.css") + asset(EXPLORER_CSS),
        script=asset(EXPLORER_JS) + asset("report.js"),
        sections=sections,
        findings=findings,
        traces=traces,
        parts=parts,
        terms=TERMS,
    )
