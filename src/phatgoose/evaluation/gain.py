"""Whether an expert is any good: how much more it scores than its base alone, on solved rows."""

from __future__ import annotations

from dataclasses import replace

from ..base.identity import Base, twin
from ..config import ScoringSettings
from ..errors import TaskError
from ..experts.expert import Expert, Gain, recorded_formatting
from ..experts.pool import Pool
from ..routing.compose import compose
from ..tasks.encoding import Encoder
from ..tasks.task import Example, Task
from .evaluate import EvaluationSet, Questions, score
from .metrics import SharedMeans

FEWEST_ROWS = 20
MOST_ROWS = 100
CONFIDENCE = 0.8  # with 95 %, thirty rows would call too many good experts unsure (docs/pools.md)


def solved_rows(expert: Expert, task: Task) -> tuple[Example, ...]:
    """The rows of `task` to score on: the test split, else validation, else all of them.

    Of the file that the expert was trained on they are those that were set apart. At most MOST_ROWS
    are drawn, by the seed that the expert records. Raises TaskError where there is none.
    """
    if expert.info.task.get("source") == task.source:
        task = task.with_validation(expert.seed)
    return task.evaluation_examples(MOST_ROWS, expert.seed)


def gain_over_base(expert: Expert, base: Base, task: Task) -> Gain:
    """How much more `expert` scores than its `base` on the `solved_rows` of `task`, in pairs.

    They are scored by the task's metrics, and read as the expert records. Raises TaskError for
    fewer than FEWEST_ROWS, and what `evaluate` and `compose` do.
    """
    rows = solved_rows(expert, task)
    if len(rows) < FEWEST_ROWS:
        raise TaskError(
            f"Task {task.name!r} has {len(rows)} rows that expert {expert.name!r} wasn't trained "
            f"on; a gain over the base takes at least {FEWEST_ROWS}, better 30."
        )
    where = f"Expert {expert.name!r}, hyperparameters"
    formatting = recorded_formatting(expert.info.hyperparameters, where)
    solved = EvaluationSet.of(replace(task, test=rows), ScoringSettings(formatting))
    questions = Questions(solved, Encoder.of(base, formatting))
    questions.cuts.report(task.name)
    alone = compose(Pool((expert,)), twin(base), router="single")
    by_base = score(base.model, questions)
    by_expert = score(alone, questions)
    means = SharedMeans.of({"base": [by_base.sample], "expert": [by_expert.sample]})
    gain = means.gain("expert", "base", CONFIDENCE)
    return Gain(gain.value, gain.low, gain.high, by_base.n, by_base.metric)
