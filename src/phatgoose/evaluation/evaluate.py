"""Zero-shot evaluation: rank classification if there are choices, generation elsewhere.

As in the paper's released code. Every score comes with its n and a 95 % interval.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..base import Base, load_tokenizer
from ..config import Formatting, ScoringSettings
from ..errors import EvaluationError
from ..experts.expert import warn_of_other_formatting
from ..files import one_line
from ..routing.compose import composition_if_any, routing_for
from ..tasks.batching import batches_of_tokens, continued, pad_left, pad_right
from ..tasks.encoding import Cuts, Encoder, Fitted, as_read
from ..tasks.loading import given_tasks
from ..tasks.task import Example, Task
from .likelihood import BeforePass, ChoicePrompt, choice_log_likelihoods
from .metrics import CONFIDENCE, METRICS, Estimate, Sample, metric, wilson

CHOSEN = "accuracy"  # the metric of rank classification
WRITTEN = "exact-match"  # the metric of generated answers where a task names none


# The index of an example, the model's answer to it, and the mean log-likelihood per token of each
# choice, if there are any.
Answer = tuple[int, str, tuple[float, ...]]


# Scores of a task's examples, and of several tasks.


@dataclass(frozen=True)
class EvaluationSet:
    """The examples of one task that are scored, and how."""

    name: str
    examples: tuple[Example, ...]
    metrics: tuple[str, ...]
    max_new_tokens: int
    formatting: Formatting
    token_budget: int

    @classmethod
    def of(cls, task: Task, settings: ScoringSettings) -> EvaluationSet:
        examples = task.evaluation_examples(settings.limit, settings.seed)
        longest = task.max_new_tokens or settings.max_new_tokens
        metrics = metrics_of(task, examples)
        form, budget = settings.formatting, settings.token_budget
        return cls(task.name, examples, metrics, longest, form, budget)

    @property
    def is_ranked(self) -> bool:
        return self.metrics == (CHOSEN,)

    @cached_property
    def digest(self) -> str:
        """A hash of everything here that a model's score depends on."""
        content = [
            [example.content for example in self.examples],
            self.metrics,
            None if self.is_ranked else self.max_new_tokens,
            asdict(self.formatting),
            # It decides what is batched together, and so how sums are rounded.
            self.token_budget,
        ]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()


class Questions:
    """The tokens of a set's examples for one base: `rows` of a prompt with its answer choices."""

    def __init__(self, chosen: EvaluationSet, encoder: Encoder) -> None:
        self.chosen, self.encoder = chosen, encoder
        prompts, targets = [], list[Fitted]()
        self.rows: list[ChoicePrompt] = []
        for row in chosen.examples:
            choices = row.choices if chosen.is_ranked else ()
            each = [encoder.target(row.input, choice) for choice in choices]
            longest = max((len(target.tokens) for target in each), default=chosen.max_new_tokens)
            prompts.append(encoder.fitted(row.input, followed_by=longest))
            self.rows.append((prompts[-1].tokens, [target.tokens for target in each]))
            targets += each
        self.cuts = Cuts([each.cut for each in prompts], [each.cut for each in targets])

    @property
    def prompts(self) -> list[list[int]]:
        return [list(prompt) for prompt, _ in self.rows]

    def answers(self, model: PreTrainedModel, before_pass: BeforePass) -> Iterator[Answer]:
        """The model's answer to each question, in any order.

        The choice of the highest mean log-likelihood per target token, the first of equals, or
        greedily generated text.
        """
        pad, budget = self.encoder.tokenizer.pad_token_id, self.chosen.token_budget
        if not self.chosen.is_ranked:
            yield from self._generated(model, before_pass)
            return
        for index, scores in choice_log_likelihoods(model, self.rows, pad, budget, before_pass):
            best = scores.index(max(scores))
            yield index, self.chosen.examples[index].choices[best], tuple(scores)

    def _generated(self, model: PreTrainedModel, before_pass: BeforePass) -> Iterator[Answer]:
        tokenizer, device = self.encoder.tokenizer, model.device
        longest, seq2seq = self.chosen.max_new_tokens, self.encoder.is_encoder_decoder
        pad, lengths = pad_right if seq2seq else pad_left, [len(p) + longest for p, _ in self.rows]
        for batch in batches_of_tokens(lengths, self.chosen.token_budget):
            rows = [self.rows[i][0] for i in batch]
            ids, mask = pad(rows, tokenizer.pad_token_id), pad([[1] * len(row) for row in rows], 0)
            before_pass(batch)
            with torch.inference_mode():
                output = continued(model, tokenizer, ids.to(device), mask.to(device), longest)
            for index, tokens in zip(batch, output, strict=True):
                text = tokenizer.decode(tokens, skip_special_tokens=True)
                yield index, text.strip(), ()


