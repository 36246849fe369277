"""From examples to tokens: prompts, targets, and padded batches.

Input and target are tokenised apart, so that a prompt has the same tokens whatever answer follows
it. A causal model reads prompt and target in one row; a sequence-to-sequence model reads the prompt
in its encoder and the target in its decoder. Targets end with the end-of-sequence token.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from .bases import Base
from .config import Formatting
from .errors import TaskError

__all__ = [
    "IGNORED",
    "Encoder",
    "TokenPair",
    "batches_of_tokens",
    "contiguous_head",
    "pad_left",
    "pad_right",
    "position_ids",
]

IGNORED = -100  # the label that torch's cross-entropy leaves out


@dataclass(frozen=True)
class TokenPair:
    """A tokenised prompt and target, padded nowhere."""

    prompt: list[int]
    target: list[int]

    @property
    def length(self) -> int:
        """Tokens of prompt and target together."""
        return len(self.prompt) + len(self.target)


class Encoder:
    """Turns texts into tokens for one base model.

    Raises TaskError when a chat template is asked for and the base has none.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        is_encoder_decoder: bool,
        formatting: Formatting | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.is_encoder_decoder = is_encoder_decoder
        self.formatting = formatting or Formatting()
        if tokenizer.eos_token_id is None:
            raise TaskError("The base model's tokenizer has no end-of-sequence token.")
        if self.formatting.chat and not tokenizer.chat_template:
            raise TaskError("chat is on, but the base model's tokenizer has no chat template.")

    @classmethod
    def of(cls, base: Base, formatting: Formatting | None = None) -> Encoder:
        """The encoder for a base model."""
        return cls(
            base.tokenizer, is_encoder_decoder=base.is_encoder_decoder, formatting=formatting
        )

    def pair(self, input_text: str, target: str) -> TokenPair:
        """Prompt and target of one example; see `prompt` and `target`."""
        return TokenPair(self.prompt(input_text), self.target(input_text, target))

    def prompt(self, text: str) -> list[int]:
        """The tokens of an input, cut on the right to `max_input_tokens`."""
        most = self.formatting.max_input_tokens
        if not self.formatting.chat:  # the tokenizer's own cut keeps BOS, or T5's final </s>
            tokens: list[int] = self.tokenizer(text, truncation=True, max_length=most)["input_ids"]
            return tokens
        text = self.tokenizer.decode(self._tokens(text)[:most])  # cut the text, not the template
        messages = [{"role": "user", "content": text}]
        rendered = self.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )
        return self._tokens(rendered)

    def target(self, input_text: str, text: str) -> list[int]:
        """The tokens of a target that follows `input_text`, end-of-sequence included.

        A causal model's target is set off from the prompt by a space unless the prompt ends in
        white space already or is wrapped in a chat template. Warns when the target is cut.
        """
        joined = self.is_encoder_decoder or self.formatting.chat or input_text[-1:].isspace()
        tokens = self._tokens(text if joined else " " + text)
        most = self.formatting.max_target_tokens
        if len(tokens) >= most:
            warnings.warn(
                f"A target of {len(tokens) + 1} tokens was cut to {most} (max_target_tokens): "
                f"{text[:40]!r}…",
                stacklevel=2,
            )
        return [*tokens[: most - 1], int(self.tokenizer.eos_token_id)]

    def _tokens(self, text: str) -> list[int]:
        tokens: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return tokens


@contextmanager
def contiguous_head(model: nn.Module) -> Iterator[None]:
    """Hand the output layer of `model` contiguous rows while the context is open.

    Logits asked for at the last positions only reach it as a strided view, for which torch copies
    the whole output matrix once per row: a quarter of a training step (SmolLM2, 8 x 128 tokens).
    """
    head = model.get_output_embeddings()  # type: ignore[operator]
    handle = head.register_forward_pre_hook(lambda _, args: (args[0].contiguous(), *args[1:]))
    try:
        yield
    finally:
        handle.remove()


def pad_left(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    """The rows as one [rows, longest] tensor, filled up with `value` on the left."""
    longest = max((len(row) for row in rows), default=0)
    return torch.tensor([[value] * (longest - len(row)) + list(row) for row in rows])


def pad_right(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    """The rows as one [rows, longest] tensor, filled up with `value` on the right."""
    longest = max((len(row) for row in rows), default=0)
    return torch.tensor([list(row) + [value] * (longest - len(row)) for row in rows])


def position_ids(attention_mask: Tensor) -> Tensor:
    """Positions that count real tokens only, [rows, columns]: padding does not shift a text."""
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)


def batches_of_tokens(lengths: Sequence[int], budget: int) -> Iterator[list[int]]:
    """Index lists that visit every row once, of similar length, at most `budget` tokens padded.

    Rows longer than the budget come alone. Longest first, so that memory runs out early or never.
    """
    order = sorted(range(len(lengths)), key=lambda i: lengths[i], reverse=True)
    batch: list[int] = []
    for index in order:
        if batch and (len(batch) + 1) * lengths[batch[0]] > budget:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch
