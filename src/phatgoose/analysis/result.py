"""What an analysis found, and its form in JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import EvaluationError
from ..evaluation.evaluate import TaskScore
from ..files.atomic import write_text
from .agreement import Agreement
from .findings import Finding
from .importance import Effect
from .kl_to_oracle import (
    ORACLE,
    SMOOTHING,
    Correlation,
    Divergence,
    correlation,
    oracle_distribution,
)
from .measures import concentration, effective_experts, entropy, load, overlap
from .routing_distribution import PARTS, Measure, RoutingDistribution
from .traces import Trace

__all__ = ["Analysis", "RouterAnalysis"]


@dataclass(frozen=True)
class RouterAnalysis:
    """One router's distribution on each dataset, its scores (empty if not scored) and findings.

    `traces` are texts of the datasets, token by token; `similarity` [E, E] is that of
    `findings.vector_similarity`.
    """

    distributions: Mapping[str, RoutingDistribution]
    scores: Mapping[str, TaskScore] = field(default_factory=dict)
    findings: tuple[Finding, ...] = ()
    traces: Mapping[str, Sequence[Trace]] = field(default_factory=dict)
    similarity: NDArray[Any] | None = None

    def by_dataset(self, measure: Measure = "weight") -> dict[str, NDArray[np.float64]]:
        """The whole-model distribution on each dataset, [E]."""
        return {name: found.whole(measure) for name, found in self.distributions.items()}

    def mean(self, measure: Measure = "weight") -> NDArray[np.float64]:
        """Its unweighted mean over datasets, [E]."""
        return np.asarray(np.mean(list(self.by_dataset(measure).values()), axis=0))


@dataclass(frozen=True)
class Analysis:
    """What `analyse` returns.

    `oracle` is the best single expert of each dataset, empty without scores of single experts.
    `agreements` are by pairs of routers. `effects` are those of leaving each expert out under the
    first router, empty unless asked for. KL divergences are of whole-model distributions before
    top-k, smoothed by `smoothing`.
    """

    experts: tuple[str, ...]
    datasets: tuple[str, ...]
    routers: Mapping[str, RouterAnalysis]
    oracle: Mapping[str, str] = field(default_factory=dict)
    agreements: Mapping[tuple[str, str], Agreement] = field(default_factory=dict)
    effects: tuple[Effect, ...] = ()
    smoothing: float = SMOOTHING
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        """Its routers, and how many experts and datasets."""
        sizes = f"experts: {len(self.experts)}, datasets: {len(self.datasets)}"
        return f"<Analysis of {', '.join(self.routers)} ({sizes})>"

    def distribution(self, router: str, dataset: str) -> NDArray[np.float64]:
        """A router's whole-model distribution on a dataset, [E]; for ORACLE its one expert."""
        if router == ORACLE and ORACLE not in self.routers:
            return oracle_distribution(self.oracle[dataset], self.experts)
        return self.routers[router].distributions[dataset].whole("probability")

    def divergence(self, router: str, other: str, dataset: str) -> Divergence:
        """The KL divergences between two routers, or a router and ORACLE, on a dataset."""
        p, q = self.distribution(router, dataset), self.distribution(other, dataset)
        return Divergence.between(p, q, self.smoothing)

    def correlation(self, router: str, other: str = ORACLE) -> Correlation | None:
        """That of KL(router‖other) with the router's score over datasets (paper section 4.4).

        None when the router was not scored, or no Oracle is known.
        """
        scores = self.routers[router].scores
        if not scores or (other == ORACLE and not self.oracle):
            return None
        pairs = [
            (self.divergence(router, other, dataset).to, scores[dataset].score)
            for dataset in self.datasets
        ]
        return correlation(*zip(*pairs, strict=True))

    def overlaps(self, router: str) -> NDArray[np.float64]:
        """Overlap of a router's distributions on every two datasets, by weight, [D, D]."""
        whole = self.routers[router].by_dataset().values()
        return np.array([[overlap(p, q) for q in whole] for p in whole])

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON: all numbers, no text of the data."""
        pairs = [(a, b) for a in self.routers for b in self._others(a)]
        return {
            "format": "phatgoose-analysis-1",
            "settings": dict(self.settings),
            "smoothing": self.smoothing,
            "experts": list(self.experts),
            "datasets": list(self.datasets),
            "oracle": dict(self.oracle),
            "routers": {name: self._router(name) for name in self.routers},
            "divergences": [
                {"router": a, "other": b, "dataset": d, **asdict(self.divergence(a, b, d))}
                for a, b in pairs
                for d in self.datasets
            ],
            "correlations": [
                {"router": a, "other": b, **asdict(found)}
                for a, b in pairs
                if (found := self.correlation(a, b)) is not None
            ],
            "agreements": [
                {"routers": list(pair), **asdict(found)} for pair, found in self.agreements.items()
            ],
            "leave_one_out": [asdict(effect) for effect in self.effects],
        }

    def write_json(self, path: str | Path) -> None:
        """Write `to_dict` to `path`, all or nothing. Raises EvaluationError if that fails."""
        content = json.dumps(self.to_dict(), ensure_ascii=False) + "\n"
        write_text(Path(path), content, EvaluationError)

    def _others(self, router: str) -> list[str]:
        oracle = [ORACLE] if self.oracle and ORACLE not in self.routers else []
        return [name for name in [*self.routers, *oracle] if name != router]

    def _router(self, name: str) -> dict[str, Any]:
        router = self.routers[name]
        scores = {
            task: {"metric": s.metric, "score": s.score, "low": s.low, "high": s.high, "n": s.n}
            for task, s in router.scores.items()
        }
        return {
            "scores": scores,
            "datasets": {task: _numbers(found) for task, found in router.distributions.items()},
            "overlaps": self.overlaps(name).tolist(),
            "findings": [asdict(finding) for finding in router.findings],
            "similarity": None if router.similarity is None else router.similarity.tolist(),
        }


def _numbers(found: RoutingDistribution) -> dict[str, Any]:
    """The measures of a distribution, and its mean weights and probabilities by site."""
    whole = found.whole("weight")
    numbers: dict[str, Any] = {
        "tokens": {part: found.passed(part) for part in PARTS},
        "token_entropy": found.token_entropy(),
        "probability": found.whole("probability").tolist(),
        "weight": whole.tolist(),
        "chosen": found.whole("chosen").tolist(),
        "first": found.whole("first").tolist(),
        "by_part": {part: found.whole("weight", part).tolist() for part in PARTS},
        "by_layer": {name: rows.tolist() for name, rows in found.by_layer().items()},
        "by_kind": {name: rows.tolist() for name, rows in found.by_kind().items()},
        "by_site": {
            measure: {name: rows.tolist() for name, rows in found.by_site(measure).items()}
            for measure in ("probability", "weight")
        },
    }
    if whole.any():
        groups = {"layer": found.by_layer(), "kind": found.by_kind()}
        numbers |= {
            "load": load(whole).tolist(),
            "effective_experts_by": {
                group: {name: effective_experts(row) for name, row in rows.items() if row.any()}
                for group, rows in groups.items()
            },
            "entropy": entropy(whole),
            "effective_experts": effective_experts(whole),
            "concentration": concentration(whole),
        }
    return numbers
