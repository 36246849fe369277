"""The prompts that a mixture is chosen for and an export is compared on, as a model reads them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...base.offloading import input_device
from ...config import Formatting
from ...errors import TaskError
from ...tasks.cuts import Cuts
from ...tasks.encoding import Encoder
from ...tasks.neutral_text import neutral_examples
from ...tasks.prompt_passes import continued
from ...tasks.task import Example
from ..composition import announcing

__all__ = ["Inputs", "Texts", "neutral_texts", "passing", "prompt_texts", "read_texts"]

ANSWER_TOKENS = 16  # of the greedy answer that the decoder of an encoder-decoder model reads
NEUTRAL = 8  # passages

Inputs = dict[str, Tensor]


@dataclass(frozen=True)
class Texts:
    """Prompts, the inputs of `examples`, under the `name` of their task; targets are not read."""

    name: str
    examples: Sequence[Example]
    formatting: Formatting | None = None


def prompt_texts(prompts: Sequence[str], formatting: Formatting | None = None) -> Texts:
    """These prompts. Raises TaskError when one is empty."""
    if not all(prompts):
        raise TaskError("The prompt is empty.")
    return Texts("the prompt", [Example(prompt, "") for prompt in prompts], formatting)


def neutral_texts() -> Texts:
    """Passages of many kinds, to compare models where no prompts are given."""
    return Texts("neutral text", neutral_examples()[:NEUTRAL])


@torch.inference_mode()
def read_texts(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Texts
) -> list[Inputs]:
    """The inputs of a pass of each prompt, one row each, for `passing`.

    The decoder of an encoder-decoder model reads the greedy answer of `model`, of ANSWER_TOKENS
    at most. Raises as `announcing` does, and TaskError where the base leaves no room for a prompt.
    """
    encoder = Encoder.for_model(model, tokenizer, texts.formatting)
    prompts = [encoder.fitted(each.input, each.passage) for each in texts.examples]
    lengths = [len(prompt.tokens) for prompt in prompts]
    Cuts.of([each.cut for each in prompts], lengths, encoder.positions.trained).report(texts.name)
    found = []
    for prompt in prompts:
        ids = torch.tensor([prompt.tokens], device=input_device(model))
        found.append({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    if encoder.is_encoder_decoder:
        for inputs in passing(model, texts, found):
            ids, mask = inputs["input_ids"], inputs["attention_mask"]
            answer = continued(model, tokenizer, ids, mask, ANSWER_TOKENS)
            inputs["decoder_input_ids"] = answer[:, : max(1, answer.shape[1] - 1)]
    return found


def passing(model: PreTrainedModel, texts: Texts, inputs: Sequence[Inputs]) -> Iterator[Inputs]:
    """The `inputs` one by one; routers that choose for whole inputs know whose turn it is.

    Raises as `announcing` does.
    """
    prompts = [each["input_ids"][0].tolist() for each in inputs]
    with announcing(model, texts.name, prompts, texts.examples) as before_pass:
        for row, each in enumerate(inputs):
            before_pass([row])
            yield each