@dataclass(frozen=True)
class Prediction:
    """What the model answered to one example.

    `correct` is True if the answer equals an accepted one, whatever the metrics. `marks` are its
    statistics in each of the task's metrics.
    """

    answer: str
    correct: bool
    scores: tuple[float, ...] = ()
    marks: tuple[tuple[float, ...], ...] = ()

    @property
    def tied(self) -> bool:
        return bool(self.scores) and self.scores.count(max(self.scores)) > 1


@dataclass(frozen=True)
class TaskScore:
    """One model's score on one task, from 0 to 1: the mean over its metrics, with an interval.

    The interval is Wilson's if the score is a share of right answers, else a bootstrap over
    examples.

    Attributes:
        task: The task's name.
        metric: Its metrics, in words.
        low: The lower end of the interval.
        high: The upper end.
        sample: The examples' statistics.
        ties: How many examples have best choices that scored equally; the first was taken.
        seconds: How long scoring took.
        cuts: What was cut of the inputs, as in an expert's metrics.
        predictions: The answer to each example; none of those that were stored.
    """

    task: str
    metric: str
    low: float
    high: float
    sample: Sample = field(compare=False, repr=False)
    ties: int = 0
    seconds: float = field(default=0.0, compare=False)
    cuts: Mapping[str, int] = field(default_factory=dict, repr=False)
    predictions: tuple[Prediction, ...] = field(default=(), repr=False)

    @property
    def score(self) -> float:
        """The mean over the metrics."""
        return self.sample.score

    @property
    def n(self) -> int:
        """How many examples were scored."""
        return self.sample.n

    @property
    def by_metric(self) -> dict[str, float]:
        """The mean of each metric by its name."""
        return self.sample.by_metric

    def to_dict(self, *, predictions: bool = False) -> dict[str, Any]:
        """Plain data for JSON; the answers only if `predictions`."""
        names = ("task", "metric", "score", "n", "low", "high", "ties", "by_metric", "cuts")
        plain = {name: getattr(self, name) for name in names}
        plain["seconds"] = round(self.seconds, 2)
        return plain | ({"predictions": list(map(asdict, self.predictions))} if predictions else {})


@dataclass(frozen=True)
class Evaluation:
    """The scores of one model on several tasks.

    `router` is the name of the one that chose its experts, None for a base without any.
    """

    scores: tuple[TaskScore, ...]
    router: str | None = None

    @property
    def mean(self) -> float:
        """The unweighted mean over tasks."""
        return sum(score.score for score in self.scores) / len(self.scores)

    def to_dict(self, *, predictions: bool = False) -> dict[str, Any]:
        """Plain data for JSON; the answers only if `predictions`."""
        tasks = [score.to_dict(predictions=predictions) for score in self.scores]
        whole = {"mean": self.mean, "confidence": CONFIDENCE, "router": self.router}
        return {**whole, "tasks": tasks}


def evaluate(
    model: PreTrainedModel | Base,
    tasks: Task | str | Path | Iterable[Task | str | Path],
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    **settings: Any,
) -> Evaluation:
    """The scores of `model`, routed or not, on `tasks`.

    A task is scored by its `metrics`. If it names none, its examples' choices are ranked by the
    highest mean log-likelihood per target token, end-of-sequence included. Without choices it is
    scored by exact match, without white space around the answers. Answers that are not chosen are
    generated greedily. Cut inputs are logged, and a warning from a tenth of them on. Another
    warning says if the experts of a routed model were trained on inputs of another form.

    Args:
        model: Any transformers model, or a loaded `Base`.
        tasks: Tasks, files, or `hub:DATASET`; one or several.
        tokenizer: None takes that of the routed model or its base.
        settings: Those of `ScoringSettings`, such as `limit`.

    Raises:
        EvaluationError: A task mixes examples with and without choices, a metric is unknown, or a
            score is not a number.
        TaskError: A task is empty, or can't be read (`load_task`).
    """
    scoring = ScoringSettings(**settings)
    if isinstance(model, Base):
        model, tokenizer = model.model, tokenizer or model.tokenizer
    encoder = Encoder.for_model(model, tokenizer or tokenizer_of(model), scoring.formatting)
    parts, scores = composition_if_any(model), []
    sets = [EvaluationSet.of(task, scoring) for task in given_tasks(tasks)]  # refuses first
    examples = [example for each in sets for example in each.examples]
    read = as_read(scoring.formatting, examples)
    warn_of_other_formatting(parts.records if parts else (), read)
    for chosen in sets:
        questions = Questions(chosen, encoder)
        questions.cuts.report(chosen.name)
        scores.append(score(model, questions))
    return Evaluation(tuple(scores), parts.routing.router if parts else None)


