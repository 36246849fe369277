"""Answers from a routed model, with the experts behind each token where wanted."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass

import torch
from rich.text import Text
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..base.offloading import input_device
from ..config import Formatting
from ..errors import TaskError
from ..evaluation.answers import questions_to_answer
from ..routing.recording import Recording
from ..routing.recording import record as record_routing
from ..tasks.encoding import Encoder
from ..tasks.task import Example
from .console.colours import coloured

__all__ = ["Answer", "Sampling", "answer", "recorded_tokens"]


@dataclass(frozen=True)
class Sampling:
    """How to generate; `temperature` None is greedy."""

    max_new_tokens: int = 64
    temperature: float | None = None
    seed: int = 0


@dataclass(frozen=True)
class Answer:
    """Generated `text`, all `tokens` (a causal model's prompt first) and, if recorded, routing."""

    text: str
    tokens: list[int]
    prompt_length: int
    recording: Recording | None


def answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    formatting: Formatting | None = None,
    sampling: Sampling | None = None,
    *,
    record: bool = False,
) -> Answer:
    """What `model` generates after `prompt`.

    Raises RoutingError to `record` a model that is not routed, TaskError for an empty prompt.
    """
    if not prompt:
        raise TaskError("The prompt is empty.")
    sampling = sampling or Sampling()
    encoder = Encoder.for_model(model, tokenizer, formatting)
    asked = Example(prompt, "")
    questions = questions_to_answer(encoder, [asked], sampling.max_new_tokens)
    questions.cuts.report("the prompt")
    ids = torch.tensor([questions.rows[0][0]], device=input_device(model))
    torch.manual_seed(sampling.seed)
    choice = (
        {"do_sample": False}
        if sampling.temperature is None
        else {"do_sample": True, "temperature": sampling.temperature}
    )
    with record_routing(model) if record else nullcontext() as recording:
        tokens = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=sampling.max_new_tokens,
            pad_token_id=tokenizer.pad_token_id,
            **choice,
        )[0].tolist()
    start = 0 if encoder.is_encoder_decoder else ids.shape[1]
    text = tokenizer.decode(tokens[start:], skip_special_tokens=True).strip()
    return Answer(text, tokens, start, recording)


def recorded_tokens(result: Answer, tokenizer: PreTrainedTokenizerBase) -> Text:
    """The tokens of a recorded answer, each in the colour of its top expert, with a legend.

    An expert's share in a token is its weight averaged over all sites. The last generated token was
    never routed, because nothing follows it, and stays uncoloured.
    """
    if result.recording is None:
        return Text(result.text)
    names = result.recording.experts
    top = result.recording.by_token().argmax(dim=-1).tolist()
    tokens = (
        (
            tokenizer.decode([token]),
            top[position] if position < len(top) else None,
            position >= result.prompt_length,
        )
        for position, token in enumerate(result.tokens)
        if token not in tokenizer.all_special_ids
    )
    return coloured(tokens, {index: names[index] for index in sorted(set(top))})
