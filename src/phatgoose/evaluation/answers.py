"""Answers of a model to a task's examples: the best choice, or generated text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..base.offloading import input_device
from ..errors import EvaluationError
from ..files.quoting import one_line
from ..tasks.collating import batches_of_tokens, pad_left, pad_right
from ..tasks.cuts import Cut, Cuts
from ..tasks.encoding import Encoder
from ..tasks.prompt_passes import continued
from ..tasks.task import Example
from .likelihood import BeforePass, ChoicePrompt, choice_log_likelihoods

__all__ = ["Answer", "Questions", "answers_to", "questions_to_answer", "questions_to_rank"]


@dataclass(frozen=True)
class Answer:
    """A model's answer to one example.

    `scores` holds the mean log-likelihood per target token of each choice, in order; empty for
    generated answers.
    """

    text: str
    scores: tuple[float, ...] = ()


@dataclass(frozen=True)
class Questions:
    """The tokens of `examples` for one base: each prompt with its answer choices.

    `max_new_tokens` bounds each generated answer; None where choices are ranked instead. `cuts`
    counts what prompts and choices lost.
    """

    examples: Sequence[Example]
    encoder: Encoder
    rows: Sequence[ChoicePrompt]
    cuts: Cuts
    max_new_tokens: int | None = None

    @property
    def prompts(self) -> list[list[int]]:
        """The tokens of each prompt."""
        return [list(prompt) for prompt, _ in self.rows]


def questions_to_rank(encoder: Encoder, examples: Sequence[Example]) -> Questions:
    """The examples with their answer choices, to be ranked."""
    targets = [[encoder.target(row.input, choice) for choice in row.choices] for row in examples]
    choices = [[target.tokens for target in each] for each in targets]
    cuts = [target.cut for each in targets for target in each]
    longest = [max(map(len, each)) for each in choices]
    return _questions(encoder, examples, choices, longest, choice_cuts=cuts)


def questions_to_answer(
    encoder: Encoder, examples: Sequence[Example], max_new_tokens: int
) -> Questions:
    """The examples with room for `max_new_tokens` generated tokens.

    Raises EvaluationError when the base has too few positions for them.
    """
    places = encoder.positions.answer
    if places is not None and max_new_tokens + (not encoder.is_encoder_decoder) > places:
        raise EvaluationError(
            f"max_new_tokens is {max_new_tokens}, but the base has {places} positions for an input "
            f"and its answer; ask for fewer."
        )
    none: list[list[list[int]]] = [[] for _ in examples]
    lengths = [max_new_tokens] * len(examples)
    return _questions(encoder, examples, none, lengths, max_new_tokens=max_new_tokens)


def _questions(
    encoder: Encoder,
    examples: Sequence[Example],
    choices: Sequence[list[list[int]]],
    answer_lengths: Sequence[int],
    *,
    choice_cuts: Sequence[Cut | None] = (),
    max_new_tokens: int | None = None,
) -> Questions:
    prompts = [
        encoder.fitted(row.input, row.passage, followed_by=tokens)
        for row, tokens in zip(examples, answer_lengths, strict=True)
    ]
    lengths = [len(p.tokens) + tokens for p, tokens in zip(prompts, answer_lengths, strict=True)]
    rows = [(prompt.tokens, each) for prompt, each in zip(prompts, choices, strict=True)]
    trained = encoder.positions.trained
    cuts = Cuts.of([prompt.cut for prompt in prompts], lengths, trained, targets=choice_cuts)
    return Questions(examples, encoder, rows, cuts, max_new_tokens)


def answers_to(
    questions: Questions, model: PreTrainedModel, budget: int, label: str, before_pass: BeforePass
) -> list[Answer]:
    """The model's answer to each question, in order; `label` names the task in messages.

    Where choices are ranked, the choice of the highest mean log-likelihood per target token, the
    first of equals. Elsewhere greedily generated text without white space around it. A batch has at
    most `budget` tokens. Raises EvaluationError for a log-likelihood that is not a number.
    """
    find = _ranked if questions.max_new_tokens is None else _generated
    answers: dict[int, Answer] = {}
    count = len(questions.rows)
    with tqdm(total=count, desc=one_line(label), unit="example", disable=None, leave=False) as bar:
        for index, answer in find(questions, model, budget, label, before_pass):
            answers[index] = answer
            bar.update(1)
    return [answers[index] for index in range(count)]


def _ranked(
    questions: Questions, model: PreTrainedModel, budget: int, label: str, before_pass: BeforePass
) -> Iterator[tuple[int, Answer]]:
    pad = questions.encoder.tokenizer.pad_token_id
    for index, scores in choice_log_likelihoods(model, questions.rows, pad, budget, before_pass):
        example = questions.examples[index]
        if any(score != score for score in scores):
            raise EvaluationError(
                f"Task {label!r}: the model's log-likelihoods are not numbers for the input "
                f"{example.input[:60]!r}…; try dtype float32."
            )
        yield index, Answer(example.choices[scores.index(max(scores))], tuple(scores))


def _generated(
    questions: Questions, model: PreTrainedModel, budget: int, label: str, before_pass: BeforePass
) -> Iterator[tuple[int, Answer]]:
    encoder, longest = questions.encoder, questions.max_new_tokens or 0
    tokenizer, device = encoder.tokenizer, input_device(model)
    prompts = questions.prompts
    pad = pad_right if encoder.is_encoder_decoder else pad_left
    for batch in batches_of_tokens([len(prompt) + longest for prompt in prompts], budget):
        rows = [prompts[i] for i in batch]
        ids = pad(rows, tokenizer.pad_token_id).to(device)
        mask = pad([[1] * len(row) for row in rows], 0).to(device)
        before_pass(batch)
        with torch.inference_mode():
            output = continued(model, tokenizer, ids, mask, longest)
        start = 0 if encoder.is_encoder_decoder else ids.shape[1]
        for index, tokens in zip(batch, output, strict=True):
            text = tokenizer.decode(tokens[start:], skip_special_tokens=True)
            yield index, Answer(text.strip())