def score(model: PreTrainedModel, questions: Questions) -> TaskScore:
    """The score of `model`, put into evaluation mode, on `questions`.

    Raises EvaluationError for a log-likelihood that is not a number.
    """
    begun, chosen = time.monotonic(), questions.chosen
    name, count = chosen.name, len(chosen.examples)
    model.eval()
    answers: dict[int, Prediction] = {}
    bar = tqdm(total=count, desc=one_line(name), unit="example", disable=None, leave=False)
    about: Any = {"task": name, "examples": chosen.examples, "encoder": questions.encoder}
    with bar, routing_for(model, questions.prompts, **about) as before_pass:
        for index, text, scores in questions.answers(model, before_pass):
            if any(map(math.isnan, scores)):
                raise EvaluationError(
                    f"Task {name!r}: the model's log-likelihoods are not numbers for the input "
                    f"{chosen.examples[index].input[:60]!r}…; try dtype float32."
                )
            accepted = chosen.examples[index].answers
            marks = tuple(METRICS[each].measure(text, accepted) for each in chosen.metrics)
            is_right = text in (accepted if scores else map(str.strip, accepted))
            answers[index] = Prediction(text, is_right, scores, marks)
            bar.update(1)
    predictions = tuple(answers[index] for index in range(count))
    rows = [example.row for example in chosen.examples]
    sample = Sample.of(chosen.metrics, [each.marks for each in predictions], rows)
    estimate = _estimate(sample)
    return TaskScore(
        task=name,
        metric=" + ".join(METRICS[each].label for each in chosen.metrics),
        low=estimate.low,
        high=estimate.high,
        sample=sample,
        ties=sum(prediction.tied for prediction in predictions),
        seconds=time.monotonic() - begun,
        cuts=questions.cuts.record(),
        predictions=predictions,
    )


def _estimate(sample: Sample) -> Estimate:
    first = sample.statistics[0]
    # Zeros and ones of one metric are a share of right answers. Nor does resampling say anything
    # where all answers are equally good: of all scores from 0 to 1, those of a share vary most.
    is_share = len(sample.metrics) == first.shape[1] == 1 and ((first == 0) | (first == 1)).all()
    estimate = None if is_share else sample.estimate()
    if estimate is None or estimate.low == estimate.high:
        return wilson(sample.score * sample.independent, sample.independent)
    return estimate


def metrics_of(task: Task, examples: Sequence[Example]) -> tuple[str, ...]:
    """The metrics that score `task` on `examples`: its own, or those that fit the examples.

    Raises EvaluationError for one that is unknown or not installed, or lacks choices.
    """
    some, all_have = (count(example.choices for example in examples) for count in (any, all))
    names = tuple(task.metrics or ((CHOSEN,) if some else (WRITTEN,)))
    for name in names:
        metric(name).measure("", [""])  # fails here without the package that it needs
    if CHOSEN in names and (len(names) > 1 or not all_have):
        raise EvaluationError(
            f"Task {task.name!r} is scored by {' and '.join(names)}, but {CHOSEN} ranks choices: "
            f"it stands alone, and every example needs some."
        )
    return names


def tokenizer_of(model: PreTrainedModel) -> PreTrainedTokenizerBase:
    parts = composition_if_any(model)
    if parts and parts.tokenizer is not None:
        return parts.tokenizer
    if parts:
        return load_tokenizer(parts.base.id, revision=parts.base.revision)
    return load_tokenizer(model.name_or_path)
