"""How far an export's logits are from the routed model's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...experts.applied import replaced
from .texts import Inputs, Texts, passing, read_texts

__all__ = ["Fidelity", "fidelity"]


@dataclass(frozen=True)
class Fidelity:
    """The export beside the routed model, on the tokens of some `texts` (their name).

    `difference` is the mean absolute difference of logits, over all `tokens` and the vocabulary;
    `agreement` the share of the tokens after which both would greedily say the same.
    """

    texts: str
    tokens: int
    difference: float
    agreement: float


@torch.inference_mode()
def fidelity(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    layers: Mapping[str, nn.Module],
    texts: Texts,
) -> Fidelity:
    """The routed `model` compared with itself with `layers` in the place of the routed ones.

    Raises as `read_texts` does.
    """
    tokens, difference, same = 0, 0.0, 0
    for inputs in passing(model, texts, read_texts(model, tokenizer, texts)):
        wanted = _logits(model, inputs)
        with replaced(model, layers):
            got = _logits(model, inputs)
        tokens += len(wanted)
        difference += float((got - wanted).abs().double().mean(dim=-1).sum())
        same += int((got.argmax(dim=-1) == wanted.argmax(dim=-1)).sum())
    return Fidelity(texts.name, tokens, difference / tokens, same / tokens)


def _logits(model: PreTrainedModel, inputs: Inputs) -> Tensor:
    """float32 [tokens, vocabulary]."""
    logits: Tensor = model(**inputs, use_cache=False).logits
    return logits[0].float()
