"""The report of an analysis: a page that needs no network, its numbers and figures beside it."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from numpy.typing import NDArray

from ... import __version__
from ...analysis.analyse import Analysis, RouterAnalysis
from ...analysis.measures import (
    ORACLE,
    concentration,
    effective_experts,
    heaviest,
    load,
    margins,
)
from ...analysis.routing_distribution import PARTS
from ...errors import EvaluationError
from ...evaluation.results import in_per_cent
from ...evaluation.rows import label_of
from ...files import reason, write_text
from . import figures as draw

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FOLDER = Path(__file__).parent
EXPLORER_JS, EXPLORER_CSS = "explorer.js", "explorer.css"  # any page may use them; see explorer.js


def asset(name: str, folder: Path = FOLDER) -> str:
    return (folder / name).read_text(encoding="utf-8")


def inline_json(content: Any) -> str:
    """`content` as JSON that may stand inside a `<script>` element, whatever texts are in it."""
    text = json.dumps(content, ensure_ascii=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def render(template: str, folder: Path = FOLDER, **values: Any) -> str:
    """The jinja2 `template` of `folder`, filled; values are escaped, missing ones refused."""
    environment = Environment(
        loader=FileSystemLoader(folder),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template(template).render(values)


Array = NDArray[np.float64]


TERMS = {  # what a column's name means, shown where one points at it; before any " ("
    "effective experts": "exp of the entropy of the mean weights: as many experts as, if they had "
    "equal shares, would be spread as much",
    "concentration": "the sum of the squared shares: 1 where one expert has all",
    "most often first": "the experts that most often have the greatest weight",
    "decidedness of a token": "1 less a token's mean entropy over ln E: 1 where one expert has all",
    "median margin": "the first expert's weight less the second's, of the prompt in the middle",
    "same first choice": "how often both routers give the greatest weight to one expert",
    "overlap of weights": "the part of their weights that two routers share: 1 where all are equal",
    "KL to the other / back, mean over datasets": "how far the distributions before top-k lie "
    "apart, in nats: 0 where they are equal",
    "decisions": "tokens times sites that were compared",
}


class Table(NamedTuple):
    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]


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


def sections_of(analysis: Analysis) -> list[Section]:
    """The parts of the page below the token explorer, without those that have no numbers."""
    parts: Iterable[Section | None] = (
        _scores(analysis),
        _prompts(analysis),
        _usage(analysis),
        _layers(analysis),
        _divergences(analysis),
        _datasets(analysis),
        _effects(analysis),
    )
    return [part for part in parts if part is not None]


def _scores(analysis: Analysis) -> Section | None:
    rows = []
    for name, router in analysis.routers.items():
        scores = [router.scores[d] for d in analysis.datasets if d in router.scores]
        if scores:
            cells = [in_per_cent(s.score, s.low, s.high) for s in scores]
            mean = sum(s.score for s in scores) / len(scores)
            rows.append([label_of(name), *cells, f"{100 * mean:.1f}"])
    if not rows:
        return None
    if analysis.oracle:
        rows.append(["Oracle's expert", *(analysis.oracle[d] for d in analysis.datasets), ""])
    first = next(router.scores for router in analysis.routers.values() if router.scores)
    header = ["router", *(f"{d} (n = {first[d].n})" for d in analysis.datasets), "mean"]
    return Section(
        "scores",
        "Scores",
        tables=[Table("Zero-shot score in %, with 95 % intervals", header, rows)],
    )


def _prompts(analysis: Analysis) -> Section | None:
    """Which prompts went where, of the routers that choose for whole prompts."""
    tables: list[Table] = []
    figures: list[PageFigure] = []
    for name, router in analysis.routers.items():
        if not router.choices:
            continue
        rows = []
        for dataset, weights in router.choices.items():
            share = np.bincount(weights.argmax(1), minlength=len(analysis.experts)) / len(weights)
            went = ", ".join(
                f"{analysis.experts[z]} {100 * share[z]:.0f} %" for z in heaviest(share, 3)
            )
            rows.append([dataset, str(len(weights)), went, f"{np.median(margins(weights)):.2f}"])
        header = ["dataset", "prompts", "most often first", "median margin"]
        tables.append(Table(f"{label_of(name)}: where prompts went", header, rows))
        if np.ptp(np.concatenate([margins(each) for each in router.choices.values()])) > 1e-6:
            caption = f"{label_of(name)}: a point per prompt, by its first expert and its margin."
            figure = draw.prompt_choices(router.choices, analysis.experts)
            figures.append(PageFigure.of(figure, f"prompts-{len(figures)}", caption))
    if not tables:
        return None
    return Section("prompts", "Which prompts went where", tables=tables, figures=figures)


def _varied(analysis: Analysis) -> dict[str, RouterAnalysis]:
    """The routers that differ from token to token or from layer to layer."""

    def is_flat(router: RouterAnalysis) -> bool:
        layers = (list(found.by_layer().values()) for found in router.distributions.values())
        return bool(router.choices) and all(np.allclose(each, each[0]) for each in layers)

    return {name: router for name, router in analysis.routers.items() if not is_flat(router)}


def _usage(analysis: Analysis) -> Section:
    shares = {label_of(name): router.mean() for name, router in analysis.routers.items()}
    figure = PageFigure.of(
        draw.usage_bars(shares, analysis.experts),
        "usage",
        "Each expert's share of the weight, mean over datasets and sites; dashed: an even share.",
    )
    return Section(
        "usage",
        "Who is used",
        [
            "Decidedness is 1 less the mean entropy of a single token's distribution over ln E: 0 "
            "where a router finds all experts alike, 1 where it knows just one."
        ],
        [_usage_table(analysis), *_groups_table(analysis), *_agreement_table(analysis)],
        [figure],
    )


def _usage_table(analysis: Analysis) -> Table:
    rows = []
    highest = math.log(max(2, len(analysis.experts)))  # one expert alone has no entropy anyway
    for name, router in analysis.routers.items():
        first, weight = router.mean("first"), router.mean()
        top = int(first.argmax())
        entropies = [found.token_entropy() for found in router.distributions.values()]
        rows.append(
            [
                label_of(name),
                f"{effective_experts(weight):.1f}",
                f"{effective_experts(router.mean('probability')):.1f}",
                f"{concentration(weight):.3f}",
                f"{analysis.experts[top]} {100 * first[top]:.0f} % (load {load(first)[top]:.1f})",
                f"{100 * (1 - float(np.mean(entropies)) / highest):.1f} %",
            ]
        )
    return Table(
        f"Over {'all ' if len(analysis.datasets) > 1 else ''}"
        f"{draw.counted(len(analysis.datasets), 'dataset')}; "
        f"{draw.counted(len(analysis.experts), 'expert')}",
        [
            "router",
            "effective experts (weights)",
            "effective experts (before top-k)",
            "concentration",
            "most often first",
            "decidedness of a token",
        ],
        rows,
    )


def _groups_table(analysis: Analysis) -> Iterator[Table]:
    rows: dict[str, list[str]] = {}
    routers = _varied(analysis)
    for router in routers.values():
        every = list(router.distributions.values())
        groups = {f"{part}s": [found.whole(part=part) for found in every] for part in PARTS}
        by_kind = [found.by_kind() for found in every]
        for kind in dict.fromkeys(kind for held in by_kind for kind in held):
            groups[kind] = [held[kind] for held in by_kind if kind in held]
        for name, weights in groups.items():
            rows.setdefault(name, [name]).append(_summary(np.mean(weights, axis=0), analysis))
    if rows:
        yield Table(
            "Effective experts and the most used one, for the tokens of prompts and answers and "
            "for each kind of site",
            ["", *map(label_of, routers)],
            list(rows.values()),
        )


def _summary(weight: Array, analysis: Analysis) -> str:
    if not weight.any():
        return ""
    top = int(weight.argmax())
    share = weight[top] / weight.sum()
    return f"{effective_experts(weight):.1f}, {analysis.experts[top]} {100 * share:.0f} %"


def _agreement_table(analysis: Analysis) -> Iterator[Table]:
    rows = [
        [
            f"{label_of(a)} and {label_of(b)}",
            f"{100 * found.first:.1f} %",
            f"{found.overlap:.3f}",
            _mean_divergence(analysis, a, b),
            f"{found.decisions:,}",
        ]
        for (a, b), found in analysis.agreements.items()
    ]
    if rows:
        chance = f"by chance {100 / len(analysis.experts):.1f} %"
        yield Table(
            "Agreement of routers, token by token and site by site",
            [
                "routers",
                f"same first choice ({chance})",
                "overlap of weights",
                "KL to the other / back, mean over datasets",
                "decisions",
            ],
            rows,
        )


def _mean_divergence(analysis: Analysis, router: str, other: str) -> str:
    found = [analysis.divergence(router, other, dataset) for dataset in analysis.datasets]
    to, back = (np.mean(values) for values in zip(*((d.to, d.back) for d in found), strict=True))
    return f"{to:.3f} / {back:.3f}"


def _layers(analysis: Analysis) -> Section | None:
    groups, routers = {}, _varied(analysis)
    if not routers:
        return None
    for index, dataset in enumerate(analysis.datasets):
        figures: list[PageFigure] = []
        for name, router in routers.items():
            figure = draw.heat_maps(
                {dataset: router.distributions[dataset]}, oracle=analysis.oracle
            )
            caption = f"{label_of(name)} on {dataset}: mean weight of each expert at each layer."
            figures.append(PageFigure.of(figure, f"layers-{index}-{len(figures)}", caption))
        groups[dataset] = figures
    return Section("layers", "Experts by layer", groups=groups)


def _divergences(analysis: Analysis) -> Section | None:
    if not analysis.oracle:
        return None
    rows, points, correlations = [], {}, {}
    for name, router in analysis.routers.items():
        if name == ORACLE:
            continue
        each = {d: analysis.divergence(name, ORACLE, d) for d in analysis.datasets}
        rows.append([label_of(name), *(f"{e.to:.2f} / {e.back:.2f}" for e in each.values())])
        found = analysis.correlation(name)
        if found is not None:
            label = label_of(name)
            correlations[label] = found
            points[label] = [draw.Point(d, each[d].to, router.scores[d].score) for d in each]
    if not rows:
        return None
    figures: list[PageFigure] = []
    if points:
        figure = draw.divergence_scatter(points, correlations)
        caption = (
            "Score against KL(router ‖ Oracle), a point per dataset; r is Pearson's with Fisher's "
            "95 % interval, ρ Spearman's. The paper finds r = −0.2."
        )
        figures.append(PageFigure.of(figure, "divergence", caption))
    text = (
        "Divergence of a router's whole-model distribution before top-k from Oracle's, which has "
        f"all weight on one expert; both are mixed with {analysis.smoothing:g} of the uniform one."
    )
    caption = "KL(router ‖ Oracle) / KL(Oracle ‖ router) in nats"
    table = Table(caption, ["router", *analysis.datasets], rows)
    return Section("divergence", "How far from Oracle", [text], [table], figures)


def _datasets(analysis: Analysis) -> Section | None:
    figures: list[PageFigure] = []
    tables: list[Table] = []
    varied = _varied(analysis)  # the others' table of prompts has these shares already
    for index, (name, router) in enumerate(analysis.routers.items()):
        if name in varied:
            shares = router.by_dataset()
            figure = draw.dataset_matrix(shares, analysis.experts, oracle=analysis.oracle)
            ring = " A ring marks Oracle's expert." if analysis.oracle else ""
            caption = f"{label_of(name)}: share of each expert on each dataset.{ring}"
            figures.append(PageFigure.of(figure, f"datasets-{index}", caption))
        if len(analysis.datasets) > 1:
            rows = [
                [dataset, *(f"{value:.2f}" for value in row)]
                for dataset, row in zip(analysis.datasets, analysis.overlaps(name), strict=True)
            ]
            caption = (
                f"{label_of(name)}: overlap of the distributions of two datasets (1: the same)"
            )
            tables.append(Table(caption, ["", *analysis.datasets], rows))
    if not (figures or tables):
        return None
    return Section("datasets", "Datasets beside each other", tables=tables, figures=figures)


def _effects(analysis: Analysis) -> Section | None:
    if not analysis.effects:
        return None
    rows = [
        [
            effect.expert,
            in_per_cent(effect.mean, effect.interval.low, effect.interval.high, "+.1f"),
            *(f"{100 * effect.by_task.get(d, math.nan):+.1f}" for d in analysis.datasets),
        ]
        for effect in analysis.effects
    ]
    table = Table(
        f"{label_of(next(iter(analysis.routers)))}: score with all experts less that without this "
        f"one, in points, with 95 % intervals over datasets and examples",
        ["left out", "mean", *analysis.datasets],
        rows,
    )
    return Section("effects", "Which experts matter", tables=[table])


REPORT, NUMBERS, FIGURES = "report.html", "analysis.json", "figures"
PER_ROUTER = LAYERS, DATASETS, USAGE = "layers", "datasets", "usage"  # kinds of figures


def write_report(analysis: Analysis, folder: str | Path) -> Path:
    """The page that was written to `folder`, with analysis.json and figures/*.png beside it.

    Only the page holds texts of the data, where `analyse` traced some. Figures show all experts,
    the page's the most used ones. Raises EvaluationError when a file can't be written.
    """
    folder = Path(folder)
    analysis.write_json(folder / NUMBERS)
    write_text(folder / REPORT, report_page(analysis), EvaluationError)
    everyone = len(analysis.experts)
    try:
        (folder / FIGURES).mkdir(exist_ok=True)
        for kind in PER_ROUTER:
            for old in (folder / FIGURES).glob(f"{kind}-*.png"):
                old.unlink()
        varied = _varied(analysis)
        names = file_names(analysis.routers)
        for file, (name, router) in zip(names, analysis.routers.items(), strict=True):
            if name in varied:
                layers = draw.heat_maps(router.distributions, oracle=analysis.oracle, most=everyone)
                draw.write_png(layers, folder / FIGURES / f"{LAYERS}-{file}.png")
            shares = router.by_dataset()
            matrix = draw.dataset_matrix(
                shares, analysis.experts, oracle=analysis.oracle, most=everyone
            )
            draw.write_png(matrix, folder / FIGURES / f"{DATASETS}-{file}.png")
            bars = draw.usage_bars(shares, analysis.experts, most=everyone)
            draw.write_png(bars, folder / FIGURES / f"{USAGE}-{file}.png")
    except OSError as error:
        raise EvaluationError(f"{folder} can't be written: {reason(error)}.") from error
    return folder / REPORT


def file_names(routers: Iterable[str]) -> Iterator[str]:
    """A part of a file's name for each of `routers`, whose settings may hold paths and colons."""
    for number, router in enumerate(routers):
        plain = re.sub(r"[^\w.=,-]+", "-", router)
        yield plain if plain == router else f"{plain}-{number}"


def report_page(analysis: Analysis) -> str:
    """The report of `analysis` as one HTML page that loads nothing else."""
    parts = sections_of(analysis)
    findings = [
        (label_of(name), finding.message)
        for name, router in analysis.routers.items()
        for finding in router.findings
    ]
    traces = [
        {"name": f"{dataset} {number}, {label_of(name)}", "json": inline_json(trace.to_dict())}
        for dataset in analysis.datasets
        for name, router in analysis.routers.items()
        for number, trace in enumerate(router.traces.get(dataset, ()), 1)
    ]
    sections = [("findings", "What looks wrong")] if findings else []
    sections += [("tokens", "Token by token")] if traces else []
    sections += [(part.id, part.name) for part in parts]
    limit = analysis.settings.get("limit")
    routers = ", ".join(map(label_of, analysis.routers))
    return render(
        "report.html.jinja",
        title=f"Routing of {draw.counted(len(analysis.experts), 'expert')}",
        summary=f"{routers} on {', '.join(analysis.datasets)}"
        + (f", {limit} examples each at most." if limit else "."),
        css=asset("report.css") + asset(EXPLORER_CSS),
        script=asset(EXPLORER_JS) + asset("report.js"),
        sections=sections,
        findings=findings,
        traces=traces,
        parts=parts,
        terms=TERMS,
        footer=f"phatgoose {__version__}. Formulas: docs/analysis.md of the project.",
    )
