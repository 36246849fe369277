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

from ..base.identity import Base
from ..base.loading import load_tokenizer
from ..config import Formatting, ScoringSettings
from ..errors import EvaluationError
from ..experts.expert import warn_of_other_formatting
from ..files import one_line
from ..routing.compose import composition_if_any, routing_for
from ..tasks.batching import batches_of_tokens, continued, pad_left, pad_right, padded_rows
from ..tasks.encoding import Cuts, Encoder, Tokens, as_read
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
        return cls(
            task.name,
            examples,
            metrics_of(task, examples),
            task.max_new_tokens or settings.max_new_tokens,
            settings.formatting,
            settings.token_budget,
        )

    @property
    def is_ranked(self) -> bool:
        return self.metrics == (CHOSEN,)

    @cached_property
    def digest(self) -> str:
        """A hash of everything here that a model's score depends on."""
        longest = None if self.is_ranked else self.max_new_tokens
        content = [
            [example.content for example in self.examples],
            self.metrics,
            longest,
            asdict(self.formatting),
            # It decides what is batched together, and so how sums are rounded.
            self.token_budget,
        ]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()


class Questions:
    """The tokens of a set's examples for one base: `rows` of a prompt with its answer choices."""

    def __init__(self, chosen: EvaluationSet, encoder: Encoder) -> None:
        self.chosen = chosen
        self.encoder = encoder
        self.rows: list[ChoicePrompt] = []
        prompt_cuts = []
        target_cuts = []
        for example in chosen.examples:
            choices = example.choices if chosen.is_ranked else ()
            tokens = []
            for choice in choices:
                target = encoder.target(example.input, choice)
                tokens.append(target.tokens)
                target_cuts.append(target.cut)
            longest = max(map(len, tokens), default=chosen.max_new_tokens)
            prompt = encoder.fitted(example.input, followed_by=longest)
            self.rows.append((prompt.tokens, tokens))
            prompt_cuts.append(prompt.cut)
        self.cuts = Cuts(prompt_cuts, target_cuts)

    @property
    def prompts(self) -> list[Tokens]:
        return [list(prompt) for prompt, _ in self.rows]

    def answers(self, model: PreTrainedModel, before_pass: BeforePass) -> Iterator[Answer]:
        """The model's answer to each question, in any order.

        The choice of the highest mean log-likelihood per target token, the first of equals, or
        greedily generated text.
        """
        if not self.chosen.is_ranked:
            yield from self._generated(model, before_pass)
            return
        pad = self.encoder.tokenizer.pad_token_id
        budget = self.chosen.token_budget
        for index, scores in choice_log_likelihoods(model, self.rows, pad, budget, before_pass):
            best = scores.index(max(scores))
            yield index, self.chosen.examples[index].choices[best], tuple(scores)

    def _generated(self, model: PreTrainedModel, before_pass: BeforePass) -> Iterator[Answer]:
        tokenizer = self.encoder.tokenizer
        longest = self.chosen.max_new_tokens
        side = pad_right if self.encoder.is_encoder_decoder else pad_left
        lengths = [len(prompt) + longest for prompt, _ in self.rows]
        for batch in batches_of_tokens(lengths, self.chosen.token_budget):
            prompts = [self.rows[index][0] for index in batch]
            ids, mask = padded_rows(side, prompts, tokenizer.pad_token_id, model.device)
            before_pass(batch)
            with torch.inference_mode():
                output = continued(model, tokenizer, ids, mask, longest)
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
        if predictions:
            plain["predictions"] = list(map(asdict, self.predictions))
        return plain


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
        return {
            "mean": self.mean,
            "confidence": CONFIDENCE,
            "router": self.router,
            "tasks": [score.to_dict(predictions=predictions) for score in self.scores],
        }


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
        tokenizer = tokenizer or model.tokenizer
        model = model.model
    encoder = Encoder.for_model(model, tokenizer or tokenizer_of(model), scoring.formatting)
    sets = [EvaluationSet.of(task, scoring) for task in given_tasks(tasks)]  # refuses first
    router = None
    parts = composition_if_any(model)
    if parts:
        router = parts.routing.router
        warn_of_other_formatting(parts.records, as_read(scoring.formatting, examples_of(sets)))
    scores = []
    for chosen in sets:
        questions = Questions(chosen, encoder)
        questions.cuts.report(chosen.name)
        scores.append(score(model, questions))
    return Evaluation(tuple(scores), router)


def examples_of(sets: Iterable[EvaluationSet]) -> list[Example]:
    """The examples of several sets, one set after the other."""
    examples = list[Example]()
    for dataset in sets:
        examples += dataset.examples
    return examples


def score(model: PreTrainedModel, questions: Questions) -> TaskScore:
    """The score of `model`, put into evaluation mode, on `questions`.

    Raises EvaluationError for a log-likelihood that is not a number.
    """
    begun = time.monotonic()
    chosen = questions.chosen
    examples = chosen.examples
    task = chosen.name
    metrics = [METRICS[name] for name in chosen.metrics]
    model.eval()
    answers = {}
    bar = tqdm(total=len(examples), desc=one_line(task), unit="example", disable=None, leave=False)
    passes = routing_for(model, questions.prompts, task=task, examples=examples)
    with bar, passes as before_pass:
        for index, text, scores in questions.answers(model, before_pass):
            example = examples[index]
            if any(map(math.isnan, scores)):
                raise EvaluationError(
                    f"Task {task!r}: the model's log-likelihoods are not numbers for the input "
                    f"{example.input[:60]!r}…; try dtype float32."
                )
            marks = tuple(rule.measure(text, example.answers) for rule in metrics)
            right = example.answers if scores else map(str.strip, example.answers)
            answers[index] = Prediction(text, text in right, scores, marks)
            bar.update(1)
    predictions = tuple(map(answers.__getitem__, range(len(examples))))
    marks_of_all = [prediction.marks for prediction in predictions]
    sample = Sample.of(chosen.metrics, marks_of_all, [example.row for example in examples])
    estimate = _estimate(sample)
    return TaskScore(
        task=task,
        metric=" + ".join(rule.label for rule in metrics),
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
    is_one_number = len(sample.metrics) == first.shape[1] == 1
    is_share = is_one_number and ((first == 0) | (first == 1)).all()
    if not is_share:
        estimate = sample.estimate()
        if estimate.low != estimate.high:
            return estimate
    return wilson(sample.score * sample.independent, sample.independent)


def metrics_of(task: Task, examples: Sequence[Example]) -> tuple[str, ...]:
    """The metrics that score `task` on `examples`: its own, or those that fit the examples.

    Raises EvaluationError for one that is unknown or not installed, or lacks choices.
    """
    have_choices = [bool(example.choices) for example in examples]
    usual = CHOSEN if any(have_choices) else WRITTEN
    names = tuple(task.metrics or (usual,))
    for name in names:
        metric(name).measure("", [""])  # fails here without the package that it needs
    can_rank = names == (CHOSEN,) and all(have_choices)
    if CHOSEN in names and not can_rank:
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
