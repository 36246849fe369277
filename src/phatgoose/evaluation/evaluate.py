"""Zero-shot evaluation: rank classification where there are choices, generation elsewhere.

METHOD section 6, Scoring. Every score comes with its n and a 95 % interval.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from scipy.stats import binomtest
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..base.loading import Base, load_tokenizer
from ..base.sites import ROUTED
from ..config import Formatting
from ..errors import EvaluationError
from ..experts.input_format import warn_of_other_formatting
from ..files.atomic import write_text
from ..routing.compose import serving
from ..tasks.cuts import Cuts
from ..tasks.encoding import Encoder
from ..tasks.task import Example, Task
from .answers import (
    Answer,
    Questions,
    generated_answers,
    questions_to_answer,
    questions_to_rank,
    ranked_answers,
)
from .intervals import CONFIDENCE, Interval, Sample
from .metrics import METRICS, metric

__all__ = [
    "Evaluation",
    "Prediction",
    "TaskScore",
    "evaluate",
    "metrics_of",
    "questions_of",
    "score",
]

TOKEN_BUDGET = 4096
MAX_NEW_TOKENS = 64
CHOSEN = "accuracy"  # the metric of rank classification
WRITTEN = "exact-match"  # the metric of generated answers where a task names none


@dataclass(frozen=True)
class Prediction:
    """What the model answered to one example.

    `correct` tells whether the answer is one of the accepted ones as it stands, whatever the
    metrics. `scores` holds the mean log-likelihood per target token of each choice, in order; empty
    for generated answers. `marks` are the answer's statistics in each of the task's metrics.
    """

    answer: str
    correct: bool
    scores: tuple[float, ...] = ()
    marks: tuple[tuple[float, ...], ...] = ()


@dataclass(frozen=True)
class TaskScore:
    """One task's score, from 0 to 1: the mean over its metrics, with its 95 % interval.

    `metric` names them in words, `by_metric` has the score in each. The interval is Wilson's where
    the score is a share of right answers, else a bootstrap over examples. `ties` counts the
    examples whose best choices scored equally; the first of them was taken. `cuts` says how many
    inputs were cut, and by how much.
    """

    task: str
    metric: str
    score: float
    n: int
    low: float
    high: float
    ties: int
    by_metric: Mapping[str, float] = field(default_factory=dict)
    cuts: Cuts = field(default_factory=Cuts)
    predictions: tuple[Prediction, ...] = ()


@dataclass(frozen=True)
class Evaluation:
    """The scores of one model on several tasks."""

    scores: tuple[TaskScore, ...]

    @property
    def mean(self) -> float:
        """The unweighted mean over tasks (METHOD section 6)."""
        return sum(score.score for score in self.scores) / len(self.scores)

    def to_dict(self, *, predictions: bool = False) -> dict[str, Any]:
        """Plain data for JSON: the mean and one record per task."""
        rows = [asdict(score) for score in self.scores]
        for row in rows if not predictions else ():
            del row["predictions"]
        return {"mean": self.mean, "confidence": CONFIDENCE, "tasks": rows}

    def write_json(self, path: str | Path, *, predictions: bool = False) -> None:
        """Write `to_dict` to `path`, complete or not at all. Raises EvaluationError if it can't."""
        content = json.dumps(self.to_dict(predictions=predictions), indent=2, ensure_ascii=False)
        write_text(Path(path), content + "\n", EvaluationError)


def evaluate(
    model: PreTrainedModel | Base,
    tasks: Task | Iterable[Task],
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    limit: int | None = None,
    seed: int = 0,
    formatting: Formatting | None = None,
    max_new_tokens: int = MAX_NEW_TOKENS,
    token_budget: int = TOKEN_BUDGET,
) -> Evaluation:
    """The scores of `model`, routed or not, on `tasks`.

    A task is scored by its `metrics`; one that names none by rank classification where its examples
    have choices (the choice of the highest mean log-likelihood per target token, end-of-sequence
    included, is the answer) and by exact match elsewhere, white space around both left out. Answers
    that are not chosen are generated greedily, at most the task's `max_new_tokens` or else the ones
    given here. `limit` draws so many examples per task, the same ones for one `seed`. `tokenizer`
    None takes that of the routed model or its base. `token_budget` bounds a batch.

    Inputs are formatted by `formatting`, None being the default. What is cut of a task's inputs is
    logged, and a warning from a tenth of them on; a routed model whose experts were trained on
    inputs of another form is a warning too.

    Raises EvaluationError for a task that mixes examples with and without choices, an unknown
    metric or a combination that no answer can serve, a score that is not a number, or a missing
    tokenizer; TaskError for an empty task.
    """
    if isinstance(model, Base):
        model, tokenizer = model.model, tokenizer or model.tokenizer
    encoder = Encoder.for_model(model, tokenizer or _tokenizer_of(model), formatting)
    parts = getattr(model, ROUTED, None)
    warn_of_other_formatting(parts.records if parts is not None else (), encoder.formatting)
    scores = []
    for task in [tasks] if isinstance(tasks, Task) else tasks:
        examples = task.evaluation_examples(limit, seed)
        longest = task.max_new_tokens or max_new_tokens
        questions = questions_of(task, examples, encoder, longest)
        questions.cuts.tell(task.name)
        scores.append(score(model, task, examples, questions, encoder, longest, token_budget))
    if not scores:
        raise EvaluationError("No task was given to evaluate on.")
    return Evaluation(tuple(scores))


