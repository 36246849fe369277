"""The report of an analysis: a page that needs no network, its numbers and figures beside it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ... import __version__
from ...analysis.pool_sizes import PoolSizeCurve
from ...analysis.result import Analysis
from ...errors import EvaluationError
from ...evaluation.comparison.methods import label_of
from ...files.atomic import write_text
from ...files.quoting import reason
from .assets import EXPLORER_CSS, EXPLORER_JS, asset, inline_json, render
from .contents import sections_of
from .figures import dataset_matrix, heat_maps, pool_size_figure, usage_bars, write_png

__all__ = ["REPORT", "report_page", "write_report"]

REPORT, NUMBERS, FIGURES = "report.html", "analysis.json", "figures"
PER_ROUTER = LAYERS, DATASETS, USAGE = "layers", "datasets", "usage"  # kinds of figures
POOL_SIZES = "pool-sizes"


def write_report(
    analysis: Analysis, folder: str | Path, curves: Sequence[PoolSizeCurve] = ()
) -> Path:
    """The page that was written to `folder`, with analysis.json and figures/*.png beside it.

    The page holds texts of the data where `analyse` traced some; the other files hold none.
    Figures show all experts, the page's the most used ones; those of an earlier report are removed.
    Raises EvaluationError when a file can't be written.
    """
    folder = Path(folder)
    analysis.write_json(folder / NUMBERS)
    write_text(folder / REPORT, report_page(analysis, curves), EvaluationError)
    everyone = len(analysis.experts)
    try:
        (folder / FIGURES).mkdir(exist_ok=True)
        _remove_figures(folder / FIGURES)
        for name, router in analysis.routers.items():
            layers = heat_maps(router.distributions, oracle=analysis.oracle, most=everyone)
            write_png(layers, folder / FIGURES / f"{LAYERS}-{name}.png")
            shares = router.by_dataset()
            matrix = dataset_matrix(shares, analysis.experts, oracle=analysis.oracle, most=everyone)
            write_png(matrix, folder / FIGURES / f"{DATASETS}-{name}.png")
            bars = usage_bars(shares, analysis.experts, most=everyone)
            write_png(bars, folder / FIGURES / f"{USAGE}-{name}.png")
        if curves:
            write_png(pool_size_figure(curves), folder / FIGURES / f"{POOL_SIZES}.png")
    except OSError as error:
        raise EvaluationError(f"{folder} can't be written: {reason(error)}.") from error
    return folder / REPORT


def _remove_figures(folder: Path) -> None:
    for name in (*(f"{kind}-*" for kind in PER_ROUTER), POOL_SIZES):
        for old in folder.glob(f"{name}.png"):
            old.unlink()


def report_page(analysis: Analysis, curves: Sequence[PoolSizeCurve] = ()) -> str:
    """The page, as HTML with everything in it."""
    parts = sections_of(analysis, curves)
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
        title=f"Routing of {len(analysis.experts)} experts",
        summary=f"{routers} on {', '.join(analysis.datasets)}"
        + (f", {limit} examples each at most." if limit else "."),
        css=asset("report.css") + asset(EXPLORER_CSS),
        script=asset(EXPLORER_JS) + asset("report.js"),
        sections=sections,
        findings=findings,
        traces=traces,
        parts=parts,
        footer=f"phatgoose {__version__}. Formulas: docs/analysis.md of the project.",
    )
