"""From examples to tokens: prompts, targets, and padded batches.

A prompt has the same tokens whatever answer follows it, and an answer those that it has in the text
of both. A causal model reads prompt and target in one row; a sequence-to-sequence model reads the
prompt in its encoder and the target in its decoder. Targets end with the end-of-sequence token.
What is too long is cut by one rule, here alone (`Formatting.truncation`).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..base.loading import Base
from ..base.positions import Positions, positions_of
from ..config import Formatting
from ..errors import TaskError
from .cuts import Cut, Cuts, cut_tokens
from .task import Example, Span

__all__ = [
    "Encoder",
    "Prompt",
    "TokenPair",
    "added_tokens",
]

SPACES = ("Ġ", "▁", " ")  # how vocabularies write a space at a token's beginning
CONTEXT = 48  # characters before an answer that decide which tokens it has


@dataclass(frozen=True)
class Prompt:
    """A tokenised input; `cut` tells what it lost, None if it is whole."""

    tokens: list[int]
    cut: Cut | None = None


@dataclass(frozen=True)
class TokenPair:
    """A tokenised prompt and target, padded nowhere; `cut` tells what the prompt lost, if any."""

    prompt: list[int]
    target: list[int]
    cut: Cut | None = None

    @property
    def length(self) -> int:
        """Tokens of prompt and target together."""
        return len(self.prompt) + len(self.target)


class Encoder:
    """Turns texts into tokens for one base model, whose `positions` are the most that it holds.

    Raises TaskError when a chat template is asked for and the base has none.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        is_encoder_decoder: bool,
        formatting: Formatting | None = None,
        positions: Positions | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.is_encoder_decoder = is_encoder_decoder
        self.formatting = formatting or Formatting()
        self.positions = positions or Positions()
        if tokenizer.eos_token_id is None:
            raise TaskError("The base model's tokenizer has no end-of-sequence token.")
        if self.formatting.chat and not tokenizer.chat_template:
            raise TaskError("chat is on, but the base model's tokenizer has no chat template.")
        self._before, self._after = added_tokens(tokenizer, is_encoder_decoder=is_encoder_decoder)

    @classmethod
    def of(cls, base: Base, formatting: Formatting | None = None) -> Encoder:
        """The encoder for a base model."""
        return cls.for_model(base.model, base.tokenizer, formatting)

    @classmethod
    def for_model(
        cls,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        formatting: Formatting | None = None,
    ) -> Encoder:
        """The encoder for a model, routed or not."""
        return cls(
            tokenizer,
            is_encoder_decoder=bool(model.config.is_encoder_decoder),
            formatting=formatting,
            positions=positions_of(model),
        )

    def pair(self, input_text: str, target: str, passage: Span | None = None) -> TokenPair:
        """Prompt and target of one example; see `fitted` and `target`."""
        answer = self.target(input_text, target)
        prompt = self.fitted(input_text, passage, followed_by=len(answer))
        return TokenPair(prompt.tokens, answer, prompt.cut)

    def pairs(self, examples: Iterable[Example]) -> list[TokenPair]:
        """Prompts and targets of `examples`."""
        return [self.pair(each.input, each.target, each.passage) for each in examples]

    def prompt(self, text: str) -> list[int]:
        """The tokens of an input of which no field is known; see `fitted`."""
        return self.fitted(text).tokens

    def fitted(self, text: str, passage: Span | None = None, *, followed_by: int = 0) -> Prompt:
        """The tokens of an input, cut to `max_input_tokens` and to the base's positions.

        In a causal model, `followed_by` of the positions are left to what comes after the input.
        What the tokenizer adds stays (BOS, T5's final </s>) but for an end before a causal model's
        answer, as do the words of a chat template, which count against positions only. Spaces at
        the end are the answer's, where the tokenizer makes one token of a space and a word. With
        truncation "middle" the `passage` loses its middle where that is enough, else the whole
        text. Raises TaskError when nothing is left for an input.
        """
        text = self.prompt_text(text)
        tokens = self._tokens(text)
        most = self._most(followed_by)
        room = most - (0 if self.formatting.chat else len(self._before) + len(self._after))
        if len(tokens) <= room:
            return Prompt(self._wrapped(tokens, text))
        left = self._cut(text, tokens, passage, max(room, 0))
        return Prompt(self._wrapped(left), Cut(most, len(tokens) - len(left)))

    def target(self, input_text: str, text: str) -> list[int]:
        """The tokens of a target that follows `input_text`, end-of-sequence included.

        A causal model's target is set off from the prompt by a space unless the prompt ends in
        white space already or is wrapped in a chat template. Its tokens are those that it has in
        the text of both. Warns where the tokenizer gives the prompt other ones there, and when the
        target is cut, to `max_target_tokens` or to the base's positions.
        """
        prompt, space = self._apart(input_text)
        apart = self.is_encoder_decoder
        tokens = self._tokens(text) if apart else self._following(prompt, space + text)
        tokens = [*tokens, int(self.tokenizer.eos_token_id)]
        most, why = self.formatting.max_target_tokens, "max_target_tokens"
        places = self.positions.answer
        if places is not None and not self.is_encoder_decoder:
            places -= self._around + 1  # for one token of the input
        if places is not None and places < most:
            most, why = max(places, 1), "the base's positions"
        if len(tokens) > most:
            warnings.warn(
                f"A target of {len(tokens)} tokens was cut to {most} ({why}): {text[:40]!r}…",
                stacklevel=2,
            )
        return [*tokens[: min(most, len(tokens)) - 1], tokens[-1]]

    def prompt_text(self, context: str) -> str:
        """What of `context` is the prompt's: spaces at its end may be the answer's (`fitted`)."""
        return self._apart(context)[0]

    def continuation(self, context: str, text: str) -> list[int]:
        """The tokens of `text` that follows `context` as it stands, without an end.

        Warns as `target` does.
        """
        if self.is_encoder_decoder:
            return self._tokens(text)
        prompt = self.prompt_text(context)
        return self._following(prompt, context[len(prompt) :] + text)

    def cuts(self, pairs: Sequence[TokenPair]) -> Cuts:
        """What the prompts of `pairs` lost, and which pairs the base was not made for."""
        lengths = [pair.length for pair in pairs]
        return Cuts.of([pair.cut for pair in pairs], lengths, self.positions.trained)

    def _most(self, followed_by: int) -> int:
        """The most tokens that a prompt may have; of one in a chat template, its text."""
        most, places = self.formatting.max_input_tokens, self.positions.prompt
        if places is None:
            return most
        if not self.is_encoder_decoder:
            places -= followed_by
        if places <= self._around:
            raise TaskError(
                f"The base has {self.positions.prompt} positions, and {followed_by} of them are "
                f"for the answer, which leaves none for an input; ask for a shorter answer."
            )
        return min(most, places - (self._around if self.formatting.chat else 0))

    def _cut(self, text: str, tokens: list[int], passage: Span | None, room: int) -> list[int]:
        """At most `room` of the `tokens` of `text`."""
        how = self.formatting.truncation
        if passage is not None and how == "middle" and self.tokenizer.is_fast:
            places = self._encoded(text, return_offsets_mapping=True)["offset_mapping"]
            inside = [i for i, (a, b) in enumerate(places) if passage[0] <= a < b <= passage[1]]
            first, end = (inside[0], inside[-1] + 1) if inside else (0, 0)
            space = room - (len(tokens) - (end - first))
            if space > 0:
                return [*tokens[:first], *cut_tokens(tokens[first:end], space, how), *tokens[end:]]
        return cut_tokens(tokens, room, how)

    def _wrapped(self, tokens: list[int], text: str | None = None) -> list[int]:
        """A prompt of `tokens`, or of the `text` that they are the whole of."""
        if not self.formatting.chat:
            return [*self._before, *tokens, *self._after]
        return self._tokens(self._chat(self.tokenizer.decode(tokens) if text is None else text))

    @cached_property
    def _keeps_spaces(self) -> bool:
        """Whether a space is always a token of its own, so that a prompt may end in it."""
        return not any(len(t) > 1 and t[0] in SPACES for t in self.tokenizer.get_vocab())

    @cached_property
    def _around(self) -> int:
        """How many tokens stand around an input in its prompt."""
        return len(self._wrapped([]))

    @cached_property
    def _end_of_chat(self) -> str:
        """What stands before an answer in a chat template."""
        return _end_of(self._chat(""))

    def _chat(self, text: str) -> str:
        messages = [{"role": "user", "content": text}]
        return str(
            self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        )

    def _apart(self, text: str) -> tuple[str, str]:
        """(the prompt's text, what sets an answer off from it)."""
        if self.is_encoder_decoder or self.formatting.chat:
            return text, ""
        prompt = text if self._keeps_spaces else text.rstrip(" ") or text
        return prompt, text[len(prompt) :] or ("" if prompt[-1:].isspace() else " ")

    def _following(self, prompt: str, text: str) -> list[int]:
        """The tokens of what follows a prompt, as they are in the text of both."""
        end = self._end_of_chat if self.formatting.chat else _end_of(prompt)
        context, joined = self._encoded([end, end + text])["input_ids"]
        if joined[: len(context)] == context:
            return list(joined[len(context) :])
        last = end[len(end.rstrip()) :] or end[-1:]
        warnings.warn(
            f"After a prompt that ends in {last!r}, the tokenizer makes other tokens of prompt and "
            f"answer together than of each; the model reads those of each. Prompts that end in no "
            f"white space, or in a single one, do without.",
            stacklevel=3,
        )
        return self._tokens(text)

    def _tokens(self, text: str) -> list[int]:
        return list(self._encoded(text)["input_ids"])

    def _encoded(self, text: str | list[str], **options: Any) -> Any:
        """What the tokenizer makes of `text` alone; how long it is, is our own business."""
        return self.tokenizer(text, add_special_tokens=False, verbose=False, **options)


def added_tokens(
    tokenizer: PreTrainedTokenizerBase, *, is_encoder_decoder: bool
) -> tuple[list[int], list[int]]:
    """(tokens, tokens) that the tokenizer adds before and after a prompt.

    Those after it, such as an end of sequence, are for encoders: a causal model goes on from there.
    """
    whole = list(tokenizer("a")["input_ids"])
    plain = list(tokenizer("a", add_special_tokens=False)["input_ids"])
    starts = range(len(whole) - len(plain) + 1)
    start = next((i for i in starts if whole[i : i + len(plain)] == plain), 0)
    return whole[:start], whole[start + len(plain) :] if is_encoder_decoder else []


def _end_of(text: str) -> str:
    """The last words of `text`: enough of it to see how what follows is tokenised."""
    if len(text) <= CONTEXT:
        return text
    end = text[-CONTEXT:]
    return end.partition(" ")[2].lstrip(" ") or end
