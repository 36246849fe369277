"""How far a routed model's mean is above the base's and each single expert's."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from ...errors import EvaluationError
from ...evaluation.comparison.methods import BASE
from ...evaluation.comparison.tables import Comparison
from ...evaluation.intervals import Interval, dataset_replicates, interval_of
from ...files.atomic import write_text

__all__ = ["Gain", "gains_of", "lifts_of", "write_gains"]


@dataclass(frozen=True)
class Gain:
    """The difference of two means over the datasets, in points, with its 95 % interval in pairs."""

    over: str
    difference: float
    interval: Interval

    @property
    def in_words(self) -> str:
        """Such as "+31.2 [+18.0, +44.1] over triage"."""
        low, high = self.interval.low, self.interval.high
        return f"{self.difference:+.1f} [{low:+.1f}, {high:+.1f}] over {self.over}"


def gains_of(comparison: Comparison, row: str) -> list[Gain]:
    """The gains of `row` over the base and over each single expert, the smallest first.

    Intervals resample the datasets and, within them, examples, for both models alike.
    """
    models = {BASE: comparison.results[BASE], **comparison.experts}
    found = {**models, row: comparison.results[row]}
    tasks = comparison.datasets
    samples = {name: [results[task].sample for task in tasks] for name, results in found.items()}
    means = {
        name: sum(sample.score for sample in parts) / len(parts) for name, parts in samples.items()
    }
    drawn = dataset_replicates(samples)
    gains = []
    for name in models:
        between = interval_of(100 * (drawn[row] - drawn[name]))
        gains.append(Gain(name, 100 * (means[row] - means[name]), between))
    return sorted(gains, key=lambda gain: gain.difference)


def lifts_of(comparison: Comparison, skills: dict[str, str]) -> dict[str, float]:
    """For each expert of `skills`, how many points it is above the base on its unseen task."""
    base = comparison.results[BASE]
    return {
        name: 100 * (comparison.experts[name][task].score - base[task].score)
        for name, task in skills.items()
    }


def write_gains(
    path: Path, row: str, gains: list[Gain], lifts: dict[str, float], written: dict[str, float]
) -> None:
    """Write the gains of `row`, each expert's lift and what `row` scores in writing, as JSON."""
    found = [asdict(gain) for gain in gains]
    content = {"router": row, "lifts": lifts, "gains": found, "written": written}
    write_text(path, json.dumps(content, indent=2) + "\n", EvaluationError)