def questions_of(
    task: Task, examples: Sequence[Example], encoder: Encoder, max_new_tokens: int
) -> Questions:
    """The `examples` of `task` as tokens, in the form that its metrics need."""
    if metrics_of(task, examples) == (CHOSEN,):
        return questions_to_rank(encoder, examples)
    return questions_to_answer(encoder, examples, max_new_tokens)


def score(
    model: PreTrainedModel,
    task: Task,
    examples: Sequence[Example],
    questions: Questions,
    encoder: Encoder,
    max_new_tokens: int,
    token_budget: int,
) -> TaskScore:
    """The score of `model` on the `examples` of `task`, which are `questions` to it."""
    model.eval()
    metrics = metrics_of(task, examples)
    with serving(model, task.name, examples, encoder.formatting) as before_pass:
        shared = (questions, encoder, token_budget, task.name, before_pass)
        if metrics == (CHOSEN,):
            answers = ranked_answers(model, examples, *shared)
        else:
            answers = generated_answers(model, *shared, max_new_tokens)
    return replace(_task_score(task.name, metrics, examples, answers), cuts=questions.cuts)


def metrics_of(task: Task, examples: Sequence[Example]) -> tuple[str, ...]:
    """The metrics that `task` is scored by on `examples`: its own, or those fitting its examples.

    Raises EvaluationError for an unknown one, for rank classification without choices or beside a
    metric of generated answers, and for a task without metrics that has both kinds of examples.
    """
    with_choices = {bool(example.choices) for example in examples}
    if not task.metrics and len(with_choices) > 1:
        raise EvaluationError(f"Task {task.name!r} has examples with and without choices.")
    names = task.metrics or ((CHOSEN,) if True in with_choices else (WRITTEN,))
    for name in names:
        metric(name)
    if CHOSEN in names and len(names) > 1:
        raise EvaluationError(
            f"Task {task.name!r} is scored by {' and '.join(names)}, but an answer is either "
            f"chosen ({CHOSEN}) or generated (the other metrics)."
        )
    if CHOSEN in names and False in with_choices:
        raise EvaluationError(f"Task {task.name!r}: {CHOSEN} needs choices in every example.")
    return tuple(names)


def _tokenizer_of(model: PreTrainedModel) -> PreTrainedTokenizerBase:
    parts = getattr(model, ROUTED, None)
    if parts is not None and parts.tokenizer is not None:
        tokenizer: PreTrainedTokenizerBase = parts.tokenizer
        return tokenizer
    name = parts.base.id if parts is not None else model.name_or_path
    if not name:
        raise EvaluationError("The model doesn't say where it came from; pass its tokenizer.")
    return load_tokenizer(name)


def _task_score(
    task: str, metrics: Sequence[str], examples: Sequence[Example], answers: Sequence[Answer]
) -> TaskScore:
    predictions = [
        Prediction(
            answer.text,
            answer.text in [accepted.strip() for accepted in example.answers]
            if not answer.scores
            else answer.text in example.answers,
            answer.scores,
            tuple(METRICS[name].measure(answer.text, example.answers) for name in metrics),
        )
        for example, answer in zip(examples, answers, strict=True)
    ]
    sample = Sample.of(metrics, [prediction.marks for prediction in predictions])
    interval = _interval(sample)
    return TaskScore(
        task=task,
        metric=" + ".join(METRICS[name].label for name in metrics),
        score=sample.score,
        n=sample.n,
        low=interval.low,
        high=interval.high,
        ties=sum(p.scores.count(max(p.scores)) > 1 for p in predictions if p.scores),
        by_metric=sample.by_metric,
        predictions=tuple(predictions),
    )


def _interval(sample: Sample) -> Interval:
    """Wilson's interval of a share of right answers, else a bootstrap."""
    marks = sample.statistics[0]
    if len(sample.metrics) > 1 or marks.shape[1] > 1 or not ((marks == 0) | (marks == 1)).all():
        return sample.interval()
    wilson = binomtest(int(marks.sum()), sample.n).proportion_ci(CONFIDENCE, method="wilson")
    return Interval(float(wilson.low), float(wilson.high))
