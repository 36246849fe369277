"""An analysis in short, for the terminal."""

from __future__ import annotations

import numpy as np
from rich.table import Table
from rich.text import Text

from ...analysis.measures import effective_experts
from ...analysis.result import ORACLE, Analysis
from ...evaluation.comparison.methods import METHODS

__all__ = ["routers_table"]


def routers_table(analysis: Analysis) -> Table:
    """A row per router and dataset: score, effective number of experts, who they are, KL."""
    table = Table(title=f"Routing of {len(analysis.experts)} experts")
    for column in ("router", "dataset", "score", "effective", "most used"):
        table.add_column(column, overflow="fold")
    if analysis.oracle:
        table.add_column("Oracle's", overflow="fold")
        table.add_column("KL to Oracle")
    for name, router in analysis.routers.items():
        for dataset in analysis.datasets:
            profile = router.profiles[dataset]
            weight = profile.whole("weight")
            score = router.scores.get(dataset)
            best = [z for z in np.argsort(-weight, kind="stable")[:2] if weight[z] > 0]
            cells = [
                METHODS.get(name, name),
                dataset,
                f"{100 * score.score:.1f} %" if score else "",
                f"{effective_experts(weight):.1f}",
                ", ".join(f"{analysis.experts[z]} {100 * weight[z]:.0f} %" for z in best),
            ]
            if analysis.oracle:
                divergence = analysis.divergence(name, ORACLE, dataset).to
                cells += [analysis.oracle[dataset], f"{divergence:.2f}"]
            table.add_row(*map(Text, cells))
    return table
