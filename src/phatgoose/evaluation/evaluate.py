"""Zero-shot evaluation: rank classification if there are choices, generation elsewhere.

As in the paper's released code. Every score comes with its n and a 95 % interval.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..base import Base, load_tokenizer
from ..config import Formatting
from ..errors import EvaluationError
from ..experts.expert import warn_of_other_formatting
from ..files import one_line, shortened, write_text
from ..routing.composition import composition_if_any, routing_for
from ..sites import input_device
from ..tasks.batching import batches_of_tokens, pad_left, pad_right
from ..tasks.encoding import Cuts, Encoder, as_read
from ..tasks.loading import given_tasks
from ..tasks.prompt_passes import continued
from ..tasks.task import Example, Task
from .intervals import CONFIDENCE, Sample, wilson_interval
from .likelihood import (
    BeforePass,
    ChoicePrompt,
    batches_of,
    choice_log_likelihoods,
    with_distinct_choices,
)
from .metrics import METRICS, metric


@dataclass(frozen=True)
class Answer:
    """A model's answer to one example, with the mean log-likelihood per token of each choice, if
    any.
    """

    text: str
    scores: tuple[float, ...] = ()


@dataclass(frozen=True)
class Questions:
    """The tokens of `examples` for one base: each prompt with its answer choices.

    `max_new_tokens` bounds each generated answer; None if choices are ranked instead.
    """

    examples: Sequence[Example]
    encoder: Encoder
    rows: Sequence[ChoicePrompt]
    cuts: Cuts
    max_new_tokens: int | None

    @classmethod
    def of(
        cls, encoder: Encoder, examples: Sequence[Example], max_new_tokens: int | None
    ) -> Questions:
        places, most = encoder.positions.answer, max_new_tokens or 0
        if places is not None and most + (not encoder.is_encoder_decoder) > places:
            raise EvaluationError(
                f"max_new_tokens is {most}, but the base has {places} positions for an input and "
                f"its answer; ask for fewer."
            )
        prompts, rows, lengths, targets = [], [], [], []
        for row in examples:
            choices = row.choices if max_new_tokens is None else ()
            each = [encoder.target(row.input, choice) for choice in choices]
            longest = max((len(target.tokens) for target in each), default=most)
            prompt = encoder.fitted(row.input, row.passage, followed_by=longest)
            prompts.append(prompt)
            rows.append((prompt.tokens, [target.tokens for target in each]))
            lengths.append(len(prompt.tokens) + longest)
            targets += [target.cut for target in each]
        cuts = Cuts(
            [prompt.cut for prompt in prompts], lengths, encoder.positions.trained, targets=targets
        )
        return cls(examples, encoder, rows, cuts, max_new_tokens)

    @property
    def prompts(self) -> list[list[int]]:
        return [list(prompt) for prompt, _ in self.rows]

    def batches(self, budget: int) -> list[list[int]]:
        """The examples that are answered together, by index, unless they are packed."""
        if self.max_new_tokens is None:
            return list(batches_of(with_distinct_choices(self.rows), budget))
        lengths = [len(prompt) + self.max_new_tokens for prompt, _ in self.rows]
        return list(batches_of_tokens(lengths, budget))


def answers_to(
    questions: Questions,
    model: PreTrainedModel,
    budget: int,
    label: str,
    before_pass: BeforePass,
) -> list[Answer]:
    """The model's answer to each question, in order; `label` names the task in messages.

    The choice of the highest mean log-likelihood per target token, the first of equals, or greedily
    generated text. Raises EvaluationError for a log-likelihood that is not a number.
    """
    answers_of = _ranked if questions.max_new_tokens is None else _generated
    answers: dict[int, Answer] = {}
    count = len(questions.rows)
    with tqdm(total=count, desc=one_line(label), unit="example", disable=None, leave=False) as bar:
        for index, answer in answers_of(questions, model, budget, before_pass):
            if any(score != score for score in answer.scores):
                raise EvaluationError(
                    f"Task {label!r}: the model's log-likelihoods are not numbers for the input "
                    f"{questions.examples[index].input[:60]!r}…; try dtype float32."
                )
            answers[index] = answer
            bar.update(1)
    return [answers[index] for index in range(count)]


def _ranked(
    questions: Questions, model: PreTrainedModel, budget: int, before_pass: BeforePass
) -> Iterator[tuple[int, Answer]]:
    pad = questions.encoder.tokenizer.pad_token_id
    for index, scores in choice_log_likelihoods(model, questions.rows, pad, budget, before_pass):
        best = scores.index(max(scores))
        yield index, Answer(questions.examples[index].choices[best], tuple(scores))


def _generated(
    questions: Questions, model: PreTrainedModel, budget: int, before_pass: BeforePass
) -> Iterator[tuple[int, Answer]]:
    encoder, longest = questions.encoder, questions.max_new_tokens or 0
    tokenizer, device = encoder.tokenizer, input_device(model)
    pad = pad_right if encoder.is_encoder_decoder else pad_left
    for batch in questions.batches(budget):
        rows = [questions.rows[i][0] for i in batch]
        ids, mask = pad(rows, tokenizer.pad_token_id), pad([[1] * len(row) for row in rows], 0)
        before_pass(batch)
        with torch.inference_mode():
            output = continued(model, tokenizer, ids.to(device), mask.to(device), longest)
        start = 0 if encoder.is_encoder_decoder else ids.shape[1]
        for index, tokens in zip(batch, output, strict=True):
            text = tokenizer.decode(tokens[start:], skip_special_tokens=True)
            yield index, Answer(text.strip())


# Scores of a task's examples, and of several tasks.

TOKEN_BUDGET = 4096
MAX_NEW_TOKENS = 64
CHOSEN = "accuracy"  # the metric of rank classification
WRITTEN = "exact-match"  # the metric of generated answers where a task names none


@dataclass(frozen=True)
class ScoringSettings:
    """How tasks are scored; see `evaluate`."""

    formatting: Formatting = field(default_factory=Formatting)
    limit: int | None = None
    seed: int = 0
    max_new_tokens: int = MAX_NEW_TOKENS
    token_budget: int = TOKEN_BUDGET


@dataclass(frozen=True)
class EvaluationSet:
    """The examples of one task that are scored, and how."""

    name: str
    examples: tuple[Example, ...]
    metrics: tuple[str, ...]
    max_new_tokens: int
    settings: ScoringSettings

    @classmethod
    def of(cls, task: Task, settings: ScoringSettings) -> EvaluationSet:
        examples = task.evaluation_examples(settings.limit, settings.seed)
        longest = task.max_new_tokens or settings.max_new_tokens
        return cls(task.name, examples, metrics_of(task, examples), longest, settings)

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
            asdict(self.settings.formatting),
            # It decides what is batched together, and so how sums are rounded.
            self.settings.token_budget,
        ]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def questions(self, encoder: Encoder) -> Questions:
        most = None if self.is_ranked else self.max_new_tokens
        return Questions.of(encoder, self.examples, most)


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
    row: int | None = None

    @property
    def tied(self) -> bool:
        return bool(self.scores) and self.scores.count(max(self.scores)) > 1


@dataclass(frozen=True)
class TaskScore:
    """One task's score, from 0 to 1: the mean over its metrics, with its 95 % interval.

    The interval is Wilson's if the score is a share of right answers, else a bootstrap over
    examples.

    Attributes:
        task: The task's name.
        metric: Its metrics, in words.
        score: The score.
        n: How many examples were scored.
        low: The lower end of the interval.
        high: The upper end.
        ties: How many examples have best choices that scored equally; the first was taken.
        by_metric: The mean of each metric by its name.
        cuts: What was cut of the inputs, as in an expert's metrics.
        predictions: The answer to each example.
    """

    task: str
    metric: str
    score: float
    n: int
    low: float
    high: float
    ties: int
    by_metric: Mapping[str, float] = field(default_factory=dict)
    cuts: dict[str, int] = field(default_factory=dict, repr=False)
    predictions: tuple[Prediction, ...] = field(default=(), repr=False)

    @property
    def sample(self) -> Sample:
        """The examples' statistics, by which scores of several models are compared in pairs."""
        return _sample(tuple(self.by_metric), self.predictions)

    def to_dict(self, *, predictions: bool = False) -> dict[str, Any]:
        """Plain data for JSON; the answers only if `predictions`."""
        record = asdict(self if predictions else replace(self, predictions=()))
        return record if predictions else {k: v for k, v in record.items() if k != "predictions"}


