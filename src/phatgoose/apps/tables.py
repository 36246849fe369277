"""Tables of pools, scores, comparisons and analyses for the terminal."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rich import table as rich
from rich.text import Text

from ..analysis.analyse import Analysis
from ..analysis.audit import SIGNS, Audit
from ..analysis.measures import ORACLE, effective_experts, heaviest
from ..evaluation.compare import label_of
from ..evaluation.evaluate import Evaluation
from ..evaluation.replay import Replay
from ..evaluation.tables import Table
from ..experts import kinds
from ..experts.pool import Pool
from ..files import one_line
from ..routing.choice import BASE_ALONE, Chosen

CELL = 60  # characters of a prompt


def drawn(table: Table) -> rich.Table:
    """`table` for a terminal; columns of numbers stand to the right."""
    result = rich.Table(title=Text(table.title))
    for column, title in enumerate(table.head):
        cells = [row[column] for row in table.rows if row[column]]
        numbers = all(cell.lstrip("+-")[:1].isdigit() for cell in cells)
        result.add_column(Text(title), overflow="fold", min_width=min(len(title), 6))
        result.columns[-1].justify = "right" if numbers and column else "left"
    for row in table.rows:
        result.add_row(*map(Text, row), style="bold" if row[0] == table.bold else "")
    return result


def pool_table(pool: Pool) -> rich.Table:
    """A row for each expert: kind, sites, sizes, what it shares, and where it is."""
    rows = []
    for expert in pool.experts:
        shares = [part for part in ("gates", "means", "prompt_statistics") if expert.has(part)]
        if expert.embeddings is not None:
            shares.append(f"{len(expert.embeddings)} embeddings")
        sizes = sorted({m.size for m in expert.modules.values() if m.size is not None})
        size = "-".join(map(str, dict.fromkeys((*sizes[:1], *sizes[-1:]))))
        row = [expert.name, kinds()[expert.kind].label, str(len(expert.modules)), size]
        row += [", ".join(shares) or "nothing", str(expert.place)]
        rows.append(row)
    head = ["expert", "kind", "sites", "sizes", "shares", "folder"]
    return drawn(Table(f"{len(pool)} experts for {pool.base.id}", head, rows))


def choices_table(prompts: Sequence[str], choices: Sequence[Chosen]) -> rich.Table:
    """A row for each prompt: who answers, by how much, before whom, and by which text."""
    rows = []
    for prompt, chosen in zip(prompts, choices, strict=True):
        weights = chosen.weights or BASE_ALONE
        experts = ", ".join(f"{name} {weight:.2f}" for name, weight in weights.items())
        margin = "" if chosen.margin is None else f"{chosen.margin:.2f}"
        view = "" if chosen.view == prompt else one_line(chosen.view, CELL)
        rows.append([one_line(prompt, CELL), experts, margin, chosen.runner_up or "", view])
        for name, nearest in chosen.nearest.items():
            rows += [["", "", "", name, one_line(text, CELL)] for text in nearest]
    head = ["prompt", "expert", "margin", "runner-up", "decided by"]
    return drawn(Table("", head, rows))


def audit_table(report: Audit) -> rich.Table:
    """A row for each expert with its signs, then medians and limits; --json has all signs."""
    shown = [sign for sign in SIGNS if sign.title and sign.name in report.signs]
    limits = {sign.name: sign.limit(len(report.experts)) for sign in shown}

    def cell(value: float | None, limit: float) -> str:
        if value is None:
            return ""
        mark = "*" if value > limit else ""
        return f"{value:.3g}{mark}"

    rows = [
        [expert, *(cell(report.signs[name][z], limit) for name, limit in limits.items())]
        for z, expert in enumerate(report.experts)
    ]
    rows.append(["median", *(cell(report.median(name), math.inf) for name in limits)])
    rows.append(["limit", *(f"{limit:.3g}" for limit in limits.values())])
    title = f"Audit of {len(report.experts)} experts; * is beyond the limit"
    return drawn(Table(title, ["expert", *(sign.title for sign in shown)], rows))


def scores_table(evaluation: Evaluation, title: str) -> rich.Table:
    """A row for each task, with its interval, then the mean."""
    rows = [
        [s.task, s.metric, f"{s.score:.3f}", f"{s.low:.3f} to {s.high:.3f}", str(s.n), str(s.ties)]
        for s in evaluation.scores
    ]
    rows.append(["mean", "", f"{evaluation.mean:.3f}", "", "", ""])
    return drawn(Table(title, ["task", "metric", "score", "95 % interval", "n", "ties"], rows))


def replay_table(replayed: Replay) -> rich.Table:
    """A row per model or rule: per cent and points, with 95 % intervals over tasks and examples.

    The own expert is the one of the task: the share of its score, and how often it was chosen.
    """
    rows = []
    for line in replayed.lines:
        row = [line.name, line.score.in_per_cent, line.gain.in_points, "", "", ""]
        if line.over_random:
            row[3] = line.over_random.in_points
        if line.kept:
            row[4] = line.kept.in_per_cent
        if line.own is not None:
            row[5] = f"{100 * line.own:.0f}"
        rows.append(row)
    title = (
        f"{replayed.base}, {replayed.wording}: {replayed.tasks} tasks, {replayed.examples} "
        f"examples; * chosen by these marks"
    )
    head = ["expert", "score in %", "over base", "over random", "% of own", "% right"]
    return drawn(Table(title, head, rows))


def routers_table(analysis: Analysis) -> rich.Table:
    """A row for each router and dataset: score, effective experts, and those most used."""
    head = ["router", "dataset", "score", "effective", "most used"]
    if analysis.oracle:
        head += ["Oracle's", "KL to Oracle"]
    rows = []
    for name, router in analysis.routers.items():
        for dataset in analysis.datasets:
            weight = router.distributions[dataset].whole("weight")
            used = (f"{analysis.experts[z]} {100 * weight[z]:.0f} %" for z in heaviest(weight, 2))
            score = router.scores.get(dataset)
            percent = f"{100 * score.score:.1f} %" if score else ""
            cells = [label_of(name), dataset, percent, f"{effective_experts(weight):.1f}"]
            cells.append(", ".join(used))
            if analysis.oracle:
                divergence = analysis.divergence(name, ORACLE, dataset).to
                cells += [analysis.oracle[dataset], f"{divergence:.2f}"]
            rows.append(cells)
    return drawn(Table(f"Routing of {len(analysis.experts)} experts", head, rows))
