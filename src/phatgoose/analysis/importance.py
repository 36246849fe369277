"""Which experts matter: how much the score falls without each of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from ..evaluation.evaluate import Evaluation
from ..evaluation.intervals import Interval, Sample, dataset_replicates, interval_of

__all__ = ["Effect", "leave_one_out"]


@dataclass(frozen=True)
class Effect:
    """What an expert adds: the mean score with all experts less the mean score without this one.

    `by_task` has the difference on each task. The interval of the mean resamples tasks and, within
    them, examples, the same ones for both models.
    """

    expert: str
    mean: float
    interval: Interval
    by_task: Mapping[str, float]


def leave_one_out(
    everyone: Evaluation, experts: Iterable[str], without: Callable[[str], Evaluation]
) -> list[Effect]:
    """The effect of each of `experts`, greatest first.

    `without(expert)` evaluates the model without it on the tasks and examples of `everyone`.
    """
    effects = []
    for expert in experts:
        reduced = without(expert)
        samples = {"all": _samples(everyone), "less": _samples(reduced)}
        replicates = dataset_replicates(samples)
        effects.append(
            Effect(
                expert,
                everyone.mean - reduced.mean,
                interval_of(replicates["all"] - replicates["less"]),
                {
                    one.task: one.score - other.score
                    for one, other in zip(everyone.scores, reduced.scores, strict=True)
                },
            )
        )
    return sorted(effects, key=lambda effect: effect.mean, reverse=True)


def _samples(evaluation: Evaluation) -> list[Sample]:
    return [
        Sample.of(tuple(score.by_metric), [prediction.marks for prediction in score.predictions])
        for score in evaluation.scores
    ]