@dataclass(frozen=True)
class Evaluation:
    """The scores of one model on several tasks.

    Attributes:
        scores: One for each task, in order.
        router: The router that chose the model's experts, None without any.
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

    def write_json(self, path: str | Path, *, predictions: bool = False) -> None:
        """Write `to_dict`. Raises EvaluationError if that can't be done."""
        content = json.dumps(self.to_dict(predictions=predictions), indent=2, ensure_ascii=False)
        write_text(Path(path), content + "\n", EvaluationError)


def evaluate(
    model: PreTrainedModel | Base,
    tasks: Task | str | Path | Iterable[Task | str | Path],
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    limit: int | None = None,
    seed: int = 0,
    formatting: Formatting | None = None,
    max_new_tokens: int = MAX_NEW_TOKENS,
    token_budget: int = TOKEN_BUDGET,
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
        limit: Maximum examples of each task, drawn by `seed`; None is all of them.
        seed: Seed of the draw: the same one draws the same examples.
        formatting: How inputs are cut and wrapped; None is `Formatting()`.
        max_new_tokens: Maximum tokens of a generated answer, where a task sets none.
        token_budget: Maximum tokens of a batch.

    Raises:
        EvaluationError: A task mixes examples with and without choices, a metric is unknown or
            can't serve these examples, a score is not a number, or there is no tokenizer.
        TaskError: A task is empty, or can't be read (`load_task`).
    """
    settings = ScoringSettings(
        formatting or Formatting(), limit, seed, max_new_tokens, token_budget
    )
    if isinstance(model, Base):
        model, tokenizer = model.model, tokenizer or model.tokenizer
    encoder = Encoder.for_model(model, tokenizer or tokenizer_of(model), settings.formatting)
    parts, scores = composition_if_any(model), []
    sets = [EvaluationSet.of(task, settings) for task in given_tasks(tasks)]  # refuses first
    examples = [example for each in sets for example in each.examples]
    read = as_read(settings.formatting, examples)
    warn_of_other_formatting(parts.records if parts else (), read)
    for chosen in sets:
        questions = chosen.questions(encoder)
        questions.cuts.report(chosen.name)
        scores.append(score(model, chosen, questions))
    return Evaluation(tuple(scores), parts.routing.router if parts else None)


def score(model: PreTrainedModel, chosen: EvaluationSet, questions: Questions) -> TaskScore:
    """The score of `model`, put into evaluation mode, on the `questions` of `chosen`."""
    model.eval()
    name, budget = chosen.name, chosen.settings.token_budget
    prompts, examples = questions.prompts, chosen.examples
    with routing_for(
        model, prompts, task=name, examples=examples, encoder=questions.encoder
    ) as before_pass:
        answers = answers_to(questions, model, budget, name, before_pass)
    return replace(task_score(chosen, answers), cuts=questions.cuts.record())


def metrics_of(task: Task, examples: Sequence[Example]) -> tuple[str, ...]:
    """The metrics that score `task` on `examples`: its own, or those that fit the examples.

    Raises EvaluationError for one that is unknown, not installed, or can't score these examples.
    """
    with_choices = {bool(example.choices) for example in examples}
    if not task.metrics and len(with_choices) > 1:
        raise EvaluationError(f"Task {task.name!r} has examples with and without choices.")
    names = tuple(task.metrics or ((CHOSEN,) if True in with_choices else (WRITTEN,)))
    for name in names:
        metric(name).check_installed()
    if CHOSEN in names and (len(names) > 1 or False in with_choices):
        raise EvaluationError(
            f"Task {task.name!r} is scored by {' and '.join(names)}, but {CHOSEN} ranks choices: "
            f"it stands alone, and every example needs some."
        )
    for example in examples if CHOSEN in names else ():
        if not set(example.answers) & set(example.choices):
            raise EvaluationError(
                f"Task {task.name!r} accepts {shortened(example.answers)}, none of which is among "
                f"the choices {shortened(example.choices)}: no answer could be right."
            )
    return names


def tokenizer_of(model: PreTrainedModel) -> PreTrainedTokenizerBase:
    parts = composition_if_any(model)
    if parts:
        if parts.tokenizer is not None:
            return parts.tokenizer
        return load_tokenizer(parts.base.id, revision=parts.base.revision)
    if not model.name_or_path:
        raise EvaluationError("The model doesn't say where it came from; pass its tokenizer.")
    return load_tokenizer(model.name_or_path)


def task_score(chosen: EvaluationSet, answers: Sequence[Answer]) -> TaskScore:
    """The score and its interval, by an answer for each example."""
    predictions = []
    for example, answer in zip(chosen.examples, answers, strict=True):
        text, accepted = answer.text, example.answers
        marks = tuple(METRICS[name].measure(text, accepted) for name in chosen.metrics)
        correct = text in (accepted if answer.scores else map(str.strip, accepted))
        predictions.append(Prediction(text, correct, answer.scores, marks, example.row))
    sample = _sample(chosen.metrics, predictions)
    first = sample.statistics[0]
    # Zeros and ones of one metric are a share of right answers. Nor does resampling say anything
    # where all answers are equally good: of all scores from 0 to 1, those of a share vary most.
    is_share = len(sample.metrics) == first.shape[1] == 1 and ((first == 0) | (first == 1)).all()
    interval = None if is_share else sample.interval()
    if interval is None or interval.low == interval.high:
        interval = wilson_interval(sample.score * sample.independent, sample.independent)
    return TaskScore(
        task=chosen.name,
        metric=" + ".join(METRICS[name].label for name in chosen.metrics),
        score=sample.score,
        n=sample.n,
        low=interval.low,
        high=interval.high,
        ties=sum(prediction.tied for prediction in predictions),
        by_metric=sample.by_metric,
        predictions=tuple(predictions),
    )


def _sample(metrics: tuple[str, ...], predictions: Sequence[Prediction]) -> Sample:
    return Sample.of(metrics, [p.marks for p in predictions], [p.row for p in predictions])
