"""Answers of a model to a task's examples: the best choice, or generated text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..base.offloading import input_device
from ..errors import EvaluationError
from ..files.strict_json import one_line
from ..tasks.cuts import Cuts
from ..tasks.encoding import Encoder, Prompt, batches_of_tokens, pad_left, pad_right
from ..tasks.task import Example
from .likelihood import ChoicePrompt, choice_log_likelihoods

__all__ = [
    "Answer",
    "Questions",
    "generated_answers",
    "questions_to_answer",
    "questions_to_rank",
    "ranked_answers",
]

BeforePass = Callable[[Sequence[int]], None]  # told which examples the rows of a pass belong to


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
    """Examples as tokens: each prompt and its answer choices, which are empty where text is asked
    for. `cuts` tells what the prompts lost.
    """

    rows: list[ChoicePrompt]
    cuts: Cuts


def questions_to_rank(encoder: Encoder, examples: Sequence[Example]) -> Questions:
    """The examples with their choices; all of one example's follow the same prompt."""
    choices = [[encoder.target(row.input, choice) for choice in row.choices] for row in examples]
    longest = [max(map(len, each)) for each in choices]
    return _questions(encoder, examples, choices, longest)


def questions_to_answer(
    encoder: Encoder, examples: Sequence[Example], max_new_tokens: int
) -> Questions:
    """The examples, with room for so many new tokens.

    Raises EvaluationError when the base has no room for them.
    """
    places = encoder.positions.answer
    if places is not None and max_new_tokens + (not encoder.is_encoder_decoder) > places:
        raise EvaluationError(
            f"max_new_tokens is {max_new_tokens}, but the base has {places} positions for an input "
            f"and its answer; ask for fewer."
        )
    nothing: list[list[list[int]]] = [[] for _ in examples]
    return _questions(encoder, examples, nothing, [max_new_tokens] * len(examples))


def _questions(
    encoder: Encoder,
    examples: Sequence[Example],
    choices: Sequence[list[list[int]]],
    following: Sequence[int],
) -> Questions:
    prompts: list[Prompt] = [
        encoder.fitted(row.input, row.passage, followed_by=tokens)
        for row, tokens in zip(examples, following, strict=True)
    ]
    lengths = [len(p.tokens) + tokens for p, tokens in zip(prompts, following, strict=True)]
    return Questions(
        [(prompt.tokens, each) for prompt, each in zip(prompts, choices, strict=True)],
        Cuts.of([prompt.cut for prompt in prompts], lengths, encoder.positions.trained),
    )


def ranked_answers(
    model: PreTrainedModel,
    examples: Sequence[Example],
    questions: Questions,
    encoder: Encoder,
    budget: int,
    label: str,
    before_pass: BeforePass,
) -> list[Answer]:
    """For each example the choice of the highest mean log-likelihood per target token.

    The first of equals. `questions` are the examples as `questions_to_rank` has them. Raises
    EvaluationError for a log-likelihood that is not a number.
    """
    rows = questions.rows
    answers: dict[int, Answer] = {}
    pad = encoder.tokenizer.pad_token_id
    with tqdm(
        total=len(rows), desc=one_line(label), unit="example", disable=None, leave=False
    ) as bar:
        for index, scores in choice_log_likelihoods(model, rows, pad, budget, before_pass):
            answers[index] = _best(examples[index], scores, label)
            bar.update(1)
    return [answers[index] for index in range(len(examples))]


def _best(example: Example, scores: list[float], label: str) -> Answer:
    if any(score != score for score in scores):
        raise EvaluationError(
            f"Task {label!r}: the model's log-likelihoods are not numbers for the input "
            f"{example.input[:60]!r}…; try dtype float32."
        )
    return Answer(example.choices[scores.index(max(scores))], tuple(scores))


def generated_answers(
    model: PreTrainedModel,
    questions: Questions,
    encoder: Encoder,
    budget: int,
    label: str,
    before_pass: BeforePass,
    max_new_tokens: int,
) -> list[Answer]:
    """For each question the text generated greedily, white space around it removed.

    `questions` come from `questions_to_answer` for as many new tokens.
    """
    prompts = [list(prompt) for prompt, _ in questions.rows]
    pad = pad_right if encoder.is_encoder_decoder else pad_left
    answers: dict[int, Answer] = {}
    with tqdm(
        total=len(prompts), desc=one_line(label), unit="example", disable=None, leave=False
    ) as bar:
        lengths = [len(prompt) + max_new_tokens for prompt in prompts]
        for batch in batches_of_tokens(lengths, budget):
            rows = [prompts[i] for i in batch]
            before_pass(batch)
            with torch.inference_mode():
                output = model.generate(
                    pad(rows, encoder.tokenizer.pad_token_id).to(input_device(model)),
                    attention_mask=pad([[1] * len(row) for row in rows], 0).to(input_device(model)),
                    max_new_tokens=max_new_tokens,
                    do_sample=False,
                    num_beams=1,
                    pad_token_id=encoder.tokenizer.pad_token_id,
                )
            start = 0 if encoder.is_encoder_decoder else max(map(len, rows))
            for index, tokens in zip(batch, output, strict=True):
                text = encoder.tokenizer.decode(tokens[start:], skip_special_tokens=True)
                answers[index] = Answer(text.strip())
            bar.update(len(batch))
    return [answers[index] for index in range(len(prompts))]
