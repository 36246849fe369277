"""Tables of pools, scores, comparisons and analyses for the terminal."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from rich.table import Table
from rich.text import Text

from ..analysis.analyse import Analysis
from ..analysis.audit import LIMITS, Audit
from ..analysis.findings import Duplicate
from ..analysis.measures import ORACLE, effective_experts, heaviest
from ..evaluation.comparison.methods import BASE, label_of
from ..evaluation.comparison.tables import ANCHOR, Comparison, in_per_cent
from ..evaluation.evaluate import Evaluation
from ..evaluation.replay import Estimate, Replay
from ..experts.pool import Pool
from ..experts.registry import kinds


def pool_table(pool: Pool) -> Table:
    """A row for each expert: kind, sites, sizes, what it shares, and where it is."""
    table = Table(title=f"{len(pool)} experts for {pool.base.id}")
    for column in ("expert", "kind", "sites", "sizes", "shares", "folder"):
        table.add_column(column, overflow="fold", min_width=len(column))
    for expert in pool.experts:
        shares = [part for part in ("gates", "means", "readings") if expert.has(part)]
        if expert.embeddings is not None:
            shares.append(f"{len(expert.embeddings)} embeddings")
        sizes = sorted({m.size for m in expert.modules.values() if m.size is not None})
        table.add_row(
            expert.name,
            kinds()[expert.kind].label,
            str(len(expert.modules)),
            "-".join(str(size) for size in dict.fromkeys((*sizes[:1], *sizes[-1:]))),
            ", ".join(shares) or "nothing",
            str(expert.place),
        )
    return table


AUDITED = {  # the signs of an audit that its table shows; --json has all
    "update_size": "update",
    "update_effect": "effect",
    "update_spread": "module",
    "gate_size": "gate",
    "gate_own_mean": "cosine",
    "gate_wins": "wins",
    "mean_distance": "means",
    "reading_distance": "readings",
    "reading_trace": "varying",
    "reading_masks": "masking",
    "embedding_copies": "copied",
    "embedding_wins": "nearest",
    "centroid_neutral": "neutral",
}


def audit_table(report: Audit) -> Table:
    """A row for each expert with its signs, then medians and limits."""
    table = Table(title=f"Audit of {len(report.experts)} experts; * is beyond the limit")
    limits = {name: limit.of(len(report.experts)) for name, limit in LIMITS.items()}
    shown = {name: title for name, title in AUDITED.items() if name in report.signs}
    for column in ("expert", *shown.values()):
        first = column == "expert"
        table.add_column(column, no_wrap=first, justify="left" if first else "right")
    for z, expert in enumerate(report.experts):
        cells = [_sign(report.signs[name][z], limits[name]) for name in shown]
        table.add_row(Text(expert), *cells)
    table.add_section()
    medians = [report.median(name) for name in shown]
    table.add_row(Text("median"), *(_sign(median, math.inf) for median in medians))
    table.add_row(Text("limit"), *(_sign(limits[name], math.inf) for name in shown))
    return table


def _sign(value: float | None, limit: float) -> Text:
    if value is None:
        return Text("")
    return Text(f"{value:.3g}*", style="bold red") if value > limit else Text(f"{value:.3g}")


def duplicates_table(pairs: Sequence[Duplicate], threshold: float) -> Table:
    """A row for each pair of experts with a cosine of at least `threshold`."""
    table = Table(title=f"{len(pairs)} pairs with a cosine of {threshold:g} or more")
    for column in ("expert", "expert", "cosine", "files"):
        table.add_column(column, overflow="fold")
    for pair in pairs:
        files = "identical" if pair.identical else "differ"
        table.add_row(pair.one, pair.other, f"{pair.cosine:.4f}", files)
    return table


def scores_table(evaluation: Evaluation, title: str) -> Table:
    """A row for each task, with its interval, then the mean."""
    table = Table(title=title)
    for column in ("task", "metric", "score", "95 % interval", "n", "ties"):
        table.add_column(column, overflow="fold")
    for score in evaluation.scores:
        interval = f"{score.low:.3f} to {score.high:.3f}"
        cells = (score.task, score.metric, f"{score.score:.3f}", interval)
        table.add_row(*cells, str(score.n), str(score.ties))
    table.add_section()
    table.add_row("mean", "", f"{evaluation.mean:.3f}", "", "", "")
    return table


def means_table(comparison: Comparison) -> Table:
    """A row for each method: its mean on each suite, with the interval."""
    columns = [f"{column} ({len(tasks)})" for column, tasks in comparison.columns.items()]
    title = f"mean score in %, [95 % interval]{_star(comparison)}"
    table = _table(title, "method", columns)
    for row, summaries in comparison.summaries.items():
        _add(table, comparison, row, (summary.in_per_cent for summary in summaries.values()))
    return table


def _star(comparison: Comparison) -> str:
    return "; * not zero-shot" if comparison.choices else ""


def differences_table(comparison: Comparison) -> Table | None:
    """Differences to PHATGOOSE in pairs; None without its row, or another."""
    others = [row for row in comparison.results if row != ANCHOR]
    if ANCHOR not in comparison.results or not others:
        return None
    label = comparison.labels[ANCHOR]
    title = f"difference to {label} in points, [95 % interval in pairs]"
    table = _table(title, "method", comparison.columns)
    for row in others:
        summaries = comparison.summaries[row].values()
        _add(table, comparison, row, (summary.difference_in_points for summary in summaries))
    return table


def datasets_table(comparison: Comparison, bold: str = ANCHOR) -> Table:
    """A row per model, a column per dataset: per cent ± half the interval; row `bold` is bold."""
    tasks = comparison.datasets
    columns = [*(task.replace("_", " ") for task in tasks), "mean"]
    title = f"score in %, ± half the 95 % interval{_star(comparison)}"
    table = _table(title, "model", columns)
    first = {name: results for name, results in comparison.results.items() if name == BASE}
    for row, results in {**first, **comparison.experts, **comparison.results}.items():
        scored = [results[task] for task in tasks]
        mean = 100 * sum(r.score for r in scored) / len(scored)
        cells = [f"{100 * r.score:.0f} ±{50 * (r.high - r.low):.0f}" for r in scored]
        _add(table, comparison, row, [*cells, f"{mean:.1f}"], bold)
    return table


def replay_table(found: Replay) -> Table:
    """A row per model or rule: per cent and points, with 95 % intervals over tasks and examples.

    The own expert is the one of the task: the share of its score, and how often it was chosen.
    """
    title = (
        f"{found.base}, {found.wording}: {found.tasks} tasks, {found.examples} examples; * chosen "
        f"by these marks"
    )
    is_own = found.wording != "unseen"
    has_random = any(line.over_random for line in found.lines)
    columns = ["score in %", "over base"]
    columns += ["over random"] if has_random else []
    columns += ["% of own", "% right"] if is_own else []
    table = _table(title, "expert", columns)
    for line in found.lines:
        cells = [_estimate(line.score, ".1f"), _estimate(line.gain, "+.1f", ".1f")]
        if has_random:
            cells.append(_estimate(line.over_random, "+.1f", ".1f"))
        if is_own:
            cells.append(_estimate(line.kept, ".0f"))
            cells.append("" if line.own is None else f"{100 * line.own:.0f}")
        table.add_row(Text(line.name), *cells)
    return table


def _estimate(found: Estimate | None, form: str, ends: str = ".0f") -> str:
    return "" if found is None else in_per_cent(found.value, found.low, found.high, form, ends)


def _table(title: str, first: str, columns: Iterable[str]) -> Table:
    table = Table(title=title)
    table.add_column(first, no_wrap=True)
    for column in columns:
        table.add_column(Text(column), justify="right", overflow="fold")
    return table


def _add(
    table: Table, comparison: Comparison, row: str, cells: Iterable[str], bold: str = ANCHOR
) -> None:
    style = "bold" if row == bold else ""
    table.add_row(Text(comparison.title(row)), *map(Text, cells), style=style)


def routers_table(analysis: Analysis) -> Table:
    """A row for each router and dataset: score, effective experts, and those most used."""
    table = Table(title=f"Routing of {len(analysis.experts)} experts")
    for column in ("router", "dataset", "score", "effective", "most used"):
        table.add_column(column, overflow="fold")
    if analysis.oracle:
        table.add_column("Oracle's", overflow="fold")
        table.add_column("KL to Oracle")
    for name, router in analysis.routers.items():
        for dataset in analysis.datasets:
            weight = router.distributions[dataset].whole("weight")
            score = router.scores.get(dataset)
            cells = [
                label_of(name),
                dataset,
                f"{100 * score.score:.1f} %" if score else "",
                f"{effective_experts(weight):.1f}",
                ", ".join(
                    f"{analysis.experts[z]} {100 * weight[z]:.0f} %" for z in heaviest(weight, 2)
                ),
            ]
            if analysis.oracle:
                divergence = analysis.divergence(name, ORACLE, dataset).to
                cells += [analysis.oracle[dataset], f"{divergence:.2f}"]
            table.add_row(*map(Text, cells))
    return table
