"""Zero-shot evaluation: rank classification where there are choices, exact match elsewhere.

METHOD section 6, Scoring. Every score comes with its n and a 95 % interval.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from scipy.stats import binomtest
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .bases import Base, load_tokenizer
from .config import Formatting
from .encoding import Encoder, batches_of_tokens, pad_left, pad_right
from .errors import EvaluationError
from .likelihood import choice_log_likelihoods
from .sites import ROUTED
from .tasks import Example, Task
from .work import write_text

__all__ = ["Evaluation", "Prediction", "TaskScore", "evaluate"]

CONFIDENCE = 0.95
TOKEN_BUDGET = 4096


@dataclass(frozen=True)
class Prediction:
    """What the model answered to one example.

    `scores` holds the mean log-likelihood per target token of each choice, in order; empty for
    generated answers.
    """

    answer: str
    correct: bool
    scores: tuple[float, ...] = ()


@dataclass(frozen=True)
class TaskScore:
    """One task's score: the share of right answers among `n`, with its Wilson interval.

    `ties` counts the examples whose best choices scored equally; the first of them was taken.
    """

    task: str
    metric: str
    score: float
    n: int
    low: float
    high: float
    ties: int
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
    max_new_tokens: int = 64,
    token_budget: int = TOKEN_BUDGET,
) -> Evaluation:
    """The scores of `model`, routed or not, on `tasks`.

    Examples with choices are scored by rank classification: the choice of the highest mean
    log-likelihood per target token, end-of-sequence included; a task whose examples have none by
    greedy generation of at most `max_new_tokens` and exact match with any reference, white space
    around both left out. `limit` draws so many examples per task, the same ones for one `seed`.
    `tokenizer` None takes that of the routed model or its base. `token_budget` bounds a batch.
    Raises EvaluationError for a task that mixes examples with and without choices, a score that is
    not a number, or a missing tokenizer; TaskError for an empty task.
    """
    if isinstance(model, Base):
        model, tokenizer = model.model, tokenizer or model.tokenizer
    encoder = Encoder(
        tokenizer or _tokenizer_of(model),
        is_encoder_decoder=bool(model.config.is_encoder_decoder),
        formatting=formatting,
    )
    model.eval()
    scores = []
    for task in [tasks] if isinstance(tasks, Task) else tasks:
        examples = task.evaluation_examples(limit, seed)
        with_choices = {bool(example.choices) for example in examples}
        if len(with_choices) > 1:
            raise EvaluationError(f"Task {task.name!r} has examples with and without choices.")
        if with_choices.pop():
            predictions = _rank(model, examples, encoder, token_budget, task.name)
            scores.append(_task_score(task.name, "rank classification accuracy", predictions))
        else:
            predictions = _generate(
                model, examples, encoder, max_new_tokens, token_budget, task.name
            )
            scores.append(_task_score(task.name, "exact match", predictions))
    if not scores:
        raise EvaluationError("No task was given to evaluate on.")
    return Evaluation(tuple(scores))


def _tokenizer_of(model: PreTrainedModel) -> PreTrainedTokenizerBase:
    parts = getattr(model, ROUTED, None)
    if parts is not None and parts.tokenizer is not None:
        return parts.tokenizer
    name = parts.base.id if parts is not None else model.name_or_path
    if not name:
        raise EvaluationError("The model doesn't say where it came from; pass its tokenizer.")
    return load_tokenizer(name)


def _rank(
    model: PreTrainedModel,
    examples: Sequence[Example],
    encoder: Encoder,
    budget: int,
    label: str,
) -> list[Prediction]:
    rows = [
        (
            encoder.prompt(example.input),
            [encoder.target(example.input, choice) for choice in example.choices],
        )
        for example in examples
    ]
    predictions: dict[int, Prediction] = {}
    pad = encoder.tokenizer.pad_token_id
    with tqdm(total=len(rows), desc=label, unit="example", disable=None) as bar:
        for index, scores in choice_log_likelihoods(model, rows, pad, budget):
            predictions[index] = _ranked(examples[index], scores, label)
            bar.update(1)
    return [predictions[index] for index in range(len(examples))]


def _ranked(example: Example, scores: list[float], label: str) -> Prediction:
    if any(score != score for score in scores):
        raise EvaluationError(
            f"Task {label!r}: the model's log-likelihoods are not numbers for the input "
            f"{example.input[:60]!r}…; try dtype float32."
        )
    answer = example.choices[scores.index(max(scores))]
    return Prediction(answer, answer in example.answers, tuple(scores))


def _generate(
    model: PreTrainedModel,
    examples: Sequence[Example],
    encoder: Encoder,
    max_new_tokens: int,
    budget: int,
    label: str,
) -> list[Prediction]:
    prompts = [encoder.prompt(example.input) for example in examples]
    pad = pad_right if encoder.is_encoder_decoder else pad_left
    predictions: dict[int, Prediction] = {}
    with tqdm(total=len(prompts), desc=label, unit="example", disable=None) as bar:
        lengths = [len(prompt) + max_new_tokens for prompt in prompts]
        for batch in batches_of_tokens(lengths, budget):
            rows = [prompts[i] for i in batch]
            with torch.inference_mode():
                output = model.generate(
                    pad(rows, encoder.tokenizer.pad_token_id).to(model.device),
                    attention_mask=pad([[1] * len(row) for row in rows], 0).to(model.device),
                    max_new_tokens=max_new_tokens,
                    do_sample=False,
                    num_beams=1,
                    pad_token_id=encoder.tokenizer.pad_token_id,
                )
            start = 0 if encoder.is_encoder_decoder else max(map(len, rows))
            for index, tokens in zip(batch, output, strict=True):
                text = encoder.tokenizer.decode(tokens[start:], skip_special_tokens=True).strip()
                right = text in [answer.strip() for answer in examples[index].answers]
                predictions[index] = Prediction(text, right)
            bar.update(len(batch))
    return [predictions[index] for index in range(len(examples))]


def _task_score(task: str, metric: str, predictions: Sequence[Prediction]) -> TaskScore:
    right, n = sum(p.correct for p in predictions), len(predictions)
    interval = binomtest(right, n).proportion_ci(CONFIDENCE, method="wilson")
    return TaskScore(
        task=task,
        metric=metric,
        score=right / n,
        n=n,
        low=float(interval.low),
        high=float(interval.high),
        ties=sum(p.scores.count(max(p.scores)) > 1 for p in predictions if p.scores),
        predictions=tuple(predictions),
    )
