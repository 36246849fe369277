"""Answers of a model to a task's examples: the best choice, or generated text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from .encoding import Encoder, batches_of_tokens, pad_left, pad_right
from .errors import EvaluationError
from .files import one_line
from .likelihood import choice_log_likelihoods
from .offloading import input_device
from .tasks import Example

__all__ = ["Answer", "generated_answers", "ranked_answers"]

BeforePass = Callable[[Sequence[int]], None]  # told which examples the rows of a pass belong to


@dataclass(frozen=True)
class Answer:
    """A model's answer to one example.

    `scores` holds the mean log-likelihood per target token of each choice, in order; empty for
    generated answers.
    """

    text: str
    scores: tuple[float, ...] = ()


def ranked_answers(
    model: PreTrainedModel,
    examples: Sequence[Example],
    encoder: Encoder,
    budget: int,
    label: str,
    before_pass: BeforePass,
) -> list[Answer]:
    """For each example the choice of the highest mean log-likelihood per target token.

    The first of equals. Raises EvaluationError for a log-likelihood that is not a number.
    """
    rows = [
        (
            encoder.prompt(example.input),
            [encoder.target(example.input, choice) for choice in example.choices],
        )
        for example in examples
    ]
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
    examples: Sequence[Example],
    encoder: Encoder,
    budget: int,
    label: str,
    before_pass: BeforePass,
    max_new_tokens: int,
) -> list[Answer]:
    """For each example the text generated greedily, white space around it removed."""
    prompts = [encoder.prompt(example.input) for example in examples]
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
    return [answers[index] for index in range(len(examples))]
