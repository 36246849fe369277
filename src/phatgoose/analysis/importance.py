"""Which experts matter: how much the score falls without each of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from ..evaluation.evaluate import Evaluation
from ..evaluation.intervals import Interval, dataset_replicates, interval_of

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
        both = {"all": everyone.scores, "less": reduced.scores}
        replicates = dataset_replicates(
            {name: [score.sample for score in scores] for name, scores in both.items()}
        )
        by_task = {
            one.task: one.score - other.score
            for one, other in zip(everyone.scores, reduced.scores, strict=True)
        }
        interval = interval_of(replicates["all"] - replicates["less"])
        effects.append(Effect(expert, everyone.mean - reduced.mean, interval, by_task))
    return sorted(effects, key=lambda effect: effect.mean, reverse=True)
